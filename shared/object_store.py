"""Any fsspec filesystem but S3 as a store: gs, az, memory and the rest. (S3: shared/s3_store.py.)

Guards against: two winners of one name (`mode="create"`, which gcsfs sends as ifGenerationMatch=0 and adlfs as
If-None-Match: *), a reply that got lost (read back: same bytes means it was ours), listings and filesystem instances
from a cache, errors of a dozen libraries (one type gets out).

Requests are retried by `shared.retry`; gcsfs and Azure's client repeat theirs for up to a minute before that.
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import partial
from typing import Any, TypeVar, cast

import fsspec

from shared import retry
from shared.errors import Corrupt, StoreError, UsageError
from shared.retry import Fault, Retry
from shared.store import MAX_EXCLUSIVE_BYTES, Entry, Fetched, check_key, demand_exclusive_size, exactly, is_ours
from shared.store_faults import diagnose, status_of, symptoms_of

Result = TypeVar("Result")

EXTRAS = {"gs": "gs", "gcs": "gs", "az": "az", "abfs": "az", "abfss": "az"}  # by scheme: what brings its package

ONE_REQUEST_BYTES = 16 << 20

# A stream's requests are made out of our reach, and would wait for minutes by default.
TIMEOUTS: dict[str, dict[str, float]] = {
    "gs": {"requests_timeout": retry.deadline_s(ONE_REQUEST_BYTES)},
    "az": {"connection_timeout": retry.CONNECT_TIMEOUT_S, "read_timeout": retry.READ_TIMEOUT_S},
}

_MEMORY_LOCK = threading.Lock()  # fsspec's memory filesystem checks and creates in two steps


class ObjectStore:
    """See `shared.store.Store`."""

    def __init__(self, url: str, options: Mapping[str, Any], again: Retry | None = None) -> None:
        self.url = url.rstrip("/")
        self._retry = again or Retry()
        scheme = url.partition("://")[0]
        self._is_memory = scheme == "memory"
        timeouts = TIMEOUTS.get(EXTRAS.get(scheme, ""), {})
        settings = {"use_listings_cache": False, "skip_instance_cache": True, **timeouts, **options}
        try:
            self._fs, self._root = _file_system(self.url, settings)
        except ImportError as error:
            hint = f"pip install 'lorasync[{EXTRAS[scheme]}]'" if scheme in EXTRAS else str(error)
            problem = f"the package for {scheme}:// is not installed"
            raise UsageError(problem, op="open store", key=url, hint=hint) from error
        except (ValueError, TypeError) as error:
            hint = "Schemes in use here: file, s3, gs, az, memory"
            raise UsageError(f"cannot open {url}: {error}", op="open store", hint=hint) from error
        self._root = self._root.rstrip("/")

    def get(self, key: str, max_bytes: int | None = None) -> bytes:
        path = self._path(key)
        return self._retried("get", key, lambda: self._read_whole(path, key, max_bytes))

    def get_range(self, key: str, start: int, end: int) -> bytes:
        path, patient = self._path(key), self._retry.for_bytes(end - start)

        def read() -> bytes:
            try:
                return cast(bytes, self._fs.cat_file(path, start=start, end=end, **self._within(end - start)))
            except Exception as error:
                if status_of(error) == 416:  # the object ends before
                    return b""
                raise

        return patient.run(read, lambda error: self._fault("get", key, error))

    def get_if_changed(self, key: str, tag: str, max_bytes: int | None = None) -> Fetched | None:
        """Compare what `info` says changes with the content, then read."""
        path = self._path(key)

        def read() -> Fetched | None:
            info = self._fs.info(path, **self._within())
            marks = (info.get(name) for name in ("etag", "generation", "md5Hash", "created", "mtime"))
            now = "|".join(str(mark) for mark in (*marks, info["size"]) if mark is not None)
            if now == tag:
                return None
            _demand_at_most(info["size"], key, max_bytes)
            return Fetched(cast(bytes, self._fs.cat_file(path, **self._within(info["size"]))), now)

        return self._retried("get", key, read)

    def put(self, key: str, content: bytes) -> None:
        path = self._path(key)
        self._retried("put", key, lambda: self._fs.pipe_file(path, content, **self._within(len(content))))

    def put_if_absent(self, key: str, content: bytes) -> bool:
        path = self._path(key)
        demand_exclusive_size(content, key)

        def write() -> bool:
            try:
                self._fs.pipe_file(path, content, mode="create", **self._within(len(content)))
                return True
            except FileExistsError:
                pass
            # Azure's client says "exists" to each 409, also to those that pass.
            return is_ours(partial(self._read_whole, path, key), content, key)

        def write_alone() -> bool:
            with _MEMORY_LOCK:
                return write()

        return self._retried("put if absent", key, write_alone if self._is_memory else write)

    def put_stream(self, key: str, chunks: Iterable[bytes | memoryview], size: int) -> None:
        path, whole = self._path(key), exactly(chunks, size, key)
        if self._is_memory or size <= ONE_REQUEST_BYTES:  # in memory, files are seen while they are written
            self.put(key, b"".join(whole))
            return
        file = self._retried("put", key, lambda: self._fs.open(path, "wb"))
        try:
            for chunk in whole:
                self._once("put", key, partial(file.write, chunk))
        except BaseException:
            file.closed = True  # or its destructor would write what there is
            self._once("put", key, file.discard)
            raise
        self._once("put", key, file.close)

    def list(self, prefix: str, after: str = "") -> list[Entry]:
        path = self._path(prefix) if prefix else self._root

        def find() -> list[Entry]:
            try:
                found = self._fs.find(path, detail=True, **self._within(MAX_EXCLUSIVE_BYTES))  # of many pages
            except FileNotFoundError:
                found = {}
            if not isinstance(found, dict):  # adlfs's answer where the path is an object's
                found = {}
            cut = len(self._root) + 1
            files = {name: info for name, info in found.items() if info["type"] == "file" and name != path}
            entries = (Entry(name[cut:], int(info["size"]), modified(info)) for name, info in files.items())
            return sorted((entry for entry in entries if entry.key > after), key=lambda entry: entry.key)

        return self._retried("list", prefix, find)

    def delete(self, key: str) -> None:
        path = self._path(key)

        def remove() -> None:
            try:
                self._fs.rm_file(path, **self._within())
            except FileNotFoundError:
                return

        self._retried("delete", key, remove)

    def sweep(self, prefix: str, older_than_s: float) -> int:  # noqa: ARG002 - whatever its age
        """Nothing to do: memory dies with its process; Google forgets an upload after a week, Azure its blocks too."""
        if prefix:
            check_key(prefix)
        return 0

    def _read_whole(self, path: str, key: str, max_bytes: int | None = None) -> bytes:
        if max_bytes is not None:
            _demand_at_most(self._fs.info(path, **self._within())["size"], key, max_bytes)
        return cast(bytes, self._fs.cat_file(path, **self._within(max_bytes or MAX_EXCLUSIVE_BYTES)))

    def _within(self, size: int = 0) -> dict[str, float]:
        """The deadline of a call that carries so many bytes, for file systems that work in the background."""
        return {"timeout": retry.deadline_s(size)} if getattr(self._fs, "async_impl", False) else {}

    def _path(self, key: str) -> str:
        return f"{self._root}/{check_key(key)}"

    def _retried(self, op: str, key: str, call: Callable[[], Result]) -> Result:
        return self._retry.run(call, lambda error: self._fault(op, key, error))

    def _once(self, op: str, key: str, call: Callable[[], Any]) -> None:
        """A step of a stream, which can't be repeated alone."""
        try:
            call()
        except Exception as error:
            raise self._fault(op, key, error).error from error

    def _fault(self, op: str, key: str, error: Exception) -> Fault:
        return diagnose(symptoms_of(error), url=self.url, op=op, key=key)


def _file_system(url: str, settings: Mapping[str, Any]) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    if EXTRAS.get(url.partition("://")[0]) != "gs":
        return cast(tuple[Any, str], fsspec.core.url_to_fs(url, **settings))
    # gcsfs's default class first asks another service, over gRPC, what kind of bucket it is: a minute where that is
    # blocked. This one speaks the JSON API and nothing else.
    from gcsfs import core

    return core.GCSFileSystem(**settings), core.GCSFileSystem._strip_protocol(url)


def modified(info: Mapping[str, Any]) -> float:
    """When an object was written, by what its file system calls that: Unix seconds of the store's clock.

    Raises:
        StoreError: it doesn't say.
    """
    for name in ("last_modified", "mtime", "updated", "LastModified", "created"):
        value = info.get(name)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, str):
            return datetime.fromisoformat(value).timestamp()
        if isinstance(value, int | float):
            return float(value)
    raise StoreError("the store does not say when an object was written", op="list", key=str(info.get("name")))


def _demand_at_most(size: int, key: str, max_bytes: int | None) -> None:
    if max_bytes is not None and size > max_bytes:
        raise Corrupt(f"more than the {max_bytes} bytes allowed", op="get", key=key)
