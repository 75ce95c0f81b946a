"""One suite for every store of tests/store_openers.py. Then what each refuses, and how. S3's own: test_store_s3.py."""

import array
import contextlib
import sys
import threading
import time
import tracemalloc
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
import store_openers
from fsspec.implementations.memory import MemoryFileSystem
from store_openers import Opener

from shared.errors import Corrupt, KeyMissing, StoreError, StoreUnfit, UsageError
from shared.local_store import LocalStore
from shared.store import Store
from shared.stores import open_store, probe

WRITERS = 8
ROUNDS = 8
THEIRS_BYTES = 24 << 20


@pytest.fixture(params=store_openers.STORES)
def opener(request: pytest.FixtureRequest, tmp_path: Path) -> Opener:
    """Opens the same empty store again and again, as several processes would."""
    return store_openers.opened(request.param, request, tmp_path)


@pytest.fixture
def store(opener: Opener) -> Store:
    return opener()


def test_the_probe_passes_and_leaves_nothing_behind(store: Store):
    probe(store, "policy/probes")
    assert store.list("policy") == []


def test_an_exclusive_write_has_one_winner_among_racing_writers(opener: Opener):
    stores = [opener() for _ in range(WRITERS)]
    with ThreadPoolExecutor(WRITERS) as pool:
        for number in range(ROUNDS):
            key, start = f"race/{number}", threading.Barrier(WRITERS)

            def write(writer: int, key: str = key, start: threading.Barrier = start) -> bool:
                start.wait()
                return stores[writer].put_if_absent(key, b"writer %d" % writer)

            won = list(pool.map(write, range(WRITERS)))
            assert sum(won) == 1
            assert stores[0].get(key) == b"writer %d" % won.index(True)


def test_an_exclusive_write_of_the_same_bytes_succeeds_and_of_others_does_not(store: Store):
    assert store.put_if_absent("a/b", b"mine")
    assert store.put_if_absent("a/b", b"mine")
    assert not store.put_if_absent("a/b", b"yours")
    assert store.get("a/b") == b"mine"


def test_an_exclusive_write_does_not_read_what_is_larger_than_its_own(store: Store):
    store.put_stream("a/b", [bytes(THEIRS_BYTES)], THEIRS_BYTES)
    tracemalloc.start()
    try:
        assert not store.put_if_absent("a/b", b"mine")
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < THEIRS_BYTES // 2


def test_put_overwrites_and_readers_see_one_whole_object_or_the_other(opener: Opener):
    store, done = opener(), threading.Event()
    contents = [bytes([value]) * 100_000 for value in (1, 2)]
    store.put("hint", contents[0])
    seen: set[bytes] = set()

    def read() -> None:
        reader = opener()
        while not done.is_set():
            seen.add(reader.get("hint"))

    thread = threading.Thread(target=read)
    thread.start()
    for number in range(20):
        store.put("hint", contents[number % 2])
    done.set()
    thread.join()
    assert seen <= set(contents)
    assert store.get("hint") == contents[1]


def test_a_conditional_read_gives_nothing_until_the_object_changes(opener: Opener):
    store, reader = opener(), opener()
    with pytest.raises(KeyMissing):
        reader.get_if_changed("policy/LATEST", "")
    store.put("policy/LATEST", b"one")
    first = reader.get_if_changed("policy/LATEST", "")
    assert first is not None and first.content == b"one"
    assert reader.get_if_changed("policy/LATEST", first.tag) is None
    store.put("policy/LATEST", b"two")
    second = reader.get_if_changed("policy/LATEST", first.tag)
    assert second is not None and second.content == b"two" and second.tag != first.tag


def test_an_object_larger_than_its_reader_allows_is_corrupt(store: Store):
    store.put("m/a", b"x" * 100)
    assert store.get("m/a", 100) == store.get("m/a") == b"x" * 100
    for _ in range(20):  # more than a pool of connections holds: a refused answer gives its own back
        with pytest.raises(Corrupt, match="more than the 99 bytes allowed") as caught:
            store.get("m/a", max_bytes=99)
    assert caught.value.key == "m/a"
    with pytest.raises(KeyMissing):
        store.get("m/b", max_bytes=99)
    store.put("m/empty", b"")
    assert store.get("m/empty", 0) == b""


def test_a_listing_sees_every_earlier_write_of_others_in_key_order(opener: Opener):
    reader, writer = opener(), opener()
    assert reader.list("m") == []
    for count, key in enumerate(("m/b", "m/a/1", "m/c"), start=1):
        writer.put(key, b"x" * count)
        assert key in [entry.key for entry in reader.list("m")]
    assert [(entry.key, entry.size) for entry in reader.list("m")] == [("m/a/1", 2), ("m/b", 1), ("m/c", 3)]


