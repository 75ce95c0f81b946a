"""A shard's bytes from the store, part by part, a few at once: into a file, or only past a pair of eyes.

Promises: nothing is written, and nothing of a download is shown, before its digest matched; a download that was cut off
(killed, or the power went) goes on where it was, without a journal: what stands in the file is digested again, and only
what does not match is fetched; the first error ends it at once, and nothing is written afterwards; memory: `threads`
parts.
Does not: decide who may write to the file (`shared.partial`), check that the disk has room (`shared.fetch`), or repeat
a request (`shared.retry`, below the store).
"""

import hashlib
import os
import threading
from collections.abc import Callable
from io import FileIO
from pathlib import Path

from shared.errors import Corrupt
from shared.local_store import LocalStore
from shared.manifest import PART_BYTES, Shard
from shared.parts import HASH_THREADS, work_through
from shared.store import Store

THREADS = 4
CACHED_BYTES = 1 << 20  # of a local file, read at a time: what is looked at twice is still in the processor's cache

Look = Callable[[int, memoryview], None]  # (where in the shard, bytes there)


def _unseen(_start: int, _content: memoryview) -> None:
    return


def download(store: Store, shard: Shard, path: Path, *, look: Look = _unseen, threads: int = THREADS) -> None:
    """Bring a shard into a file, which may hold some of it already.

    Args:
        look: is shown every part, in any order, from several threads, and nothing that did not match.

    Raises:
        Corrupt: a part whose bytes do not match, or an object of another size.
        KeyMissing, StoreError: as the store says. What was written stays, for the next try.
    """
    _demand_parts(shard)
    path.touch()
    writing = threading.Lock()
    with path.open("r+b", buffering=0) as file:
        there = os.fstat(file.fileno()).st_size
        if there > shard.size:
            os.ftruncate(file.fileno(), shard.size)

        def bring(number: int, over: threading.Event) -> None:
            start, end = _bounds(shard, number)
            if end <= there and _holds(file, shard, number, look):
                return
            if over.is_set():
                return
            content = memoryview(store.get_range(shard.key, start, _asked(shard, end)))
            _demand_digest(shard, number, hashlib.sha256(content).hexdigest())
            look(start, content)
            with writing:
                if not over.is_set():
                    _write(file, start, content)

        try:
            work_through(range(len(shard.parts)), bring, threads)
        finally:
            with writing:  # who comes late finds it over
                file.close()


def verify(store: Store, shard: Shard, *, look: Look = _unseen, threads: int = THREADS) -> None:
    """Check a stored shard's parts where they are.

    Args:
        look: is shown all of it, in any order, from several threads. What it saw counts only if nothing is raised.

    Raises:
        Corrupt, KeyMissing, StoreError: see `download`.
    """
    _demand_parts(shard)
    step = CACHED_BYTES if isinstance(store, LocalStore) else PART_BYTES

    def check(number: int, over: threading.Event) -> None:
        start, end = _bounds(shard, number)
        found = hashlib.sha256()
        for at in range(start, end, step):
            if over.is_set():
                return
            content = memoryview(store.get_range(shard.key, at, _asked(shard, min(at + step, end))))
            found.update(content)
            look(at, content)
        _demand_digest(shard, number, found.hexdigest())

    work_through(range(len(shard.parts)), check, threads)


def file_digests(path: Path) -> tuple[str, ...]:
    """sha256 (hex) of every PART_BYTES of a local file.

    Raises:
        OSError: it can't be read.
    """
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        starts = range(0, size, PART_BYTES)
        found = [""] * len(starts)

        def read(number: int, _over: threading.Event) -> None:
            start = starts[number]
            found[number] = _digest(file, start, min(start + PART_BYTES, size))

        work_through(range(len(starts)), read, HASH_THREADS)
    return tuple(found)


def _bounds(shard: Shard, number: int) -> tuple[int, int]:
    start = number * PART_BYTES
    return start, min(start + PART_BYTES, shard.size)


def _asked(shard: Shard, end: int) -> int:
    """One byte more at the end: an object that has it is too long."""
    return end + 1 if end == shard.size else end


def _demand_parts(shard: Shard) -> None:
    if not shard.size or len(shard.parts) != -(-shard.size // PART_BYTES):
        raise Corrupt(f"{len(shard.parts)} digests for {shard.size} bytes", op="verify shard", key=shard.key)


def _demand_digest(shard: Shard, number: int, found: str) -> None:
    if found != shard.parts[number]:
        raise Corrupt(f"part {number} does not match its digest", op="verify shard", key=shard.key)


def _holds(file: FileIO, shard: Shard, number: int, look: Look) -> bool:
    """Whether a file holds a part already; shows it, if so."""
    start, end = _bounds(shard, number)
    content = _read(file, memoryview(bytearray(end - start)), start)
    if hashlib.sha256(content).hexdigest() != shard.parts[number]:
        return False
    look(start, content)
    return True


def _digest(file: FileIO, start: int, end: int) -> str:
    """sha256 of a file's bytes from `start` to `end`, or to where it ends."""
    buffer, found = memoryview(bytearray(CACHED_BYTES)), hashlib.sha256()
    while content := _read(file, buffer[: end - start], start):
        found.update(content)
        start += len(content)
    return found.hexdigest()


def _read(file: FileIO, buffer: memoryview, start: int) -> memoryview:
    """Fill the buffer, unless the file ends before: one call may give less than was asked for."""
    filled = 0
    while filled < len(buffer) and (taken := os.preadv(file.fileno(), [buffer[filled:]], start + filled)):
        filled += taken
    return buffer[:filled]


def _write(file: FileIO, start: int, content: memoryview) -> None:
    """Write all of it: one call may take less than it was given."""
    while len(content):
        taken = os.pwrite(file.fileno(), content, start)
        content, start = content[taken:], start + taken
