"""s3fs, obstore and plain boto3 on the same server: one large object put and got back, and many small ones.

boto3 (`upload_fileobj`, `download_fileobj` with its own defaults: parts of 8 MiB, ten threads) is also the raw copy
that publications over S3 are measured against. The other two are asked through our own store: put_stream, and get_range
of parts of 16 MiB in four threads. None adds a checksum of its own to a request, for our stores do not: boto3 would by
default (CRC32 of every part).

What all three compute nonetheless: over http the signature of a request covers its body's sha256.
"""

import io
import threading
from typing import Any

import boto3
from botocore.config import Config

from benchmarks.publications import parts_of
from benchmarks.timing import Stopwatch
from publisher.shard import EncodedShard
from shared.parts import in_parts, work_through
from shared.store import Store
from shared.transfer import THREADS

SMALL_OBJECTS = 50
SMALL_BYTES = 1000


class _Bytes(io.RawIOBase):
    """Chunks of memory as a file to upload from, without joining them."""

    def __init__(self, chunks: tuple[memoryview, ...]) -> None:
        self._chunks, self._at, self._size = chunks, 0, sum(map(len, chunks))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        start = 0
        for chunk in self._chunks:
            if self._at < start + len(chunk):
                taken = chunk[self._at - start : self._at - start + len(buffer)]
                buffer[: len(taken)] = taken
                self._at += len(taken)
                return len(taken)
            start += len(chunk)
        return 0


class _Sink(io.RawIOBase):
    """Drops what is downloaded into it. Seekable: into anything else boto3 brings the parts in order, and may stall."""

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, _whence: int = io.SEEK_SET) -> int:
        return offset

    def write(self, content: Any) -> int:
        return len(content)


class Boto:
    """Plain boto3."""

    def __init__(self, bucket: str, options: dict[str, Any]) -> None:
        self._bucket = bucket
        self._client = boto3.client(
            "s3",
            endpoint_url=options["endpoint_url"],
            aws_access_key_id=options["key"],
            aws_secret_access_key=options["secret"],
            region_name="us-east-1",
            config=Config(request_checksum_calculation="when_required", response_checksum_validation="when_required"),
        )

    def large(self, shard: EncodedShard, watch: Stopwatch) -> None:
        """One object there, back, and away."""
        with watch("boto3 put"):
            self._client.upload_fileobj(io.BufferedReader(_Bytes(shard.chunks()), 1 << 20), self._bucket, "raw/large")
        with watch("boto3 get"):
            self._client.download_fileobj(self._bucket, "raw/large", _Sink())
        self._client.delete_object(Bucket=self._bucket, Key="raw/large")

    def small(self, watch: Stopwatch) -> None:
        """Small ones, one after the other."""
        content, keys = bytes(SMALL_BYTES), [f"raw/small-{number}" for number in range(SMALL_OBJECTS)]
        with watch(f"boto3 put {SMALL_OBJECTS} small"):
            for key in keys:
                self._client.put_object(Bucket=self._bucket, Key=key, Body=content)
        with watch(f"boto3 get {SMALL_OBJECTS} small"):
            for key in keys:
                self._client.get_object(Bucket=self._bucket, Key=key)["Body"].read()
        for key in keys:
            self._client.delete_object(Bucket=self._bucket, Key=key)


def store_large(name: str, store: Store, shard: EncodedShard, watch: Stopwatch) -> None:
    """One object there, back, and away, through a store of ours."""
    parts = in_parts(shard.chunks())
    chunks = [chunk for part in parts for chunk in part]
    size = sum(map(len, chunks))
    ranges = parts_of(size)

    def get(number: int, _over: threading.Event) -> None:
        start, end = ranges[number]
        assert len(store.get_range("large", start, end)) == end - start

    with watch(f"{name} put"):
        store.put_stream("large", chunks, size)
    with watch(f"{name} get"):
        work_through(range(len(ranges)), get, THREADS)
    store.delete("large")


def store_small(name: str, store: Store, watch: Stopwatch) -> None:
    """Small ones, one after the other, through a store of ours."""
    content, keys = bytes(SMALL_BYTES), [f"small/{number}" for number in range(SMALL_OBJECTS)]
    with watch(f"{name} put {SMALL_OBJECTS} small"):
        for key in keys:
            store.put(key, content)
    with watch(f"{name} get {SMALL_OBJECTS} small"):
        for key in keys:
            store.get(key)
    for key in keys:
        store.delete(key)
