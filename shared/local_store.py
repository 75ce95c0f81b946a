"""A directory as a store: local disks, Lustre, NFS without caches, anything with atomic link and rename.

Guards against: readers that see half a file (write beside, then link or rename), two winners of one name (`os.link`
fails if the name exists, also on NFS), loss after power failure (`shared.durable_files`). Temporary names start with a
dot and are never listed.

A removed object may be back after a power failure: whoever deletes looks again.
Does not: keep its promises on a mount that remembers listings, as an NFS client does by default for up to a minute: a
collector would not see a lease. docs/configuration.md has the options; `shared.stores.probe`, one client, can't tell.
"""

import contextlib
import errno
import logging
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote

from shared.disk_errors import FREE_ROOM, disk_error
from shared.durable_files import Directories, is_beside, sync_directory, written_beside
from shared.errors import Corrupt, KeyMissing, StoreError, StoreUnfit, UsageError
from shared.store import Entry, Fetched, check_key, exactly

log = logging.getLogger(__name__)

Result = TypeVar("Result")

_NO_FILE = {errno.ELOOP, errno.ENXIO, errno.ENODEV}  # a symbolic link, a socket, a device that is not there
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}


class LocalStore:
    """See `shared.store.Store`. A full disk passes: somebody may free room."""

    def __init__(self, url: str) -> None:
        scheme = re.match(r"(file|local)://", url)
        path = unquote(url[scheme.end() :]) if scheme else url
        if not path:
            raise UsageError("no path in the store URL", op="open store", key=url, hint="Write file:///path")
        self.root = Path(path).expanduser().absolute()
        self.url = self.root.as_uri()
        self._directories = Directories(self.root)

    def get(self, key: str, max_bytes: int | None = None) -> bytes:
        def read() -> bytes:
            with self._opened(key) as (descriptor, status):
                _demand_at_most(max_bytes, status, key)
                return _read(descriptor, 0, status.st_size)

        return _translated("get", key, read)

    def get_range(self, key: str, start: int, end: int) -> bytes:
        def read() -> bytes:
            with self._opened(key) as (descriptor, status):
                return _read(descriptor, start, min(end, status.st_size))

        return _translated("get", key, read)

    def get_if_changed(self, key: str, tag: str, max_bytes: int | None = None) -> Fetched | None:
        def read() -> Fetched | None:
            with self._opened(key) as (descriptor, status):
                now = f"{status.st_ino}-{status.st_mtime_ns}-{status.st_size}"
                if now == tag:
                    return None
                _demand_at_most(max_bytes, status, key)
                return Fetched(_read(descriptor, 0, status.st_size), now)

        return _translated("get", key, read)

    def put(self, key: str, content: bytes) -> None:
        _translated("put", key, lambda: self._replace(self._path(key), [content]))

    def put_if_absent(self, key: str, content: bytes) -> bool:
        def write() -> bool:
            path = self._path(key)
            with written_beside(self._directories, path, [content]) as beside:
                try:
                    path.hardlink_to(beside)
                    ours = True
                except FileExistsError:
                    ours = False
                    with contextlib.suppress(Corrupt), self._opened(key) as (descriptor, status):
                        ours = status.st_size == len(content) and _read(descriptor, 0, status.st_size) == content
                except OSError as error:
                    if error.errno not in _NO_LINKS:
                        raise
                    hint = "Use a path on a file system with hard links, or an object store"
                    problem = "the file system has no hard links, so a commit could be overwritten"
                    raise StoreUnfit(problem, op="put if absent", key=key, hint=hint) from error
            sync_directory(path.parent)  # also if it was there: an earlier try of ours may have failed just here
            return ours

        return _translated("put if absent", key, write)

    def put_stream(self, key: str, chunks: Iterable[bytes | memoryview], size: int) -> None:
        def write() -> None:
            path = self._path(key)
            self._demand_room(size, key)
            self._replace(path, exactly(chunks, size, key))

        _translated("put", key, write)

    def list(self, prefix: str, after: str = "") -> list[Entry]:
        def walk() -> list[Entry]:
            found = []
            for folder, folders, files in os.walk(self._path(prefix) if prefix else self.root, onerror=_unless_gone):
                inside = Path(folder).relative_to(self.root).as_posix() + "/" if folder != str(self.root) else ""
                # A folder whose last possible key ("0" comes after "/") is not after `after` is not entered.
                folders[:] = [name for name in folders if not name.startswith(".") and f"{inside}{name}0" > after]
                for name in files:
                    key = inside + name
                    if name.startswith(".") or key <= after:
                        continue
                    try:
                        status = os.lstat(f"{folder}/{name}")
                    except FileNotFoundError:  # deleted between the listing and the stat
                        continue
                    if stat.S_ISREG(status.st_mode):  # `get` would refuse anything else
                        found.append(Entry(key, status.st_size, status.st_mtime))
            return sorted(found, key=lambda entry: entry.key)

        return _translated("list", prefix, walk)

    def delete(self, key: str) -> None:
        def remove() -> None:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                self._path(key).unlink()

        _translated("delete", key, remove)

    def sweep(self, prefix: str, older_than_s: float) -> int:
        """See `Store.sweep`; directories that have long been empty go too, and are not counted.

        Hidden files of another form than ours (.gitkeep, .nfs...) and hidden directories (.snapshot) are other
        people's. What can't be removed is logged and left.
        """

        def remove() -> int:
            top, removed = self._path(prefix), 0
            if not top.is_dir():
                return 0
            newest = _now(top) - older_than_s
            for place, hidden in _folders_deepest_first(top):
                with _what_refuses_left(place):
                    old = place.stat().st_mtime <= newest
                    for path in hidden:
                        with _what_refuses_left(path):
                            if path.lstat().st_mtime <= newest:
                                path.unlink()
                                removed += 1
                    if old and place != top:
                        _remove_if_empty(place)
            return removed

        return _translated("sweep", prefix, remove)

    def _replace(self, path: Path, chunks: Iterable[bytes | memoryview]) -> None:
        with written_beside(self._directories, path, chunks) as beside:
            beside.replace(path)
        sync_directory(path.parent)

    def _demand_room(self, size: int, key: str) -> None:
        """Check that a large object fits before writing it.

        Raises:
            StoreError: it does not.
        """
        self._directories.make(self.root)
        free = shutil.disk_usage(self.root).free
        if free < size:
            problem = f"{free >> 20} MiB free at {self.root}, {size >> 20} MiB needed"
            raise StoreError(problem, op="put", key=key, hint=FREE_ROOM, retryable=True)

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    @contextlib.contextmanager
    def _opened(self, key: str) -> Iterator[tuple[int, os.stat_result]]:
        """A descriptor to read an object by, and what it is: a regular file.

        A pipe would keep its reader waiting for ever, a device has no end, a link leads out of the store.

        Raises:
            Corrupt: anything else stands under that name.
        """
        try:
            descriptor = os.open(self._path(key), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in _NO_FILE:
                raise Corrupt("not a regular file", op="get", key=key) from error
            raise
        try:
            status = os.fstat(descriptor)
            if stat.S_ISDIR(status.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not stat.S_ISREG(status.st_mode):
                raise Corrupt("not a regular file", op="get", key=key)
            yield descriptor, status
        finally:
            os.close(descriptor)


def _demand_at_most(max_bytes: int | None, status: os.stat_result, key: str) -> None:
    if max_bytes is not None and status.st_size > max_bytes:
        raise Corrupt(f"more than the {max_bytes} bytes allowed", op="get", key=key)


def _read(descriptor: int, start: int, end: int) -> bytes:
    """Bytes `start` to `end`, or to the end of the file: one call may give less than was asked for."""
    first = os.pread(descriptor, max(0, end - start), start)
    if start + len(first) >= end or not first:
        return first
    whole = bytearray(first)
    while more := os.pread(descriptor, end - start - len(whole), start + len(whole)):
        whole += more
    return bytes(whole)


def _now(folder: Path) -> float:
    """The file system's own clock, which on NFS is the server's."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime


def _unless_gone(error: OSError) -> None:
    """A directory that isn't there, or no longer, holds nothing; any other failure must not look like that."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _folders_deepest_first(top: Path) -> list[tuple[Path, list[Path]]]:
    """Every directory that is not hidden, and the files of ours in it that are."""
    found = []
    for folder, folders, files in os.walk(top, onerror=_unless_gone):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found.append((Path(folder), [Path(folder, name) for name in files if is_beside(name)]))
    return found[::-1]


@contextlib.contextmanager
def _what_refuses_left(path: Path) -> Iterator[None]:
    """Go on with the next one."""
    try:
        yield
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning("sweep: left %s: %s", path, error)


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            raise


def _translated(op: str, key: str, call: Callable[[], Result]) -> Result:
    """Run a call, letting out only the store's errors."""
    try:
        return call()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:  # or a key above or below an object's
        if op == "get":
            raise KeyMissing("no such object", op=op, key=key) from error
        gone = isinstance(error, FileNotFoundError)  # a sweep was faster than this write
        hint = "Try again" if gone else "An object's key cannot be the beginning of another's"
        raise StoreError(f"{error.strerror or error}", op=op, key=key, hint=hint, retryable=gone) from error
    except OSError as error:
        raise disk_error(error, op=op, key=key) from error
