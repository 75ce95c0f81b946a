"""One suite for every store: a directory, fsspec's memory, and a real S3 server. Then what each refuses, and how."""

import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
import store_openers
from fsspec.implementations.memory import MemoryFileSystem
from s3_server import S3Server
from store_openers import Opener

from shared.errors import Corrupt, KeyMissing, StoreError, StoreUnfit, UsageError
from shared.local_store import LocalStore
from shared.store import Store
from shared.stores import open_store, probe

WRITERS = 8
ROUNDS = 8


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
    ):
        with pytest.raises(UsageError):
            call()


def test_an_upload_larger_than_one_request_arrives_whole(s3: S3Server):
    store = open_store(s3.url(uuid.uuid4().hex), s3.options)
    chunk, count = bytes(range(256)) * 4096 * 8, 8  # 8 x 8 MiB: s3fs uploads in blocks of 50 MiB
    store.put_stream("data/shard", (chunk for _ in range(count)), len(chunk) * count)
    assert [entry.size for entry in store.list("data")] == [len(chunk) * count]
    size = len(chunk)
    assert all(store.get_range("data/shard", n * size, (n + 1) * size) == chunk for n in range(count))


def test_a_reply_lost_after_the_write_counts_as_written_by_us(s3: S3Server):
    store = open_store(s3.url(uuid.uuid4().hex), s3.options)
    s3.lose_replies(1)
    assert store.put_if_absent("manifests/1", b"ours")
    s3.lose_replies(2)  # longer than the client's own retry
    assert store.put_if_absent("manifests/2", b"ours")


def test_a_server_that_refuses_for_a_while_is_asked_again(s3: S3Server):
    store = open_store(s3.url(uuid.uuid4().hex), s3.options)
    store.put("a", b"x")
    s3.refuse(2)
    assert store.get("a") == b"x"


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


def every_read_and_write(store: Store) -> Iterable[Callable[[], Any]]:
    return (
        lambda: store.get("a"),
        lambda: store.get_if_changed("a", ""),
        lambda: store.get_range("a", 0, 8),
        lambda: store.list("a"),
        lambda: store.put("a", b""),
        lambda: store.put_if_absent("a", b""),
        lambda: store.put_stream("a", [b"x"], 1),
        lambda: probe(store, "probes"),
    )


def test_a_missing_bucket_is_named_by_every_operation(s3: S3Server):
    for call in every_read_and_write(open_store("s3://no-such-bucket/x", s3.options)):
        with pytest.raises(StoreError, match="no bucket 'no-such-bucket'") as caught:
            call()
        assert not isinstance(caught.value, KeyMissing) and not caught.value.retryable


def test_wrong_credentials_are_told_by_every_operation(s3: S3Server):
    for call in every_read_and_write(open_store(s3.url("x"), {**s3.options, "key": "somebody"})):
        with pytest.raises(StoreError, match="refuses these credentials") as caught:
            call()
        assert not caught.value.retryable


def test_nobody_listening_is_a_passing_fault_with_a_hint(s3: S3Server):
    store = open_store(s3.url("x"), {**s3.options, "endpoint_url": "http://127.0.0.1:1"})
    with pytest.raises(StoreError, match="Is the endpoint right and up") as caught:
        store.get("a")
    assert caught.value.retryable


def test_an_exclusive_write_larger_than_one_request_is_refused(s3: S3Server):
    with pytest.raises(StoreError, match="one conditional request"):
        open_store(s3.url("x"), s3.options).put_if_absent("a", bytes(100_000_001))


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