def test_a_listing_holds_what_is_below_the_prefix_and_nothing_beside_it(store: Store):
    for key in ("m/a", "mm/b", "m-1/c"):
        store.put(key, b"x")
    assert [entry.key for entry in store.list("m")] == ["m/a"]
    assert store.list("m/a") == []  # an object is not below itself
    assert [entry.key for entry in store.list("")] == ["m-1/c", "m/a", "mm/b"]


def test_a_listing_from_a_key_on_holds_only_what_sorts_after_it(store: Store):
    keys = ["m/a", "m/a-b/1", "m/a.json", "m/b", "m/c-1", "m/c/2", "mm/d"]
    for key in keys:
        store.put(key, b"x")
    below = sorted(key for key in keys if key.startswith("m/"))
    for after in ("", "a", "m", "m/0", *below, "m/a-b/0", "m/a-b", "m/bb", "m/z", "mm/d", "z"):
        assert [entry.key for entry in store.list("m", after)] == [key for key in below if key > after], after
    assert [entry.key for entry in store.list("", "m/c/2")] == ["mm/d"]


def test_the_time_of_an_object_is_when_it_was_last_written_and_does_not_step_back(store: Store):
    began, times = time.time(), []
    for number in range(3):
        store.put("m/again", b"%d" % number)
        store.put(f"m/once-{number}", b"x")
        times += [entry.modified for entry in store.list("m") if entry.key in ("m/again", f"m/once-{number}")]
    assert times == sorted(times)  # each was written after the one before
    assert all(abs(modified - began) < 60 for modified in times)  # Unix seconds; here the store's host is ours


def test_a_range_that_the_object_does_not_fill_is_cut_and_one_behind_it_is_empty(store: Store):
    store.put("m/a", b"0123456789")
    assert store.get_range("m/a", 3, 7) == b"3456"
    assert store.get_range("m/a", 8, 20) == b"89"
    assert store.get_range("m/a", 10, 20) == store.get_range("m/a", 500, 600) == b""


def test_a_conditional_read_is_bounded_as_well(store: Store):
    store.put("m/hint", b"x" * 100)
    for _ in range(40):  # more than a pool of connections holds
        with pytest.raises(Corrupt, match="more than the 99 bytes allowed"):
            store.get_if_changed("m/hint", "", 99)
    fetched = store.get_if_changed("m/hint", "", 100)
    assert fetched is not None and len(fetched.content) == 100


@pytest.mark.parametrize("promised", [9, 11, 0, 40 << 20])
def test_a_stream_of_another_size_than_promised_is_an_error_and_leaves_no_object(store: Store, promised: int):
    with pytest.raises(StoreError, match=f"the chunks made .* bytes, not {promised}") as caught:
        store.put_stream("data/shard", [b"01234", memoryview(b"56789")], promised)
    assert (caught.value.key, caught.value.retryable) == ("data/shard", False)
    with pytest.raises(KeyMissing):
        store.get("data/shard")
    assert store.list("") == []


def test_an_empty_stream_and_chunks_of_any_shape_arrive(store: Store):
    store.put_stream("data/empty", [], 0)
    assert store.get("data/empty") == b""
    numbers = array.array("I", range(1000))
    store.put_stream("data/numbers", [b"", memoryview(numbers), b"", bytearray(b"end")], 4003)
    assert store.get("data/numbers") == numbers.tobytes() + b"end"


def test_sweeping_removes_no_object_and_is_no_error_where_nothing_is(store: Store):
    for key in ("m/a", "m/b/c", "n/d"):
        store.put(key, b"x")
    for prefix in ("m", "nothing/here"):
        assert store.sweep(prefix, -60) == 0
    assert [entry.key for entry in store.list("")] == ["m/a", "m/b/c", "n/d"]


def test_a_stream_is_read_back_in_parts(store: Store):
    content = bytes(range(256)) * 41
    store.put_stream("data/shard", [content[:1000], memoryview(content)[1000:5000], content[5000:]], len(content))
    parts = [store.get_range("data/shard", start, start + 4096) for start in (0, 4096, 8192)]
    assert [len(part) for part in parts] == [4096, 4096, len(content) - 8192]
    assert b"".join(parts) == content
    with pytest.raises(KeyMissing):
        store.get_range("data/none", 0, 4096)


def test_a_stream_that_fails_midway_leaves_no_object(store: Store):
    def chunks() -> Iterator[bytes]:
        yield b"half"
        raise ZeroDivisionError("the source broke")

    with pytest.raises((StoreError, ZeroDivisionError)):
        store.put_stream("data/shard", chunks(), 8)
    with pytest.raises(KeyMissing):
        store.get("data/shard")


