"""Any fsspec filesystem as a store: s3, gs, az, memory and the rest.

Guards against: two winners of one name (conditional writes of one small request; a multipart create lets every
writer win on some servers), a reply that got lost (read back: same bytes means it was ours), listings and
filesystem instances from a cache, errors of a dozen libraries (one type gets out).

Requests are retried here: bounded in number and time, jittered, and only reads and writes that are safe to repeat (an
object is written whole, and an exclusive write is read back). s3fs repeats once by itself, for the sake of the parts
of a large write. A server that accepts and never answers is given up within a minute. Who can outlast an outage goes on
asking above: the publisher until its version is committed, the intake and the watcher at their next look.
"""

import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, TypeVar, cast

import fsspec

from shared.errors import Corrupt, KeyMissing, StoreError, UsageError
from shared.store import Entry, Fetched, check_key

Result = TypeVar("Result")

ATTEMPTS = 4
RETRY_FOR_S = 15.0  # no attempt begins later than this after the first
S3FS_ATTEMPTS = 2  # its own default is 5, each as long as a timeout
MAX_EXCLUSIVE_BYTES = 100_000_000  # of one conditional request; s3fs would cut more into a multipart create
FIRST_WAIT_S = 0.2
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 20  # without a byte

# What the libraries below call it: names of exceptions (not imported: each scheme has its own), and S3's error codes.
REFUSED_CODES = {"403", "SignatureDoesNotMatch", "InvalidAccessKeyId"}
PASSING_CODES = {"InternalError", "SlowDown", "ServiceUnavailable", "RequestTimeout", "500", "502", "503", "504"}
PASSING_ERRORS = {
    "ClientPayloadError",
    "ConnectTimeoutError",
    "ConnectionClosedError",
    "EndpointConnectionError",
    "HTTPClientError",
    "IncompleteRead",
    "ReadTimeoutError",
    "ResponseStreamingError",
    "ServerDisconnectedError",
}

_MEMORY_LOCK = threading.Lock()  # fsspec's memory filesystem checks and creates in two steps


