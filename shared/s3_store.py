"""S3 and what speaks it, through s3fs: each operation is one request where S3 has one for it.

Guards against: two winners of one name (conditional writes of one small request; a multipart create lets every writer
win on some servers), a reply that got lost (read back: same bytes means it was ours), a server that accepts and never
answers, one that stops reading in the middle of a body, and one that trickles (every request has a deadline, by its
bytes). Nothing comes from a cache: s3fs is used for its sessions and credentials only.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import partial
from io import SEEK_END, BytesIO
from typing import Any, TypeVar, cast

import fsspec

from shared import retry
from shared.errors import Corrupt, StoreError, UsageError
from shared.retry import Fault, Retry
from shared.s3_upload import PART_BYTES, upload
from shared.store import Entry, Fetched, check_key, demand_exclusive_size, exactly, is_ours
from shared.store_faults import diagnose, status_of, symptoms_of

Result = TypeVar("Result")

MAX_CONNECTIONS = 32


class S3Store:
    """See `shared.store.Store`."""

    def __init__(self, url: str, options: Mapping[str, Any], again: Retry | None = None) -> None:
        self.url = url.rstrip("/")
        self._retry = again or Retry()
        settings: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True, **options}
        settings["config_kwargs"] = {
            "connect_timeout": retry.CONNECT_TIMEOUT_S,
            "read_timeout": retry.READ_TIMEOUT_S,
            "max_pool_connections": MAX_CONNECTIONS,
            "retries": {"total_max_attempts": 1},
            # Our own digests cover every byte of a version, and the signature the rest; older servers know no others.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
            **options.get("config_kwargs", {}),
        }
        try:
            self._fs, root = fsspec.core.url_to_fs(self.url, **settings)
        except ImportError as error:
            problem, hint = "the package for s3:// is not installed", "pip install 'lorasync[s3]'"
            raise UsageError(problem, op="open store", key=url, hint=hint) from error
        except (ValueError, TypeError) as error:
            raise UsageError(f"cannot open {url}: {error}", op="open store") from error
        _steady(self._fs)
        self._bucket, below, _ = self._fs.split_path(root)
        self._prefix = f"{below.strip('/')}/" if below.strip("/") else ""

    def get(self, key: str, max_bytes: int | None = None) -> bytes:
        name = self._name(key)
        return self._retried("get", key, lambda: self._body(self._call("get_object", Key=name), key, max_bytes))

    def get_range(self, key: str, start: int, end: int) -> bytes:
        name, patient = self._name(key), self._retry.for_bytes(end - start)

        def read() -> bytes:
            try:
                answer = self._call("get_object", Key=name, Range=f"bytes={start}-{end - 1}")
            except Exception as error:
                if status_of(error) == 416:  # the object ends before
                    return b""
                raise
            if (start and "ContentRange" not in answer) or int(answer["ContentLength"]) > end - start:
                answer["Body"].close()
                problem = f"{self.url} gives all of an object where a range is asked for"
                raise StoreError(problem, op="get", key=key, hint="Use a store, or a proxy, that heeds Range")
            return self._body(answer, key)

        return patient.run(read, self._diagnosis("get", key))

    def get_if_changed(self, key: str, tag: str, max_bytes: int | None = None) -> Fetched | None:
        name, condition = self._name(key), {"IfNoneMatch": tag} if tag else {}

        def read() -> Fetched | None:
            try:
                answer = self._call("get_object", Key=name, **condition)
            except Exception as error:
                if status_of(error) == 304:
                    return None
                raise
            return Fetched(self._body(answer, key, max_bytes), answer["ETag"])

        return self._retried("get", key, read)

    def put(self, key: str, content: bytes) -> None:
        name = self._name(key)
        self._retried("put", key, lambda: self._call("put_object", Key=name, Body=content))

    def put_if_absent(self, key: str, content: bytes) -> bool:
        name = self._name(key)
        demand_exclusive_size(content, key)

        def write() -> bool:
            try:
                self._call("put_object", Key=name, Body=content, IfNoneMatch="*")
                return True
            except Exception as error:
                if status_of(error) != 412:
                    raise
            return is_ours(lambda most: self._body(self._call("get_object", Key=name), key, most), content, key)

        return self._retried("put if absent", key, write)

    def put_stream(self, key: str, chunks: Iterable[bytes | memoryview], size: int) -> None:
        name, whole = self._name(key), exactly(chunks, size, key)
        if size <= PART_BYTES:
            self.put(key, b"".join(whole))
            return
        patient = replace(self._retry, for_s=max(self._retry.for_s, retry.PARTS_RETRY_FOR_S))

        def request(method: str, **parameters: Any) -> Mapping[str, Any]:
            return patient.run(lambda: self._call(method, Key=name, **parameters), self._diagnosis("put", key))

        def stands() -> bool:
            try:
                answer = self._retried("get", key, lambda: self._call("head_object", Key=name))
            except StoreError:
                return False
            return bool(answer["ContentLength"] == size)

        upload(request, whole, size, stands)

    def list(self, prefix: str, after: str = "") -> list[Entry]:
        below = f"{self._name(prefix)}/" if prefix else self._prefix
        start = {"StartAfter": f"{self._prefix}{after}"} if after else {}
        cut = len(self._prefix)
        entries = []
        for page in self._pages("list", prefix, "list_objects_v2", Prefix=below, **start):
            for item in page.get("Contents", []):
                key = item["Key"][cut:]
                if key > after and not key.endswith("/"):  # consoles put "folders" that are objects
                    entries.append(Entry(key, int(item["Size"]), item["LastModified"].timestamp()))
        return sorted(entries, key=lambda entry: entry.key)

    def delete(self, key: str) -> None:
        name = self._name(key)
        self._retried("delete", key, lambda: self._call("delete_object", Key=name))

    def sweep(self, prefix: str, older_than_s: float) -> int:
        """Abort multipart uploads, whose parts are stored and paid for until somebody does."""
        below = f"{self._name(prefix)}/" if prefix else self._prefix
        removed = 0
        for page in self._pages("sweep", prefix, "list_multipart_uploads", Prefix=below):
            now = _date(page)
            for item in page.get("Uploads", []):
                if (now - item["Initiated"]).total_seconds() > older_than_s:
                    removed += self._abort(prefix, item["Key"], item["UploadId"])
        return removed

    def _abort(self, prefix: str, name: str, upload_id: str) -> int:
        """1, or 0 if somebody else did."""

        def abort() -> int:
            try:
                self._call("abort_multipart_upload", Key=name, UploadId=upload_id)
                return 1
            except FileNotFoundError:
                return 0

        return self._retried("sweep", prefix, abort)

    def _pages(self, op: str, prefix: str, method: str, **parameters: Any) -> Iterator[Mapping[str, Any]]:
        """Every page of a listing, each retried on its own."""
        more: dict[str, Any] = {}
        while True:
            page = self._retried(op, prefix, partial(self._call, method, **parameters, **more))
            yield page
            if not page.get("IsTruncated"):
                return
            if "NextContinuationToken" in page:
                more = {"ContinuationToken": page["NextContinuationToken"]}
            else:
                more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def _call(self, method: str, **parameters: Any) -> Mapping[str, Any]:
        """One request, with a deadline by the size of what it sends."""
        size = 0
        if body := parameters.get("Body"):
            # As a file: aiohttp would copy plain bytes into its buffer at once.
            file = body if isinstance(body, BytesIO) else BytesIO(body)
            size = file.seek(0, SEEK_END)
            file.seek(0)
            parameters["Body"] = file
        deadline_s = retry.deadline_s(size)
        try:
            answer = self._fs.call_s3(method, Bucket=self._bucket, timeout=deadline_s, **parameters)
        except fsspec.exceptions.FSTimeoutError as error:
            raise TimeoutError(f"{size} bytes not taken within {deadline_s:.0f} s") from error
        return cast(Mapping[str, Any], answer)

    def _body(self, answer: Mapping[str, Any], key: str, max_bytes: int | None = None) -> bytes:
        """The bytes of an answer to get_object.

        Raises:
            Corrupt: more than `max_bytes`; the answer is closed unread.
        """
        size = int(answer["ContentLength"])
        if max_bytes is not None and size > max_bytes:
            answer["Body"].close()
            raise Corrupt(f"more than the {max_bytes} bytes allowed", op="get", key=key)
        deadline_s = retry.deadline_s(size)
        try:
            return cast(bytes, fsspec.asyn.sync(self._fs.loop, answer["Body"].read, timeout=deadline_s))
        except fsspec.exceptions.FSTimeoutError as error:
            answer["Body"].close()
            raise TimeoutError(f"{size} bytes not given within {deadline_s:.0f} s") from error

    def _name(self, key: str) -> str:
        return f"{self._prefix}{check_key(key)}"

    def _retried(self, op: str, key: str, call: Callable[[], Result]) -> Result:
        return self._retry.run(call, self._diagnosis(op, key))

    def _diagnosis(self, op: str, key: str) -> Callable[[Exception], Fault]:
        def read(error: Exception) -> Fault:
            return diagnose(symptoms_of(error), url=self.url, op=op, key=key)

        return read


def _date(answer: Mapping[str, Any]) -> datetime:
    """The server's clock, as its answer shows it."""
    return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])


def _steady(s3: Any) -> None:
    """Let s3fs repeat nothing by itself, and no write to S3 wait without end.

    botocore announces every body with "Expect: 100-continue", and aiohttp waits for the answer with no timeout: seen as
    writes that hang for ever on a server that accepts and says nothing. Without it, the read timeout holds, and a put
    saves a round trip.
    """
    from aiobotocore.session import AioSession

    s3.retries = 1
    s3.session = AioSession(**s3.kwargs)
    s3.session.register("before-call.s3", _drop_expect)


def _drop_expect(params: dict[str, Any], **_: Any) -> None:
    params["headers"].pop("Expect", None)
