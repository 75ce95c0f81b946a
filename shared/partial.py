"""A hidden directory in which one process builds what shall stand beside it; a later life goes on where it was.

Its name is made of what it will become, so who comes after a kill finds it; a lock that dies with its holder keeps two
processes out of it. Who finds it locked builds in one of a random name instead, and waits for nobody.
"""

import contextlib
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from shared.errors import StoreError

NAME_LENGTH = 16  # hex digits
_LOCK = "lock"
_TRIES = 100


@contextlib.contextmanager
def partial_directory(directory: Path, name: str) -> Iterator[Path]:
    """A directory beside `directory` that is this process's alone while the block runs.

    Leftovers beside `directory` that nobody holds are removed; what stands in ours is kept, also when the block fails:
    remove it where it is of no more use.

    Args:
        name: a digest (hex) of what is built; the same one finds it again.

    Raises:
        OSError: the disk.
        StoreError: the directory vanished again and again.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    aside = _beside(directory, name[:NAME_LENGTH])
    lock = _locked(aside)
    again = lock is not None
    if lock is None:
        aside = _beside(directory, uuid.uuid4().hex[:NAME_LENGTH])
        lock = _locked(aside)
    if lock is None:
        raise StoreError("could not be locked", op="fetch", key=str(aside))
    try:
        _remove_strangers(aside)
        ours = re.compile(re.escape(_beside(directory, "").name) + rf"[0-9a-f]{{{NAME_LENGTH}}}")
        for other in directory.parent.iterdir():
            if other != aside and ours.fullmatch(other.name):
                _remove_unused(other)
        yield aside
    finally:
        if not again:
            shutil.rmtree(aside, ignore_errors=True)
        os.close(lock)


def put_in_place(aside: Path, directory: Path) -> None:
    """Give a finished directory its name.

    Raises:
        OSError: another one has that name.
    """
    (aside / _LOCK).unlink()
    aside.rename(directory)


def _beside(directory: Path, name: str) -> Path:
    return directory.parent / f".{directory.name}.{name}"


def _locked(aside: Path) -> int | None:
    """Lock a directory, making it if need be: the lock's descriptor, or None if another process holds it."""
    for _ in range(_TRIES):
        if aside.is_symlink():
            aside.unlink(missing_ok=True)
        aside.mkdir(exist_ok=True)
        try:
            lock = os.open(aside / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # removed in between by who took it for a leftover
            continue
        try:
            if _take(aside, lock):
                return lock
        except BaseException:
            os.close(lock)  # an open one would keep the next try out
            raise
        os.close(lock)
        if (aside / _LOCK).exists():
            return None
    raise StoreError(f"vanished {_TRIES} times", op="fetch", key=str(aside))


def _take(aside: Path, lock: int) -> bool:
    """Whether the lock is ours, and still the one that stands there: its holder may have put the directory in place."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(lock).st_ino == (aside / _LOCK).stat().st_ino
    except (BlockingIOError, FileNotFoundError):
        return False


def _remove_strangers(aside: Path) -> None:
    """Remove what no builder leaves: a link would be written through, to wherever it leads; a pipe never ends."""
    for path in aside.iterdir():
        if path.is_symlink() or not path.is_file():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _remove_unused(other: Path) -> None:
    """Remove what a killed process left, unless its builder lives."""
    with contextlib.suppress(OSError):
        lock = os.open(other / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            if _take(other, lock):
                shutil.rmtree(other, ignore_errors=True)
        finally:
            os.close(lock)
