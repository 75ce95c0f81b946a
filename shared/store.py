"""A store is a URL under which small objects are written at most once and large ones are written whole.

Promises, for every scheme: `put_if_absent` has one winner; a reader never sees part of an object; a write that
returned is durable; `list` sees every earlier write. `shared.stores.probe` tests them at start.
Does not: lock, rename, watch (readers poll), keep anything but bytes.

Keys are relative, `/`-separated, and checked: a key can't leave the store.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from shared.errors import Corrupt, StoreError, UsageError

MAX_KEY_LENGTH = 512  # characters
MAX_EXCLUSIVE_BYTES = 100_000_000  # of one conditional request; a multipart create has many winners on some servers

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@\-]*(/[A-Za-z0-9][A-Za-z0-9_.@\-]*)*")


@dataclass(frozen=True)
class Entry:
    """One listed object."""

    key: str
    size: int  # bytes
    modified: float  # when it was written, in Unix seconds of the store's own clock


@dataclass(frozen=True)
class Fetched:
    """An object's bytes and the tag under which a later read may ask whether it changed."""

    content: bytes
    tag: str


class Store(Protocol):
    """What every scheme offers.

    All methods raise StoreError (KeyMissing for an absent key), UsageError for what `check_key` refuses, and nothing
    else but what their own lines say.
    """

    url: str

    def get(self, key: str, max_bytes: int | None = None) -> bytes:
        """The whole object.

        Raises:
            Corrupt: it has more than `max_bytes`; its bytes were not read.
        """
        ...

    def get_range(self, key: str, start: int, end: int) -> bytes:
        """Bytes `start` to `end` (exclusive) of the object; fewer where it ends before."""
        ...

    def get_if_changed(self, key: str, tag: str, max_bytes: int | None = None) -> Fetched | None:
        """The object if its tag is another than `tag`, else None.

        One request on S3; elsewhere one that asks for the tag, and one for the bytes if it changed.

        Raises:
            Corrupt: it has more than `max_bytes`; its bytes were not read.
        """
        ...

    def put(self, key: str, content: bytes) -> None:
        """Write or overwrite, whole and durable."""
        ...

    def put_if_absent(self, key: str, content: bytes) -> bool:
        """Write only if the key is absent.

        Returns:
            True if the object now holds `content` (written now, or by an earlier try whose answer was lost);
            False if another's bytes stand there.

        Raises:
            StoreError: `content` has more than MAX_EXCLUSIVE_BYTES.
        """
        ...

    def put_stream(self, key: str, chunks: Iterable[bytes | memoryview], size: int) -> None:
        """Write a large object under a name that is never reused.

        Args:
            chunks: `size` bytes in all; read once, in order. An error out of them passes as it is.

        Raises:
            StoreError: the chunks made another size, or the store failed; nothing stands under the key.
        """
        ...

    def list(self, prefix: str, after: str = "") -> list[Entry]:
        """Every object below `prefix/` (empty: of the whole store), in key order, read afresh.

        Args:
            after: a key; only those that sort after it.
        """
        ...

    def delete(self, key: str) -> None:
        """Remove the object; removing an absent one is no error."""
        ...

    def sweep(self, prefix: str, older_than_s: float) -> int:
        """Remove what killed writers left unfinished below `prefix/` (hidden files, multipart uploads).

        Stores where an unfinished write leaves nothing, or which remove it by themselves, have nothing to do.

        Args:
            older_than_s: by the store's own clock; younger ones may still be written.

        Returns:
            How many were removed.
        """
        ...


def is_key(key: str) -> bool:
    """Whether this is a key that `check_key` lets pass. A listing may hold others: what somebody else put there."""
    return len(key) <= MAX_KEY_LENGTH and _KEY.fullmatch(key) is not None


def check_key(key: str) -> str:
    """Return the key if it is safe to join to the store's root.

    Raises:
        UsageError: absolute, empty, with `..` or characters outside [A-Za-z0-9_.@-/].
    """
    if not is_key(key):
        raise UsageError(f"not a key of the store: {key[:80]!r}", op="check key")
    return key


def exactly(chunks: Iterable[bytes | memoryview], size: int, key: str) -> Iterator[memoryview]:
    """The chunks as flat views of bytes, provided that they make `size` bytes in all.

    Raises:
        StoreError: they are too many, seen before the last is yielded, or too few, seen at the end.
    """
    made = 0
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        made += len(view)
        if made > size:
            break
        yield view
    if made != size:
        said = f"at least {made}" if made > size else str(made)
        raise StoreError(f"the chunks made {said} bytes, not {size}", op="put", key=key)


def demand_exclusive_size(content: bytes, key: str) -> None:
    """Check that an object may be written by `put_if_absent`.

    Raises:
        StoreError: it is too large.
    """
    if len(content) > MAX_EXCLUSIVE_BYTES:
        problem = f"{len(content)} bytes, more than the {MAX_EXCLUSIVE_BYTES} of one conditional request"
        raise StoreError(problem, op="put if absent", key=key)


def is_ours(read: Callable[[int], bytes], content: bytes, key: str) -> bool:
    """Whether `content` stands under a name that was refused as taken: an earlier try wrote it, its answer was lost.

    Args:
        read: the object, of at most so many bytes; raises Corrupt if it has more.

    Raises:
        StoreError: nothing stands there. Two writes met, or somebody deleted it: try again.
    """
    try:
        return read(len(content)) == content
    except Corrupt:
        return False
    except FileNotFoundError as error:
        problem = "refused as existing, and nothing is there"
        raise StoreError(problem, op="put if absent", key=key, retryable=True) from error
