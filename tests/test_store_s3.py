"""What S3 asks of its clients beyond the common suite: how many requests, lost answers, parts, throttling, memory."""

import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import http_witness
import pytest
from http_witness import Witness, witness
from s3_server import S3Server
from store_openers import ON_S3, SERVERS

from shared import retry
from shared.errors import KeyMissing, StoreError, UsageError
from shared.obstore_store import ObstoreStore
from shared.retry import Retry
from shared.s3_store import S3Store
from shared.s3_upload import IN_FLIGHT, PART_BYTES, part_bytes
from shared.store import Store
from shared.stores import Client, open_store, probe
from shared.transfer import THREADS

MIB = 1 << 20
LARGE_BYTES = 256 * MIB
MEMORY_ABOVE_PARTS = 64 * MIB
MEMORY_ABOVE_DOWNLOAD = {"fsspec": 96 * MIB, "obstore": 48 * MIB}  # aiohttp joins what it got
GIVEN_UP_S = 30.0  # where the size allows 3 s, and a client's largest request more than six minutes
HISTORY = 1100  # more than one page of a listing
KILL_TIMEOUT_S = 120.0


class Place:
    """A store of its own on a real S3 server, with a witness between."""

    def __init__(self, server: Any, client: Client, between: Witness) -> None:
        self.url, self.client, self.between = server.url(uuid.uuid4().hex), client, between
        self.direct_options = server.options
        self.options = {**server.options, "endpoint_url": between.endpoint}
        self.store: Store = open_store(self.url, self.options, client)
        self._direct = S3Store(self.url, self.direct_options)

    def open(self, **options: Any) -> Store:
        return open_store(self.url, {**self.options, **options}, self.client)

    def uploads(self) -> list[str]:
        """Multipart uploads that are neither complete nor aborted."""
        prefix = self.url.partition("://")[2].partition("/")[2]
        pages = self._direct._pages("list", "", "list_multipart_uploads", Prefix=prefix)
        return [upload["Key"] for page in pages for upload in page.get("Uploads", [])]

    def begin_upload(self, key: str) -> None:
        """What a writer that is killed in the middle leaves."""
        name = self._direct._name(key)
        upload = self._direct._call("create_multipart_upload", Key=name)
        self._direct._call("upload_part", Key=name, UploadId=upload["UploadId"], PartNumber=1, Body=bytes(5 * MIB))


@pytest.fixture(params=ON_S3)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    fixture, client = SERVERS[request.param]
    server = request.getfixturevalue(fixture)
    with witness(server.endpoint) as between:
        yield Place(server, client, between)


