"""A disk that remembers every change below a directory, and shows what may be left of them when the power goes.

Between two fsyncs anything may be lost, each thing for itself: of a file's bytes the whole tail, part of it, or its
values (zeros of the right length); of a directory's names any of those made, replaced or removed. An fsync of a file
keeps its bytes and not its name; an fsync of a directory keeps its names and not its own name in its parent.

    disk = RecordedDisk(folder)
    with disk.recording():
        ...                                       # real code, on the real folder
        disk.tell("an acknowledgement")
    for state in disk.states(random.Random(seed), draws=4):
        state.write_to(other_folder)              # and read there what survived
"""

import contextlib
import itertools
import os
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from syscalls import CHANGING, SYNCING, creates, intercepted

KEPT_BY = {"file", "directory"}
NAMING = ("mkdir", "link", "replace", "rename", "unlink", "remove", "rmdir")


@dataclass(frozen=True)
class Change:
    """One thing done to the disk. `node` is the file or directory that was changed or synced."""

    kind: str  # "write", "sync", "name", "unname", or "tell"
    node: int = 0
    name: str = ""
    target: int = 0  # of "name"
    content: bytes = b""
    told: Any = None


@dataclass(frozen=True)
class State:
    """What a disk may hold when the power went after `changes` changes; `told` had been said by then."""

    files: dict[str, bytes]
    folders: list[str]
    told: list[Any]
    changes: int
    draw: str

    def write_to(self, folder: Path) -> None:
        """Make it real. The folder must be empty."""
        for name in self.folders:
            (folder / name).mkdir()
        for name, content in self.files.items():
            (folder / name).write_bytes(content)

    def __hash__(self) -> int:
        return hash((tuple(sorted(self.files.items())), tuple(sorted(self.folders)), len(self.told)))


@dataclass
class _Left:
    """What is certain after some changes, and what is not."""

    kept: dict[int, bytes] = field(default_factory=dict)
    tails: dict[int, bytes] = field(default_factory=dict)  # of files, since their last fsync
    names: dict[int, dict[str, int]] = field(default_factory=dict)
    pending: dict[int, list[Change]] = field(default_factory=dict)  # of directories, since theirs
    told: list[Any] = field(default_factory=list)