class ObjectStore:
    """See `shared.store.Store`."""

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        self.url = url.rstrip("/")
        self._scheme, _, path = url.partition("://")
        self._is_s3 = self._scheme in ("s3", "s3a")
        if self._scheme != "memory" and not path.strip("/"):
            hint = f"Write {self._scheme}://bucket/prefix"
            raise UsageError("no bucket in the store URL", op="open store", key=url, hint=hint)
        settings: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True, **options}
        if self._is_s3:
            timeouts = {"connect_timeout": CONNECT_TIMEOUT_S, "read_timeout": READ_TIMEOUT_S}
            settings["config_kwargs"] = {
                **timeouts,
                "retries": {"total_max_attempts": 1},
                **options.get("config_kwargs", {}),
            }
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url, **settings)
            if self._is_s3:
                _steady(self._fs)
        except ImportError as error:
            raise UsageError(
                f"the package for {self._scheme}:// is not installed",
                op="open store",
                key=url,
                hint=str(error),
            ) from error
        except (ValueError, TypeError) as error:
            known = "file, s3, gs, az, memory"
            raise UsageError(
                f"cannot open {url}: {error}", op="open store", hint=f"Schemes in use here: {known}"
            ) from error
        self._root = self._root.rstrip("/")

    def get(self, key: str, max_bytes: int | None = None) -> bytes:
        path = self._path(key)
        return self._attempt("get", key, lambda: self._read_whole(path, key, max_bytes))

    def get_range(self, key: str, start: int, end: int) -> bytes:
        path = self._path(key)
        return self._attempt("get", key, lambda: self._read_range(path, start, end))

    def get_if_changed(self, key: str, tag: str, max_bytes: int | None = None) -> Fetched | None:
        path = self._path(key)
        conditional = self._get_if_none_match if self._is_s3 else self._get_if_other_mark
        return self._attempt("get", key, lambda: conditional(path, key, tag, max_bytes))

    def put(self, key: str, content: bytes) -> None:
        path = self._path(key)
        self._attempt("put", key, lambda: self._fs.pipe_file(path, content))

    def put_if_absent(self, key: str, content: bytes) -> bool:
        path = self._path(key)
        if len(content) > MAX_EXCLUSIVE_BYTES:
            problem = f"{len(content)} bytes, more than the {MAX_EXCLUSIVE_BYTES} of one conditional request"
            raise StoreError(problem, op="put if absent", key=key)

        def write() -> bool:
            try:
                self._fs.pipe_file(path, content, mode="create")
                return True
            except Exception as error:
                if not _says_exists(error):
                    raise
            return self._read_whole(path, key) == content

        def write_alone() -> bool:
            with _MEMORY_LOCK:
                return write()

        return self._attempt("put if absent", key, write_alone if self._scheme == "memory" else write)

    def put_stream(self, key: str, chunks: Iterable[bytes | memoryview], size: int) -> None:
        path = self._path(key)

        def write() -> None:
            if self._scheme == "memory":  # whose files are seen while they are written
                self._fs.pipe_file(path, b"".join(chunks))
                return
            file = self._fs.open(path, "wb")
            try:
                for chunk in chunks:
                    file.write(chunk)
            except BaseException:
                file.discard()
                file.closed = True  # or its destructor would write what there is
                raise
            file.close()

        # Not retried as a whole: the chunks may be a generator. s3fs repeats its own parts.
        self._attempt("put", key, write, attempts=1)

    def list(self, prefix: str, after: str = "") -> list[Entry]:
        path = self._path(prefix) if prefix else self._root

        def find() -> list[Entry]:
            try:
                found = self._fs.find(path, detail=True)
            except FileNotFoundError:
                found = {}
            if not found and self._is_s3:  # s3fs tells a missing bucket as an empty one
                bucket, below, _ = self._fs.split_path(path)
                self._fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=f"{below}/", MaxKeys=1)
            cut = len(self._root) + 1
            files = {name: info for name, info in found.items() if info["type"] == "file" and name != path}
            entries = (Entry(name[cut:], int(info["size"]), _modified(info)) for name, info in files.items())
            return sorted((entry for entry in entries if entry.key > after), key=_by_key)

        return self._attempt("list", prefix, find)

    def delete(self, key: str) -> None:
        path = self._path(key)

        def remove() -> None:
            try:
                self._fs.rm_file(path)
            except FileNotFoundError:
                return

        self._attempt("delete", key, remove)

    def sweep(self, prefix: str, older_than_s: float) -> int:
        return 0

    def _read_whole(self, path: str, key: str, max_bytes: int | None = None) -> bytes:
        """On S3 in one request; s3fs's `cat_file` asks for the size first, and repeats what is repeated already."""
        if self._is_s3:
            return self._bounded_body(self._get_object(path), key, max_bytes)
        if max_bytes is not None and self._fs.info(path)["size"] > max_bytes:
            raise _too_large(key, max_bytes)
        return cast(bytes, self._fs.cat_file(path))

    def _bounded_body(self, answer: Mapping[str, Any], key: str, max_bytes: int | None) -> bytes:
        if max_bytes is not None and answer["ContentLength"] > max_bytes:
            answer["Body"].close()
            raise _too_large(key, max_bytes)
        return self._body(answer)

    def _read_range(self, path: str, start: int, end: int) -> bytes:
        if self._is_s3:
            return self._body(self._get_object(path, Range=f"bytes={start}-{end - 1}"))
        return cast(bytes, self._fs.cat_file(path, start=start, end=end))

    def _get_object(self, path: str, **conditions: str) -> Mapping[str, Any]:
        bucket, key, _ = self._fs.split_path(path)
        answer = self._fs.call_s3("get_object", Bucket=bucket, Key=key, **conditions, **self._fs.req_kw)
        return cast(Mapping[str, Any], answer)

    def _body(self, answer: Mapping[str, Any]) -> bytes:
        return cast(bytes, fsspec.asyn.sync(self._fs.loop, answer["Body"].read))

    def _path(self, key: str) -> str:
        return f"{self._root}/{check_key(key)}"

    def _get_if_none_match(self, path: str, key: str, tag: str, max_bytes: int | None) -> Fetched | None:
        """S3's conditional GET: 304 comes as an exception."""
        condition = {"IfNoneMatch": tag} if tag else {}
        try:
            answer = self._get_object(path, **condition)
        except Exception as error:
            if _status(error) == 304:
                return None
            raise
        return Fetched(self._bounded_body(answer, key, max_bytes), answer["ETag"])

    def _get_if_other_mark(self, path: str, key: str, tag: str, max_bytes: int | None) -> Fetched | None:
        """Elsewhere: compare what `info` says changes with the content, then read."""
        info = self._fs.info(path)
        marks = (info.get(k) for k in ("ETag", "etag", "generation", "md5Hash", "content_settings", "created", "mtime"))
        now = "|".join(str(mark) for mark in (*marks, info["size"]) if mark is not None)
        if now == tag:
            return None
        if max_bytes is not None and info["size"] > max_bytes:
            raise _too_large(key, max_bytes)
        return Fetched(cast(bytes, self._fs.cat_file(path)), now)

    def _attempt(self, op: str, key: str, call: Callable[[], Result], attempts: int = ATTEMPTS) -> Result:
        """Run a repeatable call, retrying what may pass, letting out only the store's errors."""
        began = time.monotonic()
        for attempt in range(1, attempts + 1):
            try:
                return call()
            except Corrupt:
                raise
            except Exception as error:
                translated = self._translate(op, key, error)
                late = time.monotonic() - began > RETRY_FOR_S
                if not translated.retryable or attempt == attempts or late:
                    raise translated from error
                time.sleep(FIRST_WAIT_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _translate(self, op: str, key: str, error: Exception) -> StoreError:
        chain = _chain(error)
        names = {type(link).__name__ for link in chain}
        codes = {_code(link) for link in chain}
        text = str(error).strip() or type(error).__name__
        if "NoSuchBucket" in codes:
            bucket = self._root.split("/", 1)[0]
            return StoreError(f"no bucket {bucket!r} in {self.url}", op=op, key=key, hint="Create it, or mend the URL")
        if names & {"NoCredentialsError", "PartialCredentialsError"}:
            hint = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or store.options key and secret"
            return StoreError(f"no credentials for {self.url}", op=op, key=key, hint=hint)
        if isinstance(error, PermissionError) or codes & REFUSED_CODES:
            problem = f"{self.url} refuses these credentials: {text}"
            return StoreError(problem, op=op, key=key, hint="Check key and policy")
        if isinstance(error, FileNotFoundError) and op == "get":
            return KeyMissing("no such object", op=op, key=key)
        if isinstance(error, FileNotFoundError):
            hint = "Does it exist, and is the endpoint a store of this kind?"
            return StoreError(f"{self.url} is not found there", op=op, key=key, hint=hint)
        status = _status(error)
        passing = bool(
            isinstance(error, TimeoutError | ConnectionError)
            or names & PASSING_ERRORS
            or codes & PASSING_CODES
            or (status is not None and (status >= 500 or status == 409))
        )
        hint = "Is the endpoint right and up?" if passing else ""
        return StoreError(f"{self.url}: {text}", op=op, key=key, hint=hint, retryable=passing)


def _steady(s3: Any) -> None:
    """Let no write to S3 wait without end.

    botocore announces every body with "Expect: 100-continue", and aiohttp waits for the answer with no timeout: seen as
    writes that hang for ever on a server that accepts and says nothing. Without it, the read timeout holds, and a put
    saves a round trip.
    """
    from aiobotocore.session import AioSession

    s3.retries = S3FS_ATTEMPTS
    s3.session = AioSession(**s3.kwargs)
    s3.session.register("before-call.s3", _drop_expect)


def _drop_expect(params: dict[str, Any], **_: Any) -> None:
    params["headers"].pop("Expect", None)


def _too_large(key: str, max_bytes: int) -> Corrupt:
    return Corrupt(f"more than the {max_bytes} bytes allowed", op="get", key=key)


def _modified(info: Mapping[str, Any]) -> float:
    """When an object was written, by what its file system calls that."""
    for name in ("LastModified", "last_modified", "updated", "mtime", "created"):
        value = info.get(name)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, str):
            return datetime.fromisoformat(value).timestamp()
        if isinstance(value, int | float):
            return float(value)
    raise StoreError("the store does not say when an object was written", op="list", key=str(info.get("name")))


def _by_key(entry: Entry) -> str:
    return entry.key


def _chain(error: BaseException) -> list[BaseException]:
    links: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in links:
        links.append(link)
        link = link.__cause__ or link.__context__
    return links


def _response(error: BaseException) -> Mapping[str, Any]:
    response = getattr(error, "response", None)
    return response if isinstance(response, dict) else {}


def _code(error: BaseException) -> str:
    return str(_response(error).get("Error", {}).get("Code", ""))


def _status(error: BaseException) -> int | None:
    for link in _chain(error):
        status = _response(link).get("ResponseMetadata", {}).get("HTTPStatusCode")
        if status is not None:
            return int(status)
    return None


def _says_exists(error: Exception) -> bool:
    """Whether an exclusive write was refused because the name is taken. (409 means "busy, try again" on S3.)"""
    return isinstance(error, FileExistsError) or _status(error) == 412
