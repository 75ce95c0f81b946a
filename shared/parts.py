"""A shard's parts: cutting bytes into them, their sha256, and threads that work through them.

sha256 runs at 1 to 2 GB/s a thread and lets the other threads run meanwhile, so digests are made part by part, a few at
once, without copying.
"""

import contextlib
import hashlib
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from shared.manifest import PART_BYTES

HASH_THREADS = min(4, os.cpu_count() or 1)


def in_parts(chunks: Iterable[memoryview], part_bytes: int = PART_BYTES) -> list[list[memoryview]]:
    """Views of the chunks' bytes, cut at each multiple of `part_bytes`."""
    parts: list[list[memoryview]] = []
    room = 0
    for chunk in chunks:
        while len(chunk):
            if room == 0:
                parts.append([])
                room = part_bytes
            parts[-1].append(chunk[:room])
            chunk, room = chunk[room:], max(room - len(chunk), 0)
    return parts


def digest(chunks: Iterable[bytes | memoryview]) -> str:
    """sha256 (hex) of the chunks' bytes, one after the other."""
    whole = hashlib.sha256()
    for chunk in chunks:
        whole.update(chunk)
    return whole.hexdigest()


@contextlib.contextmanager
def behind(threads: int = HASH_THREADS) -> Iterator[ThreadPoolExecutor]:
    """Threads for what is made while the caller waits for a store; what has not begun when it leaves is dropped."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="behind")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def work_through(items: Sequence[int], work: Callable[[int, threading.Event], None], threads: int) -> None:
    """Call `work(item, over)` for every item, in order of beginning, a few at once; a single item in this thread.

    The first error is raised at once; what is under way then ends unheard, and should look at `over` before it leaves a
    trace.
    """
    pending, turn, over = iter(items), threading.Lock(), threading.Event()
    threads = min(threads, len(items))
    if threads == 1:
        for item in items:
            work(item, over)
        return
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def run() -> None:
        try:
            while not over.is_set():
                with turn:
                    item = next(pending, None)
                if item is None:
                    break
                work(item, over)
        except BaseException as error:
            ended.put(error)
        else:
            ended.put(None)

    try:
        for _ in range(threads):
            threading.Thread(target=run, name="part", daemon=True).start()
        for _ in range(threads):
            error = ended.get()
            if error is not None:
                raise error
    finally:
        over.set()