def test_deleting_twice_is_no_error_and_a_deleted_object_is_missing(store: Store):
    store.put("a/b", b"x")
    store.delete("a/b")
    store.delete("a/b")
    with pytest.raises(KeyMissing):
        store.get("a/b")
    assert store.list("a") == []


@pytest.mark.parametrize("key", ["", "/etc/passwd", "a/../b", "..", "a//b", "a/", ".hidden", "a\nb", "a/é", "x" * 600])
def test_a_key_that_could_leave_the_store_is_refused_by_every_operation(store: Store, key: str):
    for call in (
        lambda: store.get(key),
        lambda: store.get_if_changed(key, ""),
        lambda: store.put(key, b""),
        lambda: store.put_if_absent(key, b""),
        lambda: store.put_stream(key, [b""], 0),
        lambda: store.get_range(key, 0, 1),
        lambda: store.list(key or "."),  # an empty prefix is the whole store
        lambda: store.delete(key),
        lambda: store.sweep(key or ".", 0),
    ):
        with pytest.raises(UsageError):
            call()


def test_memory_has_one_winner_however_the_threads_are_switched(monkeypatch: pytest.MonkeyPatch):
    """fsspec's memory looks and writes in two steps; here two writers meet between them, if they can."""
    exists, meeting = MemoryFileSystem.exists, threading.Barrier(2)

    def look_and_meet(self: MemoryFileSystem, path: str) -> bool:
        found = bool(exists(self, path))
        with contextlib.suppress(threading.BrokenBarrierError):  # nobody else may come in: as it should be
            if not found:
                meeting.wait(0.5)
        return found

    store = open_store(f"memory://{uuid.uuid4().hex}")
    monkeypatch.setattr(MemoryFileSystem, "exists", look_and_meet)
    with ThreadPoolExecutor(2) as pool:
        won = list(pool.map(store.put_if_absent, ["m/a"] * 2, [b"one", b"two"]))
    assert sum(won) == 1 and store.get("m/a") == (b"one", b"two")[won.index(True)]


class _Overwriting(MemoryFileSystem):  # type: ignore[misc]
    """Takes mode="create" and ignores it, as rclone's S3 server does."""

    protocol = "overwriting"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.replace("overwriting://", "memory://")))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        super().pipe_file(path, value, mode="overwrite", **kwargs)


def test_a_store_that_overwrites_where_it_should_refuse_is_unfit():
    fsspec.register_implementation("overwriting", _Overwriting, clobber=True)
    with pytest.raises(StoreUnfit, match="never overwrites"):
        probe(open_store(f"overwriting://{uuid.uuid4().hex}"), "policy/probes")


class _StaleLists(LocalStore):
    def list(self, prefix: str, after: str = "") -> list[Any]:
        return []


def test_a_store_whose_listings_lag_is_unfit(tmp_path: Path):
    with pytest.raises(StoreUnfit, match="a list sees every earlier write"):
        probe(_StaleLists(str(tmp_path)), "policy/probes")


def test_unknown_schemes_missing_packages_and_urls_without_a_place_are_usage_errors(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for url in ("carrier-pigeon://roof", "gs://bucket/x", "file://", "s3://", ""):
        with pytest.raises(UsageError):
            open_store(url)


def test_a_local_path_may_hold_any_character_and_reopens_by_its_url(tmp_path: Path):
    root = tmp_path / "50% of $x, ü"
    open_store(str(root)).put("a", b"x")
    again = open_store(str(root))
    assert open_store(again.url).get("a") == b"x"
    assert (root / "a").read_bytes() == b"x"


def test_a_directory_that_cannot_be_listed_is_an_error_not_an_empty_listing(tmp_path: Path):
    store = open_store(str(tmp_path))
    store.put("m/a", b"x")
    broken = LocalStore(str(tmp_path))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(StoreError):
        broken.list("loop/x")


def test_hidden_leftovers_of_a_killed_writer_are_never_listed(tmp_path: Path):
    store = open_store(str(tmp_path))
    store.put("m/a", b"x")
    (tmp_path / "m" / ".a.half-written").write_bytes(b"")
    assert [entry.key for entry in store.list("m")] == ["m/a"]


def test_a_key_above_or_below_an_object_is_missing_locally_as_on_object_stores(tmp_path: Path):
    store = open_store(str(tmp_path))
    store.put("m/a", b"x")
    for key in ("m", "m/a/b"):
        with pytest.raises(KeyMissing):
            store.get(key)
