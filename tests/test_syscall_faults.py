"""Every system call of the local store fails once: in every operation, in a whole publication, in a whole download.

Each fault is tried twice: instead of the call, and after it (its effect happened, its answer is an error: what a file
server does). Only our errors come out, they say what to do and whether it may pass, no half object is seen, nothing
else is lost, nothing hidden stays, and the same call works afterwards.
"""

import errno
import os
import random
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import synthetic
from memory_folder import memory_folder
from run_processes import wait_for
from syscalls import CHANGING, READING, SYNCING, intercepted

from publisher import publisher as publisher_module
from publisher.convert import convert
from shared.catalog import Catalog
from shared.errors import LorasyncError, StoreError
from shared.fetch import fetch, verify
from shared.local_store import LocalStore
from shared.versions import Version

SEED = int(os.environ.get("DISK_SEED", "20261123"))
REPLAY = f"replay: DISK_SEED={SEED} pytest {__file__}"
PASSING = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EINTR, errno.EMFILE)
LASTING = (errno.EROFS, errno.EACCES)
CALLS = (*CHANGING, *SYNCING, *READING)
OLD, NEW, BIG = b"old", b"new bytes", bytes(range(256)) * 300
DEADLINE_S = 60.0
CLEANUP = ("unlink", "rmdir")  # where these fail, what should have gone may stay until the next sweep


@pytest.fixture
def folder() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


@dataclass
class Fault:
    """Fails the `at`-th call (from 0) and counts all of them; `at` None fails none."""

    at: int | None = None
    number: int = 0
    after: bool = False
    calls: int = 0
    failed: str = ""

    @contextmanager
    def injected(self) -> Iterator[None]:
        with intercepted(CALLS, self._around):
            yield

    def _around(self, name: str, call: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        position, self.calls = self.calls, self.calls + 1
        if position != self.at:
            return call()
        self.failed = name
        if self.after or name == "close":  # close lets its descriptor go whatever it answers
            result = call()
            if name == "open":
                os.close(result)
            elif name in ("scandir", "io.open"):
                result.close()
        raise OSError(self.number, os.strerror(self.number))

    def __str__(self) -> str:
        when = "after" if self.after else "instead of"
        return f"{errno.errorcode[self.number]} {when} os.{self.failed}, call {self.at}; {REPLAY}"


@dataclass(frozen=True)
class Operation:
    """One operation on the store of `prepared`, and what stands under `a/1` before and after it."""

    run: Callable[[LocalStore], Any]
    answer: Any
    after: bytes | None = OLD


def _sweep(store: LocalStore) -> None:
    store.sweep("a", older_than_s=0)


OPERATIONS = {
    "get": Operation(lambda store: store.get("a/1"), OLD),
    "get_range": Operation(lambda store: store.get_range("a/1", 1, 3), b"ld"),
    "get_if_changed": Operation(lambda store: store.get_if_changed("a/1", "").content, OLD),  # type: ignore[union-attr]
    "put": Operation(lambda store: store.put("a/1", NEW), None, NEW),
    "put in a new directory": Operation(lambda store: store.put("b/c/1", NEW), None),
    "put_if_absent, absent": Operation(lambda store: store.put_if_absent("a/3/4", NEW), True),
    "put_if_absent, taken": Operation(lambda store: store.put_if_absent("a/1", NEW), False),
    "put_if_absent, ours": Operation(lambda store: store.put_if_absent("a/1", OLD), True),
    "put_stream": Operation(lambda store: store.put_stream("a/1", [BIG, NEW], len(BIG + NEW)), None, BIG + NEW),
    "list": Operation(lambda store: [entry.key for entry in store.list("a")], ["a/1", "a/2"]),
    "delete": Operation(lambda store: store.delete("a/1"), None, None),
    "sweep": Operation(_sweep, None),
}


def prepared(folder: Path) -> LocalStore:
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "1").write_bytes(OLD)
    (folder / "a" / "2").write_bytes(BIG)
    return LocalStore(str(folder))  # knows no directory yet: all its calls are made


def held(store: LocalStore, key: str) -> bytes | None:
    path = store.root / key
    return path.read_bytes() if path.exists() else None


