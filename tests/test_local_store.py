"""What a directory owes as a store beyond the common suite (test_store.py): its directories come, go and stay."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from syscalls import intercepted

from shared.errors import StoreError
from shared.local_store import LocalStore

HOUR_S = 3600.0


def aged(path: Path) -> Path:
    """Make a file or directory two hours old."""
    then = path.stat().st_mtime - 2 * HOUR_S
    os.utime(path, (then, then))
    return path


def aged_leftover(folder: Path) -> Path:
    """What a killed writer left there two hours ago."""
    path = folder / f".shard.{'0' * 32}"
    path.write_bytes(b"half")
    return aged(path)


def test_a_sweep_takes_old_leftovers_and_old_empty_directories_and_nothing_else(tmp_path: Path):
    store = LocalStore(str(tmp_path / "store"))
    for key in ("p/data/1/a/shard", "p/data/2/b/shard", "p/data/3/c/shard"):
        store.put(key, b"x")
    data = store.root / "p" / "data"
    for number in (1, 2):
        store.delete(f"p/data/{number}/{'ab'[number - 1]}/shard")
    aged(data / "1" / "a")
    aged(data / "3" / "c")
    young, old = data / "3" / "c" / f".shard.{'0' * 32}", data / "3" / f".shard.{'f' * 32}"
    young.write_bytes(b"half")
    old.write_bytes(b"half")
    aged(old)
    assert store.sweep("p", HOUR_S) == 1
    assert not (data / "1" / "a").exists()
    assert (data / "2" / "b").is_dir()  # emptied just now: somebody may be about to write there
    assert not old.exists()
    assert young.exists()
    assert [entry.key for entry in store.list("p")] == ["p/data/3/c/shard"]
    for path in (data / "1", data / "2" / "b"):
        aged(path)
    assert store.sweep("p", HOUR_S) == 0
    assert sorted(path.name for path in data.iterdir()) == ["2", "3"]
    assert list((data / "2").iterdir()) == []
    assert store.sweep("absent", HOUR_S) == 0


def test_other_peoples_hidden_files_and_directories_are_not_swept(tmp_path: Path):
    store = LocalStore(str(tmp_path / "store"))
    store.put("p/data/shard", b"x")
    names = ("data/.gitkeep", "data/.nfs0000000000a1b2", ".snapshot/hourly/data.bin", f".snapshot/.shard.{'0' * 32}")
    theirs = [store.root / "p" / name for name in names]
    for path in theirs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"theirs")
        aged(path)
    aged(store.root / "p" / ".snapshot" / "hourly")
    assert store.sweep("p", HOUR_S) == 0
    assert all(path.exists() for path in theirs)


def test_what_refuses_to_be_swept_is_said_and_keeps_nobody_from_the_rest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    store = LocalStore(str(tmp_path / "store"))
    store.put("p/data/1/shard", b"x")
    store.put("p/data/2/shard", b"x")
    left = [aged_leftover(store.root / "p" / "data" / number) for number in "12"]

    def busy_once(_name: str, call: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        if Path(args[0]) == left[0]:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return call()

    with intercepted(["unlink"], busy_once):
        assert store.sweep("p", HOUR_S) == 1
    assert [path.exists() for path in left] == [True, False]
    assert [str(left[0]) in record.getMessage() for record in caplog.records] == [True]
    assert store.sweep("p", HOUR_S) == 1


@pytest.mark.parametrize("write", ["put", "put_if_absent", "put_stream"])
def test_a_writer_whose_directory_was_swept_makes_it_again(tmp_path: Path, write: str):
    store, other = LocalStore(str(tmp_path / "store")), LocalStore(str(tmp_path / "store"))
    store.put("p/probes/1/now", b"x")
    store.delete("p/probes/1/now")
    for _ in range(3):
        other.sweep("p", older_than_s=0)
    assert not (store.root / "p" / "probes").exists()
    writes: dict[str, Callable[[], Any]] = {
        "put": lambda: store.put("p/probes/1/now", b"y"),
        "put_if_absent": lambda: store.put_if_absent("p/probes/1/now", b"y"),
        "put_stream": lambda: store.put_stream("p/probes/1/now", [b"y"], 1),
    }
    writes[write]()
    assert other.get("p/probes/1/now") == b"y"


def test_a_file_that_is_swept_away_under_its_writer_is_a_passing_fault_of_a_write(tmp_path: Path):
    store = LocalStore(str(tmp_path / "store"))

    def chunks() -> Any:
        yield b"half"
        store.sweep("p", older_than_s=0)
        yield b"rest"

    with pytest.raises(StoreError) as caught:
        store.put_stream("p/shard", chunks(), 8)
    assert caught.value.retryable and type(caught.value) is StoreError
    assert store.list("") == []


def test_directories_above_the_root_need_not_be_readable(tmp_path: Path):
    """/mnt of somebody else, mode 711: it was there before us, and its own name is none of our business."""
    root = tmp_path / "theirs" / "store"
    root.mkdir(parents=True)
    store, refused = LocalStore(str(root)), list[str]()

    def refuse(name: str, call: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        if args[1] & os.O_DIRECTORY and not Path(args[0]).is_relative_to(root):
            refused.append(os.fspath(args[0]))
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(args[0]))
        return call()

    with intercepted(["open"], refuse):
        store.put("a/b", b"x")
    assert {os.fspath(root.parent), os.fspath(tmp_path)} <= set(refused)
    assert store.get("a/b") == b"x"


def test_what_was_synced_once_is_not_synced_again_and_again(tmp_path: Path):
    store, synced = LocalStore(str(tmp_path / "store")), 0

    def count(name: str, call: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        nonlocal synced
        synced += 1
        return call()

    store.put("a/b/c", b"x")
    with intercepted(["fsync"], count):
        store.put("a/b/c", b"y")
        store.put("a/b/d", b"y")
    assert synced == 4  # each file, and its directory
