"""Puts a function around calls of the `os` module, by which the store's code reaches the disk.

pathlib, shutil, tempfile and `os.walk` look these names up when they are called, so they are caught as well; the C code
behind a file object is not: of those, "io.open" catches the opening by pathlib.
"""

import contextlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

CHANGING = ("write", "pwrite", "writev", "truncate", "ftruncate", "posix_fallocate")
CHANGING += ("mkdir", "link", "replace", "rename", "unlink", "remove", "rmdir")
SYNCING = ("fsync", "fdatasync")
READING = ("io.open", "open", "close", "pread", "read", "stat", "lstat", "fstat", "scandir", "statvfs")

Around = Callable[[str, Callable[[], Any], tuple[Any, ...]], Any]


@contextlib.contextmanager
def intercepted(names: Iterable[str], around: Around) -> Iterator[None]:
    """While the block runs, os.<name>(*args) is around(name, call, args); `call()` does what was asked for."""
    with contextlib.ExitStack() as stack:
        for name in names:
            module, attribute = (io, "open") if name == "io.open" else (os, name)
            original = getattr(module, attribute)
            setattr(module, attribute, _wrapped(name, original, around))
            stack.callback(setattr, module, attribute, original)
        yield


def _wrapped(name: str, original: Callable[..., Any], around: Around) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(name, lambda: original(*args, **kwargs), args)

    return wrapped


def creates(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a call is an `os.open` that may make a file."""
    return name == "open" and bool(args[1] & os.O_CREAT)