def hidden(store: LocalStore) -> list[Path]:
    return list(store.root.rglob(".*"))


def faults(operation: Callable[[Fault], None], numbers: tuple[int, ...]) -> Iterator[Fault]:
    """Every call of an operation, failing in every way."""
    counted = Fault()
    operation(counted)
    assert counted.calls > 0
    for at in range(counted.calls):
        for number in numbers:
            for after in (False, True):
                yield Fault(at, number, after)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_fault_at_any_call_of_an_operation_is_told_leaves_nothing_and_may_be_tried_again(name: str, folder: Path):
    operation, count = OPERATIONS[name], 0

    def fresh() -> LocalStore:
        nonlocal count
        count += 1
        store = prepared(folder / str(count))
        if name == "sweep":
            (store.root / "a" / f".1.{'0' * 32}").write_bytes(b"half")
            (store.root / "a" / "empty").mkdir()
        return store

    def once(fault: Fault) -> None:
        store = fresh()
        with fault.injected():
            operation.run(store)

    for fault in faults(once, (*PASSING, *LASTING)):
        store = fresh()
        try:
            with fault.injected():
                assert operation.run(store) == operation.answer, f"{fault}"
        except StoreError as error:
            assert error.op and error.key and error.hint, f"{fault}: {error!r}"
            assert error.retryable == (fault.number in PASSING), f"{fault}: {error!r}"
        except BaseException as error:
            raise AssertionError(f"{fault}: {error!r} came out") from error
        assert held(store, "a/1") in (OLD, operation.after), f"{fault}"
        assert held(store, "a/2") == BIG, f"{fault}"
        if name != "sweep" and fault.failed not in CLEANUP:
            assert not hidden(store), f"{fault}"
        assert operation.run(store) == operation.answer, f"{fault}"  # the same call, a moment later
        assert held(store, "a/1") == operation.after, f"{fault}"
        store.sweep("a", older_than_s=0)
        store.sweep("b", older_than_s=0)
        assert not hidden(store), f"{fault}"
        shutil.rmtree(store.root)