def large(size: int) -> Iterator[bytes]:
    """So many bytes, in chunks that fit no part; each MiB is another."""
    content = bytes(range(256)) * 4096
    for start in range(0, size, MIB):
        yield (b"%08d" % (start // MIB) + content)[: min(MIB, size - start)]


def test_each_read_and_each_write_is_one_request(place: Place):
    store = place.store
    store.put_if_absent("m/a", b"x")
    fetched = store.get_if_changed("m/a", "")
    assert fetched is not None
    for call in (
        lambda: store.get("m/a"),
        lambda: store.get("m/a", 100),
        lambda: store.get_range("m/a", 0, 1),
        lambda: store.get_if_changed("m/a", ""),
        lambda: store.get_if_changed("m/a", fetched.tag, 100),
        lambda: store.put("m/b", b"x"),
        lambda: store.put_if_absent("m/c", b"x"),
        lambda: store.put_stream("m/d", [b"x"], 1),
        lambda: store.list("m"),
        lambda: store.delete("m/b"),
    ):
        place.between.forget()
        call()
        assert len(place.between.seen()) == 1


@pytest.fixture(scope="module")
def histories() -> dict[str, str]:
    """Where a history was put, by endpoint: for every client that reads it."""
    return {}


def test_a_listing_after_the_last_key_is_one_request_however_long_the_history(place: Place, histories: dict[str, str]):
    server = place.direct_options["endpoint_url"]
    if server not in histories:
        writers = [open_store(place.url, place.direct_options, "obstore") for _ in range(4)]
        with ThreadPoolExecutor(len(writers)) as pool:
            list(pool.map(lambda n: writers[n % 4].put(f"manifests/{n:06d}.json", b"x"), range(HISTORY)))
        histories[server] = place.url
    store = open_store(histories[server], place.options, place.client)
    last, before = (f"manifests/{HISTORY - n:06d}.json" for n in (1, 2))
    assert len(store.list("manifests")) == HISTORY
    assert len(place.between.seen()) > 1  # so that this test says something
    for after, found in ((last, []), (before, [last])):
        place.between.forget()
        assert [entry.key for entry in store.list("manifests", after)] == found
        assert len(place.between.seen()) == 1


def test_an_upload_of_many_parts_arrives_whole_and_is_read_back_in_ranges(place: Place):
    size = 2 * PART_BYTES + 12345
    place.store.put_stream("data/shard", large(size), size)
    assert [(entry.key, entry.size) for entry in place.store.list("data")] == [("data/shard", size)]
    whole = b"".join(large(size))
    for start in range(0, size, PART_BYTES):
        assert place.store.get_range("data/shard", start, start + PART_BYTES) == whole[start : start + PART_BYTES]
    assert len(place.between.seen("partNumber=")) == 3
    assert place.uploads() == []


def test_parts_grow_so_that_there_are_never_more_than_s3_allows():
    for size in (1, PART_BYTES * 10_000, PART_BYTES * 10_000 + 1, 5 << 40):
        assert -(-size // part_bytes(size)) <= 10_000
    assert part_bytes(PART_BYTES * 10_000) == PART_BYTES
    assert part_bytes(PART_BYTES * 10_000 + 1) == PART_BYTES + MIB


@pytest.mark.parametrize("answered", [False, True])
def test_a_part_whose_connection_is_cut_is_sent_again_alone(place: Place, answered: bool):
    place.between.lose("PUT .*partNumber=2", times=2, answered=answered)
    size = 3 * PART_BYTES
    place.store.put_stream("data/shard", large(size), size)
    assert [len(place.between.seen(rf"partNumber={part}\b")) for part in (1, 2, 3)] == [1, 3, 1]
    assert place.store.get("data/shard") == b"".join(large(size))


def test_an_upload_whose_last_answer_is_lost_has_succeeded(place: Place):
    size = PART_BYTES + 1
    place.between.lose("POST .*uploadId=", answered=True)
    place.store.put_stream("data/1", large(size), size)
    place.between.answer("POST .*uploadId=", 500, "InternalError", carried_out=True)
    place.store.put_stream("data/2", large(size), size)
    assert [(entry.key, entry.size) for entry in place.store.list("data")] == [("data/1", size), ("data/2", size)]
    assert place.uploads() == []


@pytest.mark.parametrize("request_line", ["POST .*uploads", "PUT .*partNumber=2", "POST .*uploadId="])
def test_an_upload_that_fails_for_good_is_told_once_and_aborted(place: Place, request_line: str):
    place.between.answer(request_line, 403, "AccessDenied", times=99)
    with pytest.raises(StoreError, match="refuses") as caught:
        place.store.put_stream("data/shard", large(2 * PART_BYTES), 2 * PART_BYTES)
    assert (caught.value.op, caught.value.key, caught.value.retryable) == ("put", "data/shard", False)
    assert place.uploads() == []
    with pytest.raises(KeyMissing):
        place.store.get("data/shard")


def test_an_upload_whose_source_breaks_is_aborted_and_the_error_is_the_source_s(place: Place):
    def broken() -> Iterator[bytes]:
        yield from large(2 * PART_BYTES)
        raise ZeroDivisionError("the source broke")

    with pytest.raises(ZeroDivisionError):
        place.store.put_stream("data/shard", broken(), 3 * PART_BYTES)
    assert place.uploads() == [] and place.store.list("") == []


def test_sweeping_aborts_uploads_that_are_old_by_the_store_s_clock(place: Place):
    for key in ("p/data/1", "p/data/2", "q/data/3"):
        place.begin_upload(key)
    assert place.store.sweep("p", 1e9) == 0  # decades
    assert place.store.sweep("p", -60) == 2
    assert [name.rpartition("q/")[2] for name in place.uploads()] == ["data/3"]
    assert place.store.sweep("p", -60) == 0


def test_a_reply_lost_after_the_write_counts_as_written_by_us(place: Place):
    place.between.lose("PUT .*manifests/1", answered=True)
    assert place.store.put_if_absent("manifests/1", b"ours")
    place.between.answer("PUT .*manifests/2", 500, "InternalError", times=3, carried_out=True)
    assert place.store.put_if_absent("manifests/2", b"ours")
    assert not place.store.put_if_absent("manifests/2", b"theirs")


def test_two_conditional_writes_that_meet_are_told_apart_from_a_name_that_is_taken(place: Place):
    """S3 answers 409 where two writes of one name are under way, and none of them may have been done."""
    place.between.answer("PUT .*m/a", 409, "ConditionalRequestConflict", times=2)
    assert place.store.put_if_absent("m/a", b"ours")
    assert place.store.get("m/a") == b"ours"


def test_a_name_refused_as_taken_where_nothing_is_is_written_at_the_next_try(place: Place):
    """Whoever had it was deleted before we could read it."""
    place.between.answer("PUT .*m/a", 412, "PreconditionFailed")
    assert place.store.put_if_absent("m/a", b"ours")
    assert place.store.get("m/a") == b"ours"


@pytest.mark.parametrize("headers", [{}, {"Retry-After": "1"}])
def test_a_server_that_says_slow_down_is_left_alone_before_it_is_asked_again(place: Place, headers: dict[str, str]):
    place.store.put("m/a", b"x")
    place.between.answer("GET .*m/a", 503, "SlowDown", headers=headers)
    assert place.store.get("m/a") == b"x"
    first, second = place.between.seen_at("GET .*m/a")
    assert second - first >= 0.5  # 0.1 s to 0.3 s where it merely failed


def test_a_server_that_fails_for_a_while_is_asked_again_by_every_operation(place: Place):
    place.store.put("a", b"x")
    for call in every_read_and_write(place.store):
        place.between.answer("", 500, "InternalError")
        call()


def every_read_and_write(store: Store) -> Iterable[Callable[[], Any]]:
    return (
        lambda: store.get("a"),
        lambda: store.get_if_changed("a", ""),
        lambda: store.get_range("a", 0, 8),
        lambda: store.list("a"),
        lambda: store.put("a", b""),
        lambda: store.put_if_absent("a", b""),
        lambda: store.put_stream("a", [b"x"], 1),
        lambda: store.put_stream("large", large(PART_BYTES + 1), PART_BYTES + 1),
        lambda: probe(store, "probes"),
        lambda: store.delete("a"),
    )


def test_a_missing_bucket_is_named_by_every_operation(place: Place):
    store = open_store("s3://no-such-bucket/x", place.options, place.client)
    for call in (*every_read_and_write(store), lambda: store.sweep("a", 0)):
        with pytest.raises(StoreError, match="no bucket 'no-such-bucket'") as caught:
            call()
        assert not isinstance(caught.value, KeyMissing) and not caught.value.retryable


def test_wrong_credentials_are_told_by_every_operation(place: Place):
    for call in every_read_and_write(place.open(key="somebody")):
        with pytest.raises(StoreError, match="refuses these credentials") as caught:
            call()
        assert not caught.value.retryable


def test_nobody_listening_is_a_passing_fault_with_a_hint(place: Place):
    with pytest.raises(StoreError, match=r"5 attempts.*Is the endpoint right and up") as caught:
        place.open(endpoint_url="http://127.0.0.1:1").get("a")
    assert caught.value.retryable


@pytest.mark.parametrize("client", ["fsspec", "obstore"])
@pytest.mark.parametrize(("size", "start", "end"), [(MIB, 0, 1000), (MIB, 1000, 2000), (10, 8, 20)])
def test_a_server_that_ignores_ranges_is_told(client: Client, size: int, start: int, end: int):
    with http_witness.giving(size, ranges=False) as endpoint:
        store = open_store("s3://bucket/x", {"endpoint_url": endpoint, "key": "k", "secret": "s"}, client)
        with pytest.raises(StoreError, match=r"(?i)range") as caught:
            store.get_range("data/shard", start, end)
    assert (caught.value.key, caught.value.retryable) == ("data/shard", False)


@pytest.mark.parametrize("kind", [S3Store, ObstoreStore])
def test_an_answer_that_trickles_is_given_up_by_the_bytes_it_has(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, kind: type[S3Store] | type[ObstoreStore]
):
    """40 kB at 200 bytes a second, with no pause as long as the read timeout."""
    monkeypatch.setattr(retry, "READ_TIMEOUT_S", 2)
    monkeypatch.setattr(retry, "CONNECT_TIMEOUT_S", 1)
    store = kind(s3.url(uuid.uuid4().hex), s3.options, Retry(attempts=1))
    for number in range(10):  # a listing of 3 kB
        store.put(f"m/{number}", bytes(40_000))
    s3.weather(trickle_bytes_per_s=200)
    try:
        began = time.monotonic()
        with ThreadPoolExecutor() as pool:
            calls = [
                pool.submit(store.get, "m/0"),
                pool.submit(store.get, "m/0", 50_000),
                pool.submit(store.get_range, "m/0", 0, 40_000),
                pool.submit(store.get_if_changed, "m/0", "", 50_000),
                pool.submit(store.list, "m"),
            ]
        for call in calls:
            with pytest.raises(StoreError) as caught:
                call.result()
            assert caught.value.retryable
        assert time.monotonic() - began < GIVEN_UP_S
    finally:
        s3.weather()
    assert store.get("m/0") == bytes(40_000)


def test_an_exclusive_write_larger_than_one_request_is_refused(place: Place):
    with pytest.raises(StoreError, match="one conditional request"):
        place.store.put_if_absent("a", bytes(100_000_001))


MEASURED = """
import sys
from pathlib import Path
from shared.stores import open_store

def most():  # bytes resident at the worst moment; other than ru_maxrss not inherited from the parent
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10

endpoint, client, size, target = sys.argv[1:]
store = open_store("s3://bucket/x", {{"endpoint_url": endpoint, "key": "k", "secret": "s"}}, client)
chunk, chunks = bytes(1 << 20), int(size) >> 20
{warm_up}
before = most()
{transfer}
print(most() - before)
"""
UPLOAD = {
    "warm_up": 'store.put("small", b"x")',
    "transfer": 'store.put_stream("large", (chunk for _ in range(chunks)), int(size))',
}
DOWNLOAD = {
    "warm_up": """
from hashlib import sha256
from shared.manifest import Shard
from shared.transfer import PART_BYTES, download
digest = sha256(bytes(PART_BYTES)).hexdigest()
store.get_range("large", 0, 1000)""",
    "transfer": 'download(store, Shard("large", int(size), (digest,) * (int(size) // PART_BYTES)), Path(target))',
}


@pytest.mark.parametrize("client", ["fsspec", "obstore"])
def test_a_large_upload_needs_memory_for_its_parts_in_flight_and_little_more(client: str):
    with http_witness.swallowing() as endpoint:
        more = memory_of(UPLOAD, endpoint, client)
    assert PART_BYTES < more < IN_FLIGHT * PART_BYTES + MEMORY_ABOVE_PARTS


@pytest.mark.parametrize("client", ["fsspec", "obstore"])
def test_a_large_download_needs_memory_for_its_parts_in_flight_and_little_more(client: str, tmp_path: Path):
    with http_witness.giving(LARGE_BYTES) as endpoint:
        more = memory_of(DOWNLOAD, endpoint, client, tmp_path / "shard")
    assert (tmp_path / "shard").stat().st_size == LARGE_BYTES
    assert PART_BYTES < more < THREADS * PART_BYTES + MEMORY_ABOVE_DOWNLOAD[client]


def memory_of(steps: dict[str, str], endpoint: str, client: str, target: Path | str = "") -> int:
    """Bytes that a process of its own needs above its start, to move LARGE_BYTES."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED.format(**steps), endpoint, client, str(LARGE_BYTES), str(target)],
        capture_output=True,
        text=True,
        timeout=KILL_TIMEOUT_S,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    more = int(done.stdout)
    print(f"{client}: {more / MIB:.0f} MiB more for {LARGE_BYTES / MIB:.0f} MiB")
    return more


def test_obstore_takes_the_options_of_s3fs_that_it_has_and_refuses_the_others():
    url = "s3://bucket/x"
    region = {"region_name": "eu-central-1"}
    assert open_store(url, {"key": "k", "secret": "s", "client_kwargs": region}, "obstore").url == url
    for options in ({"use_ssl": False}, {"client_kwargs": {"verify": False}}):
        with pytest.raises(UsageError, match="obstore does not take"):
            open_store(url, options, "obstore")
    with pytest.raises(UsageError, match=r"store\.client = 'fsspec'"):
        open_store("hdfs://host/x", {}, "obstore")


@pytest.mark.parametrize(
    ("package", "url", "client", "extra"),
    [
        ("obstore", "s3://bucket/x", "obstore", "obstore"),
        ("s3fs", "s3://bucket/x", "fsspec", "s3"),
        ("gcsfs", "gs://bucket/x", "fsspec", "gs"),
        ("adlfs", "az://bucket/x", "fsspec", "az"),
    ],
)
def test_a_missing_package_is_told_with_the_extra_that_brings_it(
    monkeypatch: pytest.MonkeyPatch, package: str, url: str, client: Client, extra: str
):
    monkeypatch.setitem(sys.modules, package, None)
    for scheme in ("s3", "gs", "az"):  # fsspec remembers what was imported before
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    with pytest.raises(UsageError, match=rf"pip install 'lorasync\[{extra}\]'"):
        open_store(url, {}, client)
