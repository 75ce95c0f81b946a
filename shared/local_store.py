"""A directory as a store: local disks, NFS, Lustre, anything with atomic link and rename.

Guards against: readers that see half a file (write aside, then link or rename), two winners of one name (`os.link`
fails if the name exists, also on NFS), loss after power failure (file and directory are fsynced before the call
returns). Temporary names start with a dot and are never listed.
"""

import contextlib
import errno
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO, TypeVar
from urllib.parse import unquote

from shared.errors import Corrupt, KeyMissing, StoreError, StoreUnfit, UsageError
from shared.store import Entry, Fetched, check_key

Result = TypeVar("Result")

_TRANSIENT = {errno.EINTR, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT}
_NO_FILE = {errno.ELOOP, errno.ENXIO, errno.ENODEV}  # a symbolic link, a socket, a device without a driver
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}


class LocalStore:
    """See `shared.store.Store`."""

    def __init__(self, url: str) -> None:
        scheme = re.match(r"(file|local)://", url)
        path = unquote(url[scheme.end() :]) if scheme else url
        if not path:
            raise UsageError("no path in the store URL", op="open store", key=url, hint="Write file:///path")
        self.root = Path(path).expanduser().absolute()
        self.url = self.root.as_uri()

    def get(self, key: str, max_bytes: int | None = None) -> bytes:
        def read() -> bytes:
            with self._open(key) as file:
                if max_bytes is not None and os.fstat(file.fileno()).st_size > max_bytes:
                    raise Corrupt(f"more than the {max_bytes} bytes allowed", op="get", key=key)
                return file.read()

        return _translated("get", key, read)

    def get_range(self, key: str, start: int, end: int) -> bytes:
        def read() -> bytes:
            with self._open(key) as file:
                return os.pread(file.fileno(), end - start, start)

        return _translated("get", key, read)

    def get_if_changed(self, key: str, tag: str, max_bytes: int | None = None) -> Fetched | None:
        def read() -> Fetched | None:
            with self._open(key) as file:
                status = os.fstat(file.fileno())
                now = f"{status.st_ino}-{status.st_mtime_ns}-{status.st_size}"
                if now == tag:
                    return None
                if max_bytes is not None and status.st_size > max_bytes:
                    raise Corrupt(f"more than the {max_bytes} bytes allowed", op="get", key=key)
                return Fetched(file.read(), now)

        return _translated("get", key, read)

    def put(self, key: str, content: bytes) -> None:
        def write() -> None:
            path = self._path(key)
            aside = self._write_aside(path, [content])
            aside.replace(path)
            _sync_directory(path.parent)

        _translated("put", key, write)

    def put_if_absent(self, key: str, content: bytes) -> bool:
        def write() -> bool:
            path = self._path(key)
            aside = self._write_aside(path, [content])
            try:
                path.hardlink_to(aside)
            except FileExistsError:
                with contextlib.suppress(Corrupt), self._open(key) as file:
                    return file.read(len(content) + 1) == content
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                hint = "Use a path on a file system with hard links, or an object store"
                problem = "the file system has no hard links, so a commit could be overwritten"
                raise StoreUnfit(problem, op="put if absent", key=key, hint=hint) from error
            finally:
                aside.unlink(missing_ok=True)
            _sync_directory(path.parent)
            return True

        return _translated("put if absent", key, write)

    def put_stream(self, key: str, chunks: Iterable[bytes | memoryview], size: int) -> None:
        def write() -> None:
            path = self._path(key)
            self._demand_room(size, key)
            aside = self._write_aside(path, chunks)
            aside.replace(path)
            _sync_directory(path.parent)

        _translated("put", key, write)

    def list(self, prefix: str, after: str = "") -> list[Entry]:
        def walk() -> list[Entry]:
            found = []
            for folder, folders, files in os.walk(self._path(prefix) if prefix else self.root, onerror=_unless_gone):
                folders[:] = [name for name in folders if not name.startswith(".")]
                for name in files:
                    path = Path(folder) / name
                    if name.startswith("."):
                        continue
                    key = path.relative_to(self.root).as_posix()
                    if key <= after:
                        continue
                    try:
                        status = path.lstat()
                    except FileNotFoundError:  # deleted between the listing and the stat
                        continue
                    found.append(Entry(key, status.st_size, status.st_mtime))
            return sorted(found, key=lambda entry: entry.key)

        return _translated("list", prefix, walk)

    def delete(self, key: str) -> None:
        _translated("delete", key, lambda: self._path(key).unlink(missing_ok=True))

    def sweep(self, prefix: str, older_than_s: float) -> int:
        def remove() -> int:
            removed = 0
            for folder, _, files in os.walk(self._path(prefix), onerror=_unless_gone):
                for path in (Path(folder) / name for name in files if name.startswith(".")):
                    with contextlib.suppress(FileNotFoundError):
                        if _now(Path(folder)) - path.stat().st_mtime > older_than_s:
                            path.unlink()
                            removed += 1
            return removed

        return _translated("sweep", prefix, remove)

    def _demand_room(self, size: int, key: str) -> None:
        """Check that a large object fits before writing it.

        Raises:
            StoreError: it does not.
        """
        _make_directory(self.root)
        free = shutil.disk_usage(self.root).free
        if free < size:
            problem = f"{free >> 20} MiB free at {self.root}, {size >> 20} MiB needed"
            raise StoreError(problem, op="put", key=key, hint="Free room or lower retention")

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _open(self, key: str) -> BinaryIO:
        """Open an object for reading: a regular file, at once.

        A pipe would keep its reader waiting for ever, a device has no end, a link may lead anywhere.

        Raises:
            Corrupt: anything else stands under that name.
        """
        path = self._path(key)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            if error.errno in _NO_FILE:
                raise Corrupt("not a regular file", op="get", key=key) from error
            raise
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISREG(mode):
            return os.fdopen(descriptor, "rb")
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise Corrupt("not a regular file", op="get", key=key)

    @staticmethod
    def _write_aside(path: Path, chunks: Iterable[bytes | memoryview]) -> Path:
        """Write chunks to a hidden file in the same directory and fsync it."""
        _make_directory(path.parent)
        aside = path.parent / f".{path.name}.{uuid.uuid4().hex}"
        try:
            with aside.open("xb") as file:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        return aside


def _now(folder: Path) -> float:
    """The file system's own clock, which on NFS is the server's."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime


def _unless_gone(error: OSError) -> None:
    """A directory that isn't there, or no longer, holds nothing; any other failure must not look like that."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _make_directory(path: Path) -> None:
    """Make a directory whose name survives a power failure, and its parents."""
    if not path.is_dir():
        _make_directory(path.parent)
        path.mkdir(exist_ok=True)
        _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _translated(op: str, key: str, call: Callable[[], Result]) -> Result:
    """Run a call, letting out only the store's errors."""
    try:
        return call()
    except FileNotFoundError as error:
        raise KeyMissing("no such object", op=op, key=key) from error
    except (IsADirectoryError, NotADirectoryError) as error:  # a key above or below an object's
        missing = KeyMissing("no such object", op=op, key=key)
        raise (missing if op == "get" else StoreError(str(error), op=op, key=key)) from error
    except PermissionError as error:
        raise StoreError(f"permission denied: {error.filename}", op=op, key=key, hint="Check owner and mode") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise StoreError(
                "no space left on the store", op=op, key=key, hint="Free room or lower retention"
            ) from error
        transient = error.errno in _TRANSIENT
        raise StoreError(f"{error.strerror or error}", op=op, key=key, retryable=transient) from error
