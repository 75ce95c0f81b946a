"""S3, Google and Azure through obstore, a client in Rust: the optional faster way to the same objects.

    [store]
    client = "obstore"

Promises and guards as shared/s3_store.py. Its own API is used, for its fsspec layer ignores `mode="create"`. Small
requests are retried by `shared.retry`; the parts of a large write by obstore itself, which alone has their bytes,
within the same bounds. Each request has a deadline by its bytes. That of a write or a listing is a client's own, so
there are a few of them; what is read is taken piece by piece, and the clock looked at.
Only the blocking API is used: after awaited calls, two processes of three were seen to abort at their exit, when
obstore's threads let go of Python's objects.

On S3 the options are spelled as s3fs's are. What obstore cannot do, list and abort the multipart uploads of killed
writers, s3fs does.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from io import BytesIO
from typing import Any, TypeVar

from shared import retry
from shared.errors import Corrupt, StoreError, UsageError
from shared.retry import Fault, Retry
from shared.s3_upload import IN_FLIGHT, PART_BYTES, part_bytes
from shared.store import MAX_EXCLUSIVE_BYTES, Entry, Fetched, check_key, demand_exclusive_size, exactly, is_ours
from shared.store_faults import Symptoms, diagnose

Result = TypeVar("Result")

CLASSES = {"s3": "S3Store", "s3a": "S3Store", "gs": "GCSStore", "az": "AzureStore"}
S3_OPTIONS = {
    "endpoint_url": "endpoint",
    "key": "access_key_id",
    "secret": "secret_access_key",
    "token": "session_token",
    "anon": "skip_signature",
}
PAGE_KEYS = 1000
PAGE_BYTES = 1 << 20  # at most, of a listing's answer with so many keys
PIECE_BYTES = 1 << 20
WRITE_BYTES = (1 << 20, PART_BYTES, MAX_EXCLUSIVE_BYTES)  # clients for writes up to so many bytes: one deadline each

_STATUS, _CODE = re.compile(r"status code: (\d{3})"), re.compile(r"<Code>(\w+)</Code>")


class ObstoreStore:
    """See `shared.store.Store`."""

    def __init__(self, url: str, options: Mapping[str, Any], again: Retry | None = None) -> None:
        try:
            import obstore
        except ImportError as error:
            hint = "pip install 'lorasync[obstore]'"
            raise UsageError("obstore is not installed", op="open store", key=url, hint=hint) from error
        self.url, self._options = url.rstrip("/"), options
        self._scheme, _, path = self.url.partition("://")
        if self._scheme not in CLASSES:
            hint = f"obstore is used for {', '.join(CLASSES)}; set store.client = 'fsspec'"
            raise UsageError(f"cannot open {url} with obstore", op="open store", hint=hint)
        self._obstore, self._retry = obstore, again or Retry()
        self._bucket, _, below = path.partition("/")
        self._prefix = f"{below.strip('/')}/" if below.strip("/") else ""
        silent = timedelta(seconds=retry.READ_TIMEOUT_S)
        self._reader = self._open(MAX_EXCLUSIVE_BYTES, read_timeout=silent)
        self._lister = self._open(PAGE_BYTES, read_timeout=silent)
        self._writers = {size: self._open(size) for size in WRITE_BYTES}

    def get(self, key: str, max_bytes: int | None = None) -> bytes:
        name = self._name(key)
        return self._retried("get", key, lambda: self._read(name, key, max_bytes).content)

    def get_range(self, key: str, start: int, end: int) -> bytes:
        name, patient = self._name(key), self._retry.for_bytes(end - start)

        def read() -> bytes:
            try:
                return self._read(name, key, options={"range": (start, end)}).content
            except Exception as error:
                if _symptoms(error).status == 416 or "Wanted range starting at" in str(error):  # the object ends before
                    return b""
                raise

        return patient.run(read, lambda error: self._fault("get", key, error))

    def get_if_changed(self, key: str, tag: str, max_bytes: int | None = None) -> Fetched | None:
        name = self._name(key)

        def read() -> Fetched | None:
            try:
                return self._read(name, key, max_bytes, {"if_none_match": tag} if tag else {})
            except self._obstore.exceptions.NotModifiedError:
                return None

        return self._retried("get", key, read)

    def put(self, key: str, content: bytes) -> None:
        name = self._name(key)
        self._retried("put", key, lambda: self._write(name, content, mode="overwrite"))

    def put_if_absent(self, key: str, content: bytes) -> bool:
        name = self._name(key)
        demand_exclusive_size(content, key)

        def write() -> bool:
            try:
                self._write(name, content, mode="create")
                return True
            except self._obstore.exceptions.AlreadyExistsError:
                pass
            # obstore says "exists" to 409 too, which passes.
            return is_ours(lambda most: self._read(name, key, most).content, content, key)

        return self._retried("put if absent", key, write)

    def put_stream(self, key: str, chunks: Iterable[bytes | memoryview], size: int) -> None:
        name, whole = self._name(key), exactly(chunks, size, key)
        if size <= PART_BYTES:
            self.put(key, b"".join(whole))
            return
        length, broken = part_bytes(size), list[BaseException]()

        def pieces() -> Iterator[bytes]:
            try:
                yield from _copied(whole)
            except BaseException as error:
                broken.append(error)
                raise

        parts = self._open(length, attempts=self._retry.attempts)

        def write() -> None:
            try:
                self._obstore.put(
                    parts, name, pieces(), use_multipart=True, chunk_size=length, max_concurrency=IN_FLIGHT
                )
            except Exception:
                if not broken and self._stands(name, size):  # the answer to the last request was lost
                    return
                raise

        try:
            # Not repeated as a whole, for the chunks are read once.
            replace(self._retry, attempts=1).run(write, lambda error: self._fault("put", key, error))
        except StoreError:
            if broken:
                raise broken[0] from None
            raise

    def list(self, prefix: str, after: str = "") -> list[Entry]:
        below = self._name(prefix) if prefix else self._prefix.rstrip("/")
        offset = f"{self._prefix}{after}" if after else None
        cut = len(self._prefix)

        def read() -> list[Entry]:
            entries: list[Entry] = []
            for page in self._obstore.list(self._lister, below or None, offset=offset, chunk_size=PAGE_KEYS):
                found = ((meta["path"][cut:], meta) for meta in page)
                entries += [Entry(key, meta["size"], meta["last_modified"].timestamp()) for key, meta in found]
            return sorted((entry for entry in entries if entry.key > after), key=lambda entry: entry.key)

        return self._retried("list", prefix, read)

    def delete(self, key: str) -> None:
        name = self._name(key)

        def remove() -> None:
            try:
                self._obstore.delete(self._writers[WRITE_BYTES[0]], name)
            except FileNotFoundError as error:
                if _symptoms(error).codes - {"NoSuchKey", "BlobNotFound"}:
                    raise

        self._retried("delete", key, remove)

    def sweep(self, prefix: str, older_than_s: float) -> int:
        """As the scheme's other client does it.

        Raises:
            UsageError: on S3, s3fs is not installed.
        """
        from shared.object_store import ObjectStore
        from shared.s3_store import S3Store

        other = S3Store if CLASSES[self._scheme] == "S3Store" else ObjectStore
        return other(self.url, self._options, self._retry).sweep(prefix, older_than_s)

    def _open(self, largest: int, attempts: int = 1, **more: timedelta) -> Any:
        """A client whose requests carry at most `largest` bytes, and are tried so often."""
        config: dict[str, Any] = dict(self._options)
        if CLASSES[self._scheme] == "S3Store":
            config = _s3_config(config)
        try:
            return getattr(self._obstore.store, CLASSES[self._scheme])(
                self._bucket,
                config=config,
                client_options={
                    "allow_http": True,
                    "connect_timeout": timedelta(seconds=retry.CONNECT_TIMEOUT_S),
                    "timeout": timedelta(seconds=retry.deadline_s(largest)),
                    **more,
                },
                retry_config={
                    "max_retries": attempts - 1,
                    "retry_timeout": timedelta(seconds=retry.PARTS_RETRY_FOR_S),
                    "backoff": {"init_backoff": timedelta(seconds=self._retry.first_wait_s)},
                },
            )
        except (self._obstore.exceptions.BaseError, TypeError, ValueError) as error:
            raise UsageError(f"cannot open {self.url} with obstore: {_text(error)}", op="open store") from error

    def _read(
        self, name: str, key: str, max_bytes: int | None = None, options: Mapping[str, Any] | None = None
    ) -> Fetched:
        """One request.

        Raises:
            Corrupt: more than `max_bytes`; the answer is dropped unread.
        """
        answer = self._obstore.get(self._reader, name, options=dict(options or {}))
        start, end = answer.range
        size = end - start
        if max_bytes is not None and size > max_bytes:
            raise Corrupt(f"more than the {max_bytes} bytes allowed", op="get", key=key)
        return Fetched(_received(answer.stream(min_chunk_size=1), size), answer.meta["e_tag"] or "")

    def _write(self, name: str, content: bytes, mode: str) -> None:
        wide = (writer for size, writer in self._writers.items() if len(content) <= size)
        writer = next(wide, self._writers[MAX_EXCLUSIVE_BYTES])
        self._obstore.put(writer, name, content, mode=mode, use_multipart=False)

    def _stands(self, name: str, size: int) -> bool:
        try:
            meta = self._retried("get", name, lambda: self._obstore.head(self._lister, name))
        except StoreError:
            return False
        return bool(meta["size"] == size)

    def _name(self, key: str) -> str:
        return f"{self._prefix}{check_key(key)}"

    def _retried(self, op: str, key: str, call: Callable[[], Result]) -> Result:
        return self._retry.run(call, lambda error: self._fault(op, key, error))

    def _fault(self, op: str, key: str, error: Exception) -> Fault:
        return diagnose(_symptoms(error), url=self.url, op=op, key=key)


def _received(pieces: Iterable[bytes], size: int) -> bytes:
    """The bytes of an answer, in memory once.

    Raises:
        TimeoutError: they trickle.
    """
    deadline_s = retry.deadline_s(size)
    whole, over_at = BytesIO(), time.monotonic() + deadline_s
    for piece in pieces:
        if time.monotonic() > over_at:
            raise TimeoutError(f"{size} bytes not given within {deadline_s:.0f} s")
        whole.write(piece)
    return whole.getvalue()  # no copy: nobody else holds them


def _copied(chunks: Iterable[memoryview]) -> Iterator[bytes]:
    """The bytes in small pieces: obstore waits for room between pieces, not inside one, and keeps what it gets."""
    for chunk in chunks:
        for start in range(0, len(chunk), PIECE_BYTES):
            yield bytes(chunk[start : start + PIECE_BYTES])


def _s3_config(options: Mapping[str, Any]) -> dict[str, Any]:
    """s3fs's options by obstore's names.

    Raises:
        UsageError: one that has no counterpart.
    """
    known = {name: value for name, value in options.items() if name != "client_kwargs"}
    known |= {"region_name": options["client_kwargs"].get("region_name")} if "client_kwargs" in options else {}
    strange = [*(known.keys() - S3_OPTIONS.keys() - {"region_name"}), *_beside_region(options)]
    if strange:
        hint = f"It takes {', '.join(S3_OPTIONS)} and client_kwargs.region_name; set store.client = 'fsspec' for others"
        raise UsageError(f"obstore does not take {', '.join(sorted(strange))}", op="open store", hint=hint)
    return {(S3_OPTIONS | {"region_name": "region"})[name]: value for name, value in known.items()}


def _beside_region(options: Mapping[str, Any]) -> list[str]:
    return [f"client_kwargs.{name}" for name in options.get("client_kwargs", {}) if name != "region_name"]


def _symptoms(error: Exception) -> Symptoms:
    """obstore has classes for the commonest cases, and for the rest only words: HTTP's status and the server's code."""
    text = _text(error)
    status = _STATUS.search(text)
    passing = isinstance(error, TimeoutError | ConnectionError) or (not status and "HTTP error" in text)
    return Symptoms(
        text=text,
        names=frozenset({type(error).__name__}),
        codes=frozenset(_CODE.findall(text)),
        status=int(status[1]) if status else None,
        missing=isinstance(error, FileNotFoundError),
        passing=passing,
    )


def _text(error: Exception) -> str:
    """One line, without the dump that follows."""
    return " ".join(str(error).partition("Debug source:")[0].split()) or type(error).__name__