class RecordedDisk:
    """See the module.

    Args:
        folder: exists and is durable; what is above it is not recorded.
        keeps: what an fsync keeps; a disk that lies keeps less than {"file", "directory"}.
    """

    def __init__(self, folder: Path, keeps: set[str] = KEPT_BY) -> None:
        self._folder, self._keeps = str(folder), keeps
        self._changes: list[Change] = []
        self._nodes, self._files = {self._folder: 0}, set[int]()  # by path, as the running code sees it
        self._open: dict[int, int] = {}  # descriptor -> node
        self._numbers = itertools.count(1)
        self._lock = threading.RLock()
        self.before: Callable[[str, tuple[Any, ...]], None] = lambda name, args: None

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record what the block does, in this process."""
        with intercepted((*CHANGING, *SYNCING, "open", "close"), self._around):
            yield

    def tell(self, what: Any) -> None:
        """Note that something was promised at this point."""
        with self._lock:
            self._changes.append(Change("tell", told=what))

    @property
    def count(self) -> int:
        """Changes so far."""
        return len(self._changes)

    def states(self, rng: random.Random, draws: int) -> Iterator[State]:
        """After every change: all that was not synced is lost, none of it is, and `draws` draws in between.

        States that are alike are yielded once.
        """
        seen, left = set[int](), _Left()
        for count in range(self.count + 1):
            if count:
                self._apply(self._changes[count - 1], left)
            for draw in ("all lost", "none lost", *(f"draw {number}" for number in range(draws))):
                state = self._state(left, count, draw, rng)
                if hash(state) not in seen:
                    seen.add(hash(state))
                    yield state

    def _around(self, name: str, call: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        with self._lock:
            self.before(name, args)
            made = creates(name, args) and not os.path.lexists(args[0])
            result = call()
            if name == "open":
                self._opened(result, os.fspath(args[0]), made)
            elif name == "close":
                self._open.pop(args[0], None)
            elif name == "write" or name in SYNCING:
                if (node := self._open.get(args[0])) is not None:
                    content = bytes(args[1])[:result] if name == "write" else b""
                    self._changes.append(Change("write" if name == "write" else "sync", node, content=content))
            elif name in NAMING:
                self._named(name, [os.fspath(path) for path in args[:2] if isinstance(path, str | Path)])
            else:
                raise NotImplementedError(f"os.{name} is not recorded")
            return result

    def _opened(self, descriptor: int, path: str, made: bool) -> None:
        if made and self._within(path):
            self._name(path, next(self._numbers))
            self._files.add(self._nodes[path])
        if path in self._nodes:
            self._open[descriptor] = self._nodes[path]

    def _named(self, name: str, paths: list[str]) -> None:
        if not self._within(paths[-1]):
            return
        if name == "mkdir":
            self._name(paths[0], next(self._numbers))
        elif name == "link":
            self._name(paths[1], self._nodes[paths[0]])
        elif name in ("replace", "rename"):
            self._name(paths[1], self._nodes[paths[0]])
            self._unname(paths[0])
        else:
            self._unname(paths[0])

    def _within(self, path: str) -> bool:
        return path.startswith(f"{self._folder}/")

    def _name(self, path: str, node: int) -> None:
        parent, _, name = path.rpartition("/")
        self._nodes[path] = node
        self._changes.append(Change("name", self._nodes[parent], name, node))

    def _unname(self, path: str) -> None:
        parent, _, name = path.rpartition("/")
        del self._nodes[path]
        self._changes.append(Change("unname", self._nodes[parent], name))

    def _apply(self, change: Change, left: "_Left") -> None:
        node = change.node
        if change.kind == "tell":
            left.told.append(change.told)
        elif change.kind == "write":
            left.tails[node] = left.tails.get(node, b"") + change.content
        elif change.kind in ("name", "unname"):
            left.pending.setdefault(node, []).append(change)
        elif node in self._files and "file" in self._keeps:
            left.kept[node] = left.kept.get(node, b"") + left.tails.pop(node, b"")
        elif node not in self._files and "directory" in self._keeps:
            _name_all(left.names.setdefault(node, {}), left.pending.pop(node, []))

    def _state(self, left: "_Left", count: int, draw: str, rng: random.Random) -> State:
        """Draw what survives of what was not synced."""
        kept, names = dict(left.kept), dict(left.names)
        for node, tail in sorted(left.tails.items()):
            kept[node] = kept.get(node, b"") + _survivor(tail, draw, rng)
        for node, changes in sorted(left.pending.items()):
            names[node] = dict(names.get(node, {}))
            _name_all(names[node], [change for change in changes if _survives(draw, rng)])
        files: dict[str, bytes] = {}
        folders: list[str] = []
        self._walk(0, "", names, kept, files, folders)
        return State(files, folders, list(left.told), count, draw)

    def _walk(
        self,
        folder: int,
        prefix: str,
        names: dict[int, dict[str, int]],
        kept: dict[int, bytes],
        files: dict[str, bytes],
        folders: list[str],
    ) -> None:
        for name, node in names.get(folder, {}).items():
            if node in self._files:
                files[prefix + name] = kept.get(node, b"")
            else:
                folders.append(prefix + name)
                self._walk(node, f"{prefix}{name}/", names, kept, files, folders)


def _name_all(names: dict[str, int], changes: list[Change]) -> None:
    for change in changes:
        if change.kind == "name":
            names[change.name] = change.target
        else:
            names.pop(change.name, None)


def _survives(draw: str, rng: random.Random) -> bool:
    return draw == "none lost" or (draw != "all lost" and rng.random() < 0.5)


def _survivor(tail: bytes, draw: str, rng: random.Random) -> bytes:
    if draw in ("all lost", "none lost"):
        return tail if draw == "none lost" else b""
    return rng.choice([b"", tail, tail[: rng.randrange(len(tail) + 1)], bytes(len(tail))])
