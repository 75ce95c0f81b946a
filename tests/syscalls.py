"""Puts a function around calls of the `os` module, by which the store's code reaches the disk.

pathlib, shutil, tempfile and `os.walk` look these names up when they are called, so they are caught as well; the C code
behind `open(path)` is not, and the store's code does not use it.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

CHANGING = ("write", "pwrite", "writev", "fsync", "fdatasync", "link", "replace", "rename", "unlink", "mkdir", "rmdir")
CHANGING += ("remove", "truncate", "ftruncate", "posix_fallocate")
READING = ("open", "close", "pread", "read", "stat", "lstat", "fstat", "scandir", "statvfs")

Around = Callable[[str, Callable[[], Any], tuple[Any, ...]], Any]


@contextlib.contextmanager
def intercepted(names: Iterable[str], around: Around) -> Iterator[None]:
    """While the block runs, os.<name>(*args) is around(name, call, args); `call()` does what was asked for."""
    originals = {name: getattr(os, name) for name in names}
    for name, original in originals.items():
        setattr(os, name, _wrapped(name, original, around))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


def _wrapped(name: str, original: Callable[..., Any], around: Around) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(name, lambda: original(*args, **kwargs), args)

    return wrapped


def creates(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a call is an `os.open` that may make a file."""
    return name == "open" and bool(args[1] & os.O_CREAT)
