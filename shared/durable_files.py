"""Files that are whole or absent, and directories that stay, also after a power failure.

A file is written beside its place under a hidden name and fsynced; its writer then links or renames it. A name is
durable once its directory was fsynced, and so is a directory's own name in its parent.

Every call that changes the disk is one of `os` (pathlib's are), so that tests can record it, fail it, or kill there.
"""

import contextlib
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

MAX_KNOWN = 1000  # directories; beyond it all are forgotten, and synced again when next met
FLUSH_BYTES = 32 << 20  # written since the last flush: the disk shall not wait for the end of a large file

_BESIDE = re.compile(r"\..+\.[0-9a-f]{32}")


def is_beside(name: str) -> bool:
    """Whether a file is called like one that `written_beside` makes."""
    return _BESIDE.fullmatch(name) is not None


class Directories:
    """Makes directories below a root, durably. May be used from any thread.

    One that stands there may have been made a moment ago by another process, which has yet to sync it, or died before
    it could. So whoever meets a directory for the first time syncs its parent, no matter who made it.
    Does not: notice that one it knows was swept and made again by another process, which syncs it then.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: set[Path] = set()

    def make(self, path: Path) -> None:
        """Make a directory and its parents where they are missing; all their names survive a power failure."""
        if path in self._known or path == path.parent:
            return
        self.make(path.parent)
        made = not path.is_dir()
        if made:
            path.mkdir(exist_ok=True)
        try:
            sync_directory(path.parent)
        except OSError:
            if made or path.parent.is_relative_to(self._root):
                raise  # above the root stand other people's directories, not all of which may be opened
        if len(self._known) >= MAX_KNOWN:
            self._known.clear()
        self._known.add(path)

    def open_beside(self, path: Path) -> tuple[Path, int]:
        """Create a hidden file in a path's directory, which is made if need be: (its path, a descriptor to write)."""
        beside = path.parent / f".{path.name}.{uuid.uuid4().hex}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self.make(path.parent)
        try:
            return beside, os.open(beside, flags, 0o666)
        except FileNotFoundError:  # empty directories are swept
            self._known.clear()
            self.make(path.parent)
            return beside, os.open(beside, flags, 0o666)
        except OSError:
            remove_quietly(beside)  # on a network the answer may be lost, and not the file
            raise


@contextlib.contextmanager
def written_beside(directories: Directories, path: Path, chunks: Iterable[bytes | memoryview]) -> Iterator[Path]:
    """A hidden file beside `path` that holds these bytes, durably; gone when the block ends, unless it was renamed."""
    beside, descriptor = directories.open_beside(path)
    try:
        try:
            _write(descriptor, chunks)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        yield beside
    finally:
        remove_quietly(beside)


def _write(descriptor: int, chunks: Iterable[bytes | memoryview]) -> None:
    """Write every byte, and bring a large file to the disk while more of it is written.

    One call of `os.write` may take less than it was given. A failed flush is told once, to whoever asks first: so it is
    raised here, for the last fsync may not hear of it.
    """
    with contextlib.ExitStack() as stack:
        flusher: ThreadPoolExecutor | None = None
        flush: Future[None] | None = None
        dirty = 0
        for chunk in chunks:
            rest = memoryview(chunk).cast("B")
            while len(rest):
                written = os.write(descriptor, rest)
                rest, dirty = rest[written:], dirty + written
            if dirty >= FLUSH_BYTES and (flush is None or flush.done()):
                if flush is not None:
                    flush.result()
                flusher = flusher or stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="flush"))
                flush, dirty = flusher.submit(os.fsync, descriptor), 0
        if flush is not None:
            flush.result()


def remove_quietly(path: Path) -> None:
    """Remove a hidden file. One that stays is swept later, and what its writer has to say matters more."""
    with contextlib.suppress(OSError):
        path.unlink()


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