@pytest.mark.parametrize("name", OPERATIONS)
def test_calls_that_take_or_give_less_than_asked_for_change_no_result(name: str, tmp_path: Path):
    store, rng = prepared(tmp_path / "store"), random.Random(SEED)
    write, pread = os.write, os.pread

    def short(name: str, call: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        if name == "write":
            return write(args[0], args[1][: rng.randint(1, len(args[1]))])
        return pread(args[0], min(args[1], rng.randint(1, 5000)), args[2])

    with intercepted(("write", "pread"), short):
        assert OPERATIONS[name].run(store) == OPERATIONS[name].answer, REPLAY
        assert store.get("a/2") == BIG, REPLAY
        assert store.get_range("a/2", 100, 70_000) == BIG[100:70_000], REPLAY
    assert held(store, "a/1") == OPERATIONS[name].after


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write_base(tmp_path_factory.mktemp("base"))


def publish_one(store: LocalStore, base: Path, fault: Fault) -> None:
    """One version, in a new epoch, through the publisher's own thread."""
    publisher = synthetic.open_publisher(store, base)
    try:
        with fault.injected():
            publisher.submit(0, convert(synthetic.BASE, synthetic.factors(0)), training={})
            publisher.close()
    finally:
        publisher.close(abandon=True)


def demand_whole(store: LocalStore, version: Version, scratch: Path, why: object) -> None:
    """Check that a version is the latest, and that each one reads back."""
    catalog = Catalog(store, synthetic.ADAPTER)
    assert catalog.newest() == version, f"{why}"
    scratch.mkdir()
    verify(store, catalog.manifest(version), synthetic.EXPECTED)


def test_a_publication_outlasts_a_passing_fault_at_any_call_and_ends_at_a_lasting_one(
    base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(publisher_module, "RETRY_WAIT_S", 0.0)
    template = LocalStore(str(folder / "template"))
    synthetic.publish(template, base)
    counted = Fault()
    publish_one(LocalStore(str(shutil.copytree(template.root, folder / "counted"))), base, counted)
    rng = random.Random(SEED)
    writes_seen = 0
    for at in range(counted.calls):
        fault = Fault(at, rng.choice((*PASSING, errno.EROFS)), rng.random() < 0.5)
        store = LocalStore(str(shutil.copytree(template.root, folder / str(at))))
        try:
            publish_one(store, base, fault)
        except LorasyncError as error:
            assert isinstance(error, StoreError) and not error.retryable and error.hint, f"{fault}: {error!r}"
            assert fault.number == errno.EROFS, f"{fault}: {error!r}"
        else:
            demand_whole(store, Version(2, 0), folder / f"scratch-{at}", fault)
        writes_seen += fault.failed == "write"
        there = Catalog(store, synthetic.ADAPTER).versions()
        assert Version(1, 0) in there, f"{fault}"
        if fault.failed not in CLEANUP:
            assert not hidden(store), f"{fault}"
        if fault.number == errno.EROFS:
            synthetic.publish(store, base)
            demand_whole(store, Version(3, 0), folder / f"again-{at}", fault)
        shutil.rmtree(store.root)
    assert writes_seen >= 5  # shard, configuration, record, manifest, hint


def test_a_download_that_fails_at_any_call_is_whole_or_not_there_and_the_next_one_is_whole(base: Path, folder: Path):
    store = LocalStore(str(folder / "store"))
    [manifest] = synthetic.publish(store, base)

    def download(out: Path, fault: Fault) -> None:
        with fault.injected():
            fetch(store, manifest, synthetic.EXPECTED, out, base_name="base")

    counted, whole = Fault(), folder / "whole"
    download(whole, counted)
    files = {path.name: path.read_bytes() for path in whole.iterdir()}
    rng = random.Random(SEED)
    failed = set[str]()
    for at in range(counted.calls):
        out = folder / str(at) / "out"
        fault = Fault(at, rng.choice((*PASSING, *LASTING)), rng.random() < 0.5)
        try:
            download(out, fault)
        except StoreError as error:
            assert error.op and error.key and error.hint, f"{fault}: {error!r}"
            assert error.retryable == (fault.number in PASSING), f"{fault}: {error!r}"
        except BaseException as error:
            raise AssertionError(f"{fault}: {error!r} came out") from error
        failed.add(fault.failed)
        for _ in range(2):
            assert not out.exists() or {path.name: path.read_bytes() for path in out.iterdir()} == files, f"{fault}"
            download(out, Fault())
        assert [path.name for path in out.parent.iterdir()] == ["out"], f"{fault}"
        shutil.rmtree(out.parent)
    assert {"io.open", "open", "pread", "pwrite", "rename", "mkdir"} <= failed


def test_a_process_that_may_open_no_more_files_is_told_so_and_goes_on_when_it_may(tmp_path: Path):
    store = prepared(tmp_path / "store")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        for run in (lambda: store.get("a/1"), lambda: store.put("a/1", NEW), lambda: store.list("a")):
            with pytest.raises(StoreError, match="ulimit -n") as caught:
                run()
            assert caught.value.retryable
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert store.get("a/1") == OLD
    assert not hidden(store)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 512 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "lorasync-test", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full_holds_versions_back_until_somebody_frees_room(
    small_disk: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(publisher_module, "RETRY_WAIT_S", 0.05)
    store = LocalStore(str(small_disk / "store"))
    synthetic.publish(store, base)
    publisher = synthetic.open_publisher(store, base)
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))
    with pytest.raises(StoreError, match="Free room") as caught:
        store.put("policy/large", bytes(100_000))  # without asking for room first: the disk itself says it
    assert caught.value.retryable
    assert not hidden(store)
    publisher.submit(0, convert(synthetic.BASE, synthetic.factors(0)), training={})
    wait_for(lambda: publisher.store_failures >= 3, DEADLINE_S)
    assert Catalog(store, synthetic.ADAPTER).newest() == Version(1, 0)
    filler.unlink()
    publisher.close()
    demand_whole(store, Version(2, 0), tmp_path / "scratch", "full disk")
    assert not hidden(store)
