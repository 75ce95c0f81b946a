"""Large files are brought to the disk while they are written: what a failed flush behind the writer's back does."""

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared import durable_files
from shared.errors import KeyMissing, StoreError
from shared.local_store import LocalStore

CHUNK = bytes(range(256)) * 16


@pytest.fixture(autouse=True)
def small_flushes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable_files, "FLUSH_BYTES", len(CHUNK))


def test_a_flush_that_fails_once_behind_the_writer_fails_the_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The disk tells a lost write to the first who asks, and success to the next."""
    sync, failed = os.fsync, threading.Event()

    def fsync(descriptor: int) -> None:
        if threading.current_thread() is not threading.main_thread() and not failed.is_set():
            failed.set()
            raise OSError(errno.EIO, "Input/output error")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    store = LocalStore(str(tmp_path))
    with pytest.raises(StoreError, match="Input/output error"):
        store.put_stream("data/shard", [CHUNK] * 4, 4 * len(CHUNK))
    assert failed.is_set()
    with pytest.raises(KeyMissing):
        store.get("data/shard")
    store.put_stream("data/shard", [CHUNK] * 4, 4 * len(CHUNK))
    assert store.get("data/shard") == CHUNK * 4


def test_the_writer_does_not_wait_for_the_disk_and_the_end_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sync, flushing, written = os.fsync, threading.Event(), threading.Event()
    synced: list[int] = []

    def fsync(descriptor: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            flushing.set()
            assert written.wait(30.0)
        synced.append(os.fstat(descriptor).st_size)
        sync(descriptor)

    def chunks() -> Iterator[bytes]:
        yield CHUNK
        yield CHUNK
        assert flushing.wait(30.0)  # while the disk is busy
        yield CHUNK
        written.set()

    monkeypatch.setattr(os, "fsync", fsync)
    LocalStore(str(tmp_path)).put_stream("data/shard", chunks(), 3 * len(CHUNK))
    assert synced.count(3 * len(CHUNK)) >= 1
    assert (tmp_path / "data" / "shard").read_bytes() == CHUNK * 3
