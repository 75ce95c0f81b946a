"""A hidden place in which one process builds what shall stand beside it; a later life goes on where it was.

    .NAME.HEX/content     what is built; renamed to NAME when it is finished
    .NAME.HEX/lock        dies with its holder, and keeps two processes out of the place
    .NAME.HEX/replaced-N  what had the name until then

HEX is made of what it will become, so who comes after a kill finds it. Who finds it locked builds in a place of a
random name instead, and waits for nobody. The lock does not move with what is built, and is the last thing that goes:
whoever removes or renames something in the place holds it.
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from shared.errors import StoreError

NAME_LENGTH = 16  # hex digits
_CONTENT, _LOCK = "content", "lock"
_TRIES = 100
_TAKEN = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}


@contextlib.contextmanager
def partial_directory(directory: Path, name: str) -> Iterator[Path]:
    """A directory near `directory` that is this process's alone while the block runs.

    Leftovers beside `directory` that nobody holds are removed; what stands in ours is kept, also when the block fails:
    remove it where it is of no more use.

    Args:
        name: a digest (hex) of what is built; the same one finds it again.

    Raises:
        OSError: the disk.
        StoreError: the place vanished again and again.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    place, lock = _own(directory, name[:NAME_LENGTH])
    kept = place == _beside(directory, name[:NAME_LENGTH])
    content = place / _CONTENT
    try:
        remove_leftovers(directory)
        _remove_strangers(place)
        yield content
    finally:
        if not kept or not content.exists():
            _remove(place)
        os.close(lock)


def put_in_place(content: Path, directory: Path, *, is_whole: Callable[[], bool]) -> None:
    """Give a finished directory its name, unless another process was faster.

    Args:
        is_whole: whether `directory` is as it shall be. One that is not is moved away at once, so nobody sees it half
            removed.

    Raises:
        OSError: the disk; or others took the name again and again.
    """
    for number in range(_TRIES):
        try:
            content.rename(directory)
            return
        except OSError as error:
            if error.errno not in _TAKEN or number == _TRIES - 1:
                raise
        if is_whole():
            shutil.rmtree(content)
            return
        with contextlib.suppress(FileNotFoundError):
            directory.rename(content.with_name(f"replaced-{number}"))


def remove_leftovers(directory: Path) -> None:
    """Remove what killed processes left beside `directory`, unless a builder lives; what cannot be removed stays."""
    ours = re.compile(re.escape(_beside(directory, "").name) + rf"[0-9a-f]{{{NAME_LENGTH}}}")
    with contextlib.suppress(OSError):
        for place in list(directory.parent.iterdir()):
            if ours.fullmatch(place.name):
                _remove_unused(place)


def _beside(directory: Path, name: str) -> Path:
    return directory.parent / f".{directory.name}.{name}"


def _own(directory: Path, name: str) -> tuple[Path, int]:
    """A place and its lock: of that name, or of a random one."""
    for _ in range(_TRIES):  # who removes leftovers holds each for a moment
        place = _beside(directory, name)
        lock = _locked(place)
        if lock is not None:
            return place, lock
        name = uuid.uuid4().hex[:NAME_LENGTH]
    raise StoreError(f"found locked {_TRIES} times", op="fetch", key=str(place))


def _locked(place: Path) -> int | None:
    """Lock a place, making it if need be: the lock's descriptor, or None if another process holds it."""
    for _ in range(_TRIES):
        _clear(place)
        place.mkdir(exist_ok=True)
        try:
            lock = _open(place)
        except FileNotFoundError:  # removed in between by who took it for a leftover
            continue
        try:
            if _take(place, lock):
                return lock
        except BaseException:
            os.close(lock)  # an open one would keep the next try out
            raise
        os.close(lock)
        if (place / _LOCK).exists():
            return None
    raise StoreError(f"vanished {_TRIES} times", op="fetch", key=str(place))


def _open(place: Path) -> int:
    return os.open(place / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)


def _take(place: Path, lock: int) -> bool:
    """Whether the lock is ours, and still the one that stands there: its holder may have removed the place."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(lock).st_ino == (place / _LOCK).stat().st_ino
    except (BlockingIOError, FileNotFoundError):
        return False


def _clear(path: Path) -> None:
    """Remove what stands where a directory shall: a link would lead elsewhere."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        path.unlink(missing_ok=True)


def _remove_strangers(place: Path) -> None:
    """Remove what no builder leaves: a link would be written through, to wherever it leads; a pipe never ends."""
    content = place / _CONTENT
    _clear(content)
    content.mkdir(exist_ok=True)
    for path in place.iterdir():
        if path.name not in (_CONTENT, _LOCK):
            _remove_any(path)
    for path in content.iterdir():
        if path.is_symlink() or not path.is_file():
            _remove_any(path)


def _remove_unused(place: Path) -> None:
    """Remove what a killed process left, unless its builder lives."""
    with contextlib.suppress(OSError):
        _clear(place)
        lock = _open(place)
        try:
            if _take(place, lock):
                _remove(place)
        finally:
            os.close(lock)


def _remove(place: Path) -> None:
    """Remove a place whose lock is ours: the lock after all else, for then the next one may come."""
    with contextlib.suppress(OSError):  # another one's from here on, or what is left is removed by the next
        for path in place.iterdir():
            if path.name != _LOCK:
                _remove_any(path)
        (place / _LOCK).unlink()
        place.rmdir()


def _remove_any(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
