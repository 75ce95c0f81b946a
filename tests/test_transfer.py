"""Downloads in parts: what is fetched again and what is not, after errors, kills and power loss; who shares what."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import synthetic

from shared import fetch as fetch_module
from shared import transfer
from shared.catalog import Catalog
from shared.errors import Corrupt, KeyMissing, StoreError
from shared.fetch import WEIGHTS, fetch, verify
from shared.local_store import LocalStore
from shared.manifest import PART_BYTES, Manifest, Shard
from shared.partial import NAME_LENGTH, partial_directory, remove_leftovers
from shared.parts import in_parts, work_through
from shared.stores import open_store
from shared.transfer import download
from shared.versions import Version

SMALL_PART = 1024  # bytes
TIMEOUT_S = 30.0
CONTENT = bytes(number * 7 % 251 for number in range(20 * SMALL_PART + 100))


@dataclass
class Counting(LocalStore):
    """Tells which ranges were asked for, and lets each be told beforehand."""

    url: str
    before: Callable[[int], None] = lambda start: None
    asked: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(self.url)

    def get_range(self, key: str, start: int, end: int) -> bytes:
        self.asked.append(start)
        self.before(start)
        return super().get_range(key, start, end)

    def parts_asked(self) -> list[int]:
        return sorted(start // SMALL_PART for start in self.asked)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PART_BYTES", SMALL_PART)
    monkeypatch.setattr(transfer, "CACHED_BYTES", 256)


def shard_of(content: bytes, key: str = "data/shard") -> Shard:
    starts = range(0, len(content), SMALL_PART)
    return Shard(key, len(content), tuple(hashlib.sha256(content[at : at + SMALL_PART]).hexdigest() for at in starts))


@pytest.fixture
def store(tmp_path: Path) -> Counting:
    store = Counting(str(tmp_path / "store"))
    store.put("data/shard", CONTENT)
    return store


@pytest.mark.parametrize("threads", [1, 4])
def test_every_part_is_fetched_once_and_lies_where_it_belongs(store: Counting, tmp_path: Path, threads: int):
    download(store, shard_of(CONTENT), tmp_path / "file", threads=threads)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert store.parts_asked() == list(range(21))


def test_what_is_shown_is_everything_in_pieces_whether_fetched_or_found(store: Counting, tmp_path: Path):
    (tmp_path / "file").write_bytes(CONTENT[: 5 * SMALL_PART])
    seen, showing = bytearray(len(CONTENT)), threading.Lock()

    def look(start: int, content: memoryview) -> None:
        with showing:
            seen[start : start + len(content)] = content

    download(store, shard_of(CONTENT), tmp_path / "file", look=look)
    assert seen == CONTENT
    seen[:] = bytes(len(seen))
    transfer.verify(store, shard_of(CONTENT), look=look)
    assert seen == CONTENT


@pytest.mark.parametrize(
    ("there", "missing"),
    [
        (b"", range(21)),
        (CONTENT[: 7 * SMALL_PART + 5], range(7, 21)),
        (CONTENT[:SMALL_PART] + bytes(3 * SMALL_PART) + CONTENT[4 * SMALL_PART :], range(1, 4)),  # unsynced blocks
        (CONTENT[:-1] + b"\xff", [20]),
        (CONTENT + b"longer", []),
        (CONTENT, []),
    ],
    ids=["nothing", "a torn end", "blocks that the power took", "a flipped byte", "too long", "all"],
)
def test_only_what_does_not_match_is_fetched_again(store: Counting, tmp_path: Path, there: bytes, missing: list[int]):
    (tmp_path / "file").write_bytes(there)
    download(store, shard_of(CONTENT), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert store.parts_asked() == list(missing)


def test_what_was_found_and_does_not_match_is_not_shown(store: Counting, tmp_path: Path):
    (tmp_path / "file").write_bytes(bytes(3 * SMALL_PART) + CONTENT[3 * SMALL_PART : -1] + b"\xff")
    wrong = list[int]()

    def look(start: int, content: memoryview) -> None:
        if content != CONTENT[start : start + len(content)]:
            wrong.append(start)

    download(store, shard_of(CONTENT), tmp_path / "file", look=look)
    assert wrong == [] and store.parts_asked() == [0, 1, 2, 20]


@pytest.mark.parametrize("changed", [CONTENT[:-1], CONTENT + b"x", CONTENT[:5000] + b"\xff" + CONTENT[5001:], b""])
def test_a_damaged_object_is_corrupt_and_none_of_its_bad_bytes_is_written(
    store: Counting, tmp_path: Path, changed: bytes
):
    store.put("data/shard", changed)
    for check in (
        lambda: download(store, shard_of(CONTENT), tmp_path / "file"),
        lambda: transfer.verify(store, shard_of(CONTENT)),
    ):
        with pytest.raises(Corrupt, match="does not match its digest"):
            check()
    written = (tmp_path / "file").read_bytes()
    bad = [at for at in range(0, len(written), SMALL_PART) if any(written[at : at + SMALL_PART])]
    assert all(written[at : at + SMALL_PART] == CONTENT[at : at + SMALL_PART] for at in bad)


def test_a_manifest_whose_digests_do_not_cover_a_shard_is_corrupt(store: Counting, tmp_path: Path):
    for shard in (Shard("data/shard", 0, ()), Shard("data/shard", len(CONTENT), ()), Shard("data/shard", 5, ("", ""))):
        with pytest.raises(Corrupt, match="digests for"):
            download(store, shard, tmp_path / "file")
        with pytest.raises(Corrupt, match="digests for"):
            transfer.verify(store, shard)
    assert store.asked == []


def test_an_error_ends_the_download_at_once_and_who_comes_late_writes_nothing(store: Counting, tmp_path: Path):
    stuck, release, late = threading.Event(), threading.Event(), threading.Event()

    def before(start: int) -> None:
        if start == 0:
            stuck.set()
            release.wait(TIMEOUT_S)
            late.set()
        elif start == SMALL_PART:
            stuck.wait(TIMEOUT_S)
            raise KeyMissing("no such object", op="get", key="data/shard")

    store.before = before
    with pytest.raises(KeyMissing):  # while the first part hangs
        download(store, shard_of(CONTENT), tmp_path / "file", threads=2)
    asked = len(store.asked)
    before_release = (tmp_path / "file").read_bytes()
    workers = [thread for thread in threading.enumerate() if thread.name == "part"]
    release.set()
    for worker in workers:
        worker.join(TIMEOUT_S)
    assert late.is_set() and asked == len(store.asked) == 2
    assert (tmp_path / "file").read_bytes() == before_release == b""


def test_every_item_is_worked_on_once_and_the_first_error_is_the_one_raised():
    done: list[int] = []
    work_through(range(100), lambda item, over: done.append(item), threads=3)
    assert sorted(done) == list(range(100))
    work_through([], lambda item, over: done.append(item), threads=3)

    def fail(item: int, over: threading.Event) -> None:
        raise ZeroDivisionError(item)

    with pytest.raises(ZeroDivisionError):
        work_through(range(100), fail, threads=1)


@pytest.mark.parametrize("sizes", [[0], [1], [10], [3, 7, 20, 0, 1], [25, 25]])
def test_chunks_are_cut_at_every_multiple_of_a_part_without_copying(sizes: list[int]):
    chunks = [memoryview(bytearray(os.urandom(size))) for size in sizes]
    parts = in_parts(chunks, part_bytes=10)
    whole = b"".join(chunks)
    assert [b"".join(part) for part in parts] == [whole[at : at + 10] for at in range(0, len(whole), 10)]
    assert {id(view.obj) for part in parts for view in part} <= {id(chunk.obj) for chunk in chunks}


def test_the_memory_of_a_download_is_its_parts_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transfer, "PART_BYTES", PART_BYTES)
    part = bytes(PART_BYTES)

    class Endless(LocalStore):
        def get_range(self, key: str, start: int, end: int) -> bytes:
            return bytes(min(end, 16 * PART_BYTES) - start)

    shard = Shard("data/shard", 16 * PART_BYTES, (hashlib.sha256(part).hexdigest(),) * 16)
    del part
    tracemalloc.start()
    try:
        download(Endless(str(tmp_path / "store")), shard, tmp_path / "file")
        assert tracemalloc.get_traced_memory()[1] < (4 + 4) * PART_BYTES  # in flight, and 64 MiB
    finally:
        tracemalloc.stop()


# Versions.


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def manifests(store: Counting, base: Path) -> list[Manifest]:
    """Two versions of one rank, in parts of 1 KiB."""
    made = synthetic.publish(store, base, count=2)
    return [with_shard(each, shard_of(store.get(each.shards[0].key), each.shards[0].key)) for each in made]


def with_shard(manifest: Manifest, shard: Shard) -> Manifest:
    return replace(manifest, shards=(shard,)).sealed()


def get(store: LocalStore, manifest: Manifest, out: Path) -> Path:
    return fetch(store, manifest, synthetic.EXPECTED, out, base_name="base")


def aside(out: Path, manifest: Manifest) -> Path:
    """Where a fetch builds, and what it holds while it does."""
    return out.parent / f".{out.name}.{manifest.digest[:NAME_LENGTH]}"


def hidden(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_fetch_that_failed_goes_on_where_it_was(store: Counting, manifests: list[Manifest], tmp_path: Path):
    manifest, out = manifests[0], tmp_path / "out"
    count = len(manifest.shards[0].parts)

    def fails(start: int) -> None:
        if start >= (count - 2) * SMALL_PART:
            raise StoreError("gone away", op="get", key="", retryable=True)

    store.before = fails
    with pytest.raises(StoreError, match="gone away"):
        get(store, manifest, out)
    assert not out.exists() and aside(out, manifest).is_dir()
    first = set(store.parts_asked())
    store.asked.clear()
    store.before = lambda start: None
    get(store, manifest, out)
    assert len(store.asked) <= count - len(first) + transfer.THREADS  # those that failed, and what was under way then
    assert (out / WEIGHTS).read_bytes() == store.get(manifest.shards[0].key)
    assert hidden(tmp_path) == []


def test_a_plain_version_is_not_put_together_anew(
    store: Counting, manifests: list[Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fetch_module, "assemble", None)
    get(store, manifests[0], tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == store.get(manifests[0].shards[0].key)


def test_leftovers_of_other_fetches_go_and_other_peoples_files_stay(
    store: Counting, manifests: list[Manifest], tmp_path: Path
):
    out = tmp_path / "out"
    for stays in (".out.d", ".outer." + "0" * NAME_LENGTH, ".out." + "g" * NAME_LENGTH):
        (tmp_path / stays).mkdir()
    (aside(out, manifests[1])).mkdir()
    (aside(out, manifests[1]) / "shard-0").write_bytes(b"half")
    get(store, manifests[0], out)
    assert not aside(out, manifests[1]).exists()
    assert sum(path.name.startswith(".out") for path in tmp_path.iterdir()) == 3


def test_who_finds_the_directory_in_use_builds_elsewhere_and_touches_it_not(
    store: Counting, manifests: list[Manifest], tmp_path: Path
):
    out = tmp_path / "out"
    with partial_directory(out, manifests[0].digest) as held, partial_directory(out, manifests[1].digest) as other:
        (held / "theirs").write_text("x")
        get(store, manifests[0], out)
        assert (held / "theirs").exists() and other.is_dir()
        assert not (out / "theirs").exists()
    get(store, manifests[0], out)  # whole: nothing to do
    get(store, manifests[1], out)
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("then", ["before", "after"])
@pytest.mark.parametrize("does", ["cleans up", "fetches it too", "fetches another"])
def test_who_comes_while_a_version_gets_its_name_takes_nothing_from_it(
    store: Counting, manifests: list[Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str, then: str
):
    out, rename = tmp_path / "out", Path.rename
    act = {
        "cleans up": lambda: remove_leftovers(out),
        "fetches it too": lambda: get(store, manifests[0], out),
        "fetches another": lambda: get(store, manifests[1], tmp_path / "other"),
    }
    came = list[str]()

    def renamed(self: Path, target: Path) -> Path:
        comes = target == out and not came
        if comes:
            came.append(does)
        if comes and then == "before":
            act[does]()
        done = rename(self, target)
        if comes and then == "after":
            act[does]()
            assert {path.name for path in out.iterdir()} == fetch_module.FILES
        return done

    monkeypatch.setattr(Path, "rename", renamed)
    get(store, manifests[0], out)
    assert came and {path.name for path in out.iterdir()} == fetch_module.FILES
    assert (out / WEIGHTS).read_bytes() == store.get(manifests[0].shards[0].key)
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("removed", ["what was built", "the lock"])
def test_who_is_removing_a_leftover_when_a_fetch_comes_removes_nothing_of_that(
    store: Counting, manifests: list[Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: str
):
    out, unlink, came = tmp_path / "out", os.unlink, list[str]()
    with partial_directory(out, manifests[0].digest) as left:
        (left / WEIGHTS).write_bytes(b"half")
    last = {"what was built": WEIGHTS, "the lock": "lock"}[removed]

    def unlinked(path: Any, **how: Any) -> None:
        unlink(path, **how)
        if not came and Path(path).name == last:
            came.append(last)
            get(store, manifests[0], out)

    monkeypatch.setattr(os, "unlink", unlinked)
    remove_leftovers(out)
    monkeypatch.undo()
    assert came and {path.name for path in out.iterdir()} == fetch_module.FILES
    assert hidden(tmp_path) == []


def test_many_fetches_into_one_cache_at_once_each_return_what_is_whole_and_stays(
    store: Counting, manifests: list[Manifest], tmp_path: Path
):
    rounds, fetchers = 20, 4
    whole, together = store.get(manifests[0].shards[0].key), threading.Barrier(fetchers)

    def fetches(_: int) -> None:
        for number in range(rounds):
            together.wait(TIMEOUT_S)
            out = get(store, manifests[0], tmp_path / str(number))
            assert {path.name for path in out.iterdir()} == fetch_module.FILES
            assert (out / WEIGHTS).read_bytes() == whole

    with ThreadPoolExecutor(fetchers) as pool:
        list(pool.map(fetches, range(fetchers)))
    assert hidden(tmp_path) == []


def test_what_a_kill_left_beside_a_whole_version_goes_with_the_next_look_at_it(
    store: Counting, manifests: list[Manifest], tmp_path: Path
):
    out = get(store, manifests[0], tmp_path / "out")
    for manifest in manifests:
        aside(out, manifest).mkdir()
        (aside(out, manifest) / "lock").touch()
    get(store, manifests[0], out)
    assert hidden(tmp_path) == []


def test_a_shard_that_arrives_whole_is_not_needed_twice(store: Counting, manifests: list[Manifest], tmp_path: Path):
    """Killed after the download and before the name: the next life fetches nothing."""
    out = tmp_path / "out"
    with partial_directory(out, manifests[0].digest) as mine:
        (mine / WEIGHTS).write_bytes(store.get(manifests[0].shards[0].key))
    get(store, manifests[0], out)
    assert store.asked == []


@pytest.mark.parametrize("where", ["values", "header", "all"])
def test_what_a_power_failure_left_of_a_good_version_does_not_condemn_it(
    store: Counting, manifests: list[Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
):
    """NaN among the values; a hole where the header will be, which must not have it put together anew either."""
    monkeypatch.setattr(fetch_module, "assemble", None)
    out, content = tmp_path / "out", store.get(manifests[0].shards[0].key)
    left = {
        "values": content[:-2] + b"\xc0\x7f",
        "header": bytes(SMALL_PART) + content[SMALL_PART:],
        "all": b"\xff" * len(content),
    }
    with partial_directory(out, manifests[0].digest) as mine:
        (mine / WEIGHTS).write_bytes(left[where])
    get(store, manifests[0], out)
    assert (out / WEIGHTS).read_bytes() == content


def test_verify_writes_nothing_and_names_the_tensor_on_every_store(
    store: Counting, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(transfer, "PART_BYTES", PART_BYTES)
    remote = open_store(f"memory://{tmp_path.name}")
    for place in (LocalStore(str(tmp_path / "local")), remote):
        [manifest] = synthetic.publish(place, base)
        before = sorted(path for path in tmp_path.rglob("*"))
        verify(place, manifest, synthetic.EXPECTED)
        assert sorted(path for path in tmp_path.rglob("*")) == before
        content = bytearray(place.get(manifest.shards[0].key))
        content[-1:] = b"\x7f"
        content[-2:-1] = b"\xc0"
        place.put(manifest.shards[0].key, bytes(content))
        bad = Shard(manifest.shards[0].key, len(content), (hashlib.sha256(content).hexdigest(),))
        with pytest.raises(Corrupt, match=f"NaN or infinity in tensor {list(synthetic.EXPECTED)[-1]}"):
            verify(place, with_shard(manifest, bad), synthetic.EXPECTED)


def fetch_until_killed(url: str, out: str, number: str) -> None:
    """What the child process runs: dies in the middle of its fifth part."""
    transfer.PART_BYTES, transfer.CACHED_BYTES = SMALL_PART, 256
    store = Counting(url)

    def die(start: int) -> None:
        if len(store.asked) == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    manifest = Catalog(store, synthetic.ADAPTER).manifest(Version(1, int(number)))
    shard = manifest.shards[0]
    resealed = with_shard(manifest, shard_of(store.get(shard.key), shard.key))
    store.before = die
    get(store, resealed, Path(out))


def test_a_fetch_that_was_killed_goes_on_where_it_was(store: Counting, manifests: list[Manifest], tmp_path: Path):
    out = tmp_path / "out"
    command = [sys.executable, __file__, str(tmp_path / "store"), str(out), "0"]
    killed = subprocess.run(command, timeout=120, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not out.exists() and aside(out, manifests[0]).is_dir()
    get(store, manifests[0], out)
    assert 0 < len(store.asked) < len(manifests[0].shards[0].parts)
    assert (out / WEIGHTS).read_bytes() == store.get(manifests[0].shards[0].key)


if __name__ == "__main__":
    arguments: Any = sys.argv[1:]
    fetch_until_killed(*arguments)
