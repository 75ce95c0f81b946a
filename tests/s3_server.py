"""A real S3 server on loopback, for tests and for trying s3:// by hand: moto, its conditional writes made race-free.

    python -m tests.s3_server --port 5005 --bucket lorasync

moto looks whether a key exists and writes it in two steps; here one lock surrounds both. Requests must be signed by
the key and secret below. Faults can be switched on while it runs (tests/s3_faults.py).

In tests, `running()` starts it as a process of its own and returns when it answers.
"""

import argparse
import contextlib
import hashlib
import hmac
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

ACCESS_KEY, SECRET_KEY = "lorasync", "lorasync-secret"
START_TIMEOUT_S = 60.0
POLL_S = 0.05
CONTROL = "/__control__"  # as in s3_faults

Environ = dict[str, Any]


@dataclass(frozen=True)
class S3Server:
    """A running server."""

    endpoint: str
    bucket: str
    process: subprocess.Popen[bytes]

    @property
    def options(self) -> dict[str, Any]:
        """For `shared.store.open_store`."""
        return {"endpoint_url": self.endpoint, "key": ACCESS_KEY, "secret": SECRET_KEY}

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to reach the server by the usual environment."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        }

    def url(self, prefix: str) -> str:
        return f"s3://{self.bucket}/{prefix}"

    def lose_replies(self, count: int) -> None:
        """Carry out the next conditional writes and answer 500."""
        self._control(f"lose={count}")

    def refuse(self, count: int) -> None:
        """Answer 503 to the next requests without doing anything."""
        self._control(f"refuse={count}")

    def hold(self, part: str) -> None:
        """From now on hold up every write to a key with this in it. An empty one drops those held, undone."""
        self._control(f"hold={part}")

    def held(self) -> int:
        """How many writes are held up."""
        return int(self._control("") or 0)

    def weather(self, **kinds: float) -> None:
        """From now on let this befall every request: the fields of `s3_faults.Weather`. None of them: calm."""
        self._control(urlencode({"weather": json.dumps(kinds)}))

    def _control(self, rule: str) -> bytes:
        with urllib.request.urlopen(f"{self.endpoint}{CONTROL}?{rule}", timeout=10) as answer:
            assert answer.status == 200
            return bytes(answer.read())


@contextlib.contextmanager
def running(bucket: str = "lorasync") -> Iterator[S3Server]:
    """Start a server on a free port; stop it at the end."""
    port = _free_port()
    command = [sys.executable, str(Path(__file__).resolve()), "--port", str(port), "--bucket", bucket]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    server = S3Server(f"http://127.0.0.1:{port}", bucket, process)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _answers(server.endpoint):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the S3 server did not start (exit code {process.poll()})")
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLL_S)
        yield server
    finally:
        process.kill()
        process.wait()


def _answers(endpoint: str) -> bool:
    try:
        with urllib.request.urlopen(f"{endpoint}{CONTROL}", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _refusal(environ: Environ) -> str | None:
    """The error code for a request that our key did not sign, else None.

    Formula: https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html
    """
    fields = dict(re.findall(r"(Credential|SignedHeaders|Signature)=([^,\s]+)", environ.get("HTTP_AUTHORIZATION", "")))
    if len(fields) != 3:
        return "AccessDenied"
    key, *scope = fields["Credential"].split("/")
    if key != ACCESS_KEY:
        return "InvalidAccessKeyId"
    path, _, query = environ["RAW_URI"].partition("?")
    pairs = sorted(pair if "=" in pair else f"{pair}=" for pair in query.split("&") if pair)
    names = fields["SignedHeaders"].split(";")
    headers = "".join(f"{name}:{' '.join(_header(environ, name).split())}\n" for name in names)
    content = _header(environ, "x-amz-content-sha256")
    request = "\n".join((environ["REQUEST_METHOD"], path, "&".join(pairs), headers, ";".join(names), content))
    digest = hashlib.sha256(request.encode()).hexdigest()
    signing_key = f"AWS4{SECRET_KEY}".encode()
    for part in scope:
        signing_key = hmac.digest(signing_key, part.encode(), "sha256")
    text = "\n".join(("AWS4-HMAC-SHA256", _header(environ, "x-amz-date"), "/".join(scope), digest))
    right = hmac.digest(signing_key, text.encode(), "sha256").hex()
    return None if hmac.compare_digest(right, fields["Signature"]) else "SignatureDoesNotMatch"


def _header(environ: Environ, name: str) -> str:
    variable = name.upper().replace("-", "_")
    return str(environ.get(variable if name in ("content-type", "content-length") else f"HTTP_{variable}", ""))


def serve(port: int, bucket: str) -> None:
    """Serve until the process is stopped; the bucket exists from the start.

    It listens before it imports moto, which takes seconds: who comes early waits instead of finding nobody.
    """
    listener = socket.create_server(("127.0.0.1", port), backlog=128)
    # moto makes the bucket through boto3, in this process, before the first request.
    os.environ.setdefault("AWS_DEFAULT_REGION", "us-east-1")
    from moto.s3.models import s3_backends
    from moto.server import DomainDispatcherApplication, create_backend_app
    from s3_faults import Faulty
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, *_: Any) -> None:
            pass

    s3_backends["123456789012"]["aws"].create_bucket(bucket, "us-east-1")
    application = Faulty(DomainDispatcherApplication(create_backend_app), _refusal)
    # By its descriptor, so werkzeug makes no socket of its own.
    server = make_server("127.0.0.1", port, application, threaded=True, request_handler=Quiet, fd=listener.fileno())
    server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description="An S3 server on loopback, forgotten when it stops.")
    parser.add_argument("--port", type=int, default=5005)
    parser.add_argument("--bucket", default="lorasync")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # where s3_faults is; not so under `python -m`
    print(
        f"S3 on http://127.0.0.1:{options.port}, bucket {options.bucket}. In the other terminal:\n"
        f"export AWS_ENDPOINT_URL=http://127.0.0.1:{options.port} AWS_ACCESS_KEY_ID={ACCESS_KEY} "
        f"AWS_SECRET_ACCESS_KEY={SECRET_KEY}",
        flush=True,
    )
    with contextlib.suppress(KeyboardInterrupt):
        serve(options.port, options.bucket)


if __name__ == "__main__":
    main()
