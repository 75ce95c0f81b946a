"""The power goes after every single change that a publishing trainer and a serving node make to their disk.

The real store, commit and receipts run once over a disk that remembers (recorded_disk.py). Then every state that this
disk may be in is made real and read by the real readers: what was acknowledged is there, and nothing torn is seen.
"""

import hashlib
import os
import random
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import synthetic
from memory_folder import memory_folder
from recorded_disk import KEPT_BY, RecordedDisk, State

from publisher.collect import collect
from publisher.commit import Rank
from publisher.convert import convert
from publisher.epochs import claim_epoch
from publisher.retention import Rule
from shared import strict_json
from shared.catalog import Catalog
from shared.errors import StoreError
from shared.fates import Fates
from shared.fetch import verify
from shared.layout import Layout, version_of
from shared.local_store import LocalStore
from shared.manifest import Manifest
from shared.versions import Version

PIECE_BYTES = 200  # of a shard, written at a time: as many states of the disk as it has pieces
SEED = int(os.environ.get("DISK_SEED", "20261123"))
DRAWS = 6  # between all and nothing, after each change
WRITE_BYTES = 2000
STORE = "mnt/adapters"  # below the disk's top; made by the code under test
LAYOUT = Layout(synthetic.ADAPTER)


class Witness(LocalStore):
    """A store that tells the disk what it promised: before a write the key is open, after it the bytes are durable."""

    def __init__(self, disk: RecordedDisk, url: str) -> None:
        super().__init__(url)
        self._disk = disk

    @contextmanager
    def _witnessed(self, key: str, content: bytes) -> Iterator[None]:
        self._disk.tell(("open", key, b""))
        yield
        self._disk.tell(("durable", key, content))

    def put(self, key: str, content: bytes) -> None:
        with self._witnessed(key, content):
            super().put(key, content)

    def put_if_absent(self, key: str, content: bytes) -> bool:
        with self._witnessed(key, content):
            return super().put_if_absent(key, content)

    def put_stream(self, key: str, chunks: Iterable[bytes | memoryview], size: int) -> None:
        content = b"".join(chunks)
        pieces = [content[at : at + PIECE_BYTES] for at in range(0, size, PIECE_BYTES)]
        with self._witnessed(key, content):
            super().put_stream(key, pieces, size)

    def delete(self, key: str) -> None:
        self._disk.tell(("open", key, b""))
        super().delete(key)


@pytest.fixture
def top(tmp_path: Path) -> Path:
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


@pytest.fixture
def scratch() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write_base(tmp_path_factory.mktemp("base"))


def publish_and_serve(disk: RecordedDisk, store: LocalStore, base: Path) -> None:
    """A trainer's life of four versions, a node's receipts, a pin, and the collector, who may take the second alone."""
    publisher = synthetic.open_publisher(
        store, base, on_published=lambda done: disk.tell(("published", done.version, b""))
    )
    for number in range(4):
        publisher.submit(number, convert(synthetic.BASE, synthetic.factors(number)), training={"step": number})
    publisher.close()
    for number in range(2):
        store.put_if_absent(LAYOUT.receipt(Version(1, number), "node-0"), strict_json.dumps({"version": number}))
    Fates(store, LAYOUT).pin(Version(1, 0), "an evaluation")
    disk.tell(("collecting", Version(1, 1), b""))
    collect_all(store)
    assert Catalog(store, synthetic.ADAPTER).versions() == [Version(1, 0), Version(1, 2), Version(1, 3)]


def collect_all(store: LocalStore) -> None:
    """All that may go: what is neither pinned nor of the newest two, and every attempt without a manifest."""
    rule = Rule(keep_versions=2, orphan_after_s=-1.0)
    collect(Catalog(store, synthetic.ADAPTER), Fates(store, LAYOUT), rule, sleep=lambda _: None)


class Survivors:
    """Reads what is left. A manifest's bytes that were verified once with the same shards need no second look."""

    def __init__(self, scratch: Path) -> None:
        self._scratch, self._verified = scratch, set[str]()
        self.count = 0

    def demand(self, state: State) -> None:
        """Check a state.

        Raises:
            AssertionError: says what was lost or torn, and after how many changes.
        """
        shutil.rmtree(self.demanded(state).root.parents[1])

    def demanded(self, state: State) -> LocalStore:
        """Check a state; the store as it was left."""
        self.count += 1
        where = f"after {state.changes} changes, {state.draw}; replay: DISK_SEED={SEED} pytest {__file__}"
        folder = self._scratch / str(self.count)
        folder.mkdir()
        state.write_to(folder)
        store = LocalStore(str(folder / STORE))
        catalog = Catalog(store, synthetic.ADAPTER)
        there = catalog.versions()
        for version in there:
            try:
                self._verify(store, catalog.manifest(version))
            except Exception as error:
                raise AssertionError(f"{version} is committed and cannot be read {where}: {error}") from error
        self._demand_told(store, there, state.told, where)
        return store

    def _verify(self, store: LocalStore, manifest: Manifest) -> None:
        held = b"".join(store.get(shard.key) for shard in manifest.shards)
        seen = manifest.digest + hashlib.sha256(held).hexdigest()
        if seen not in self._verified:
            scratch = self._scratch / f"verify-{self.count}"
            scratch.mkdir(exist_ok=True)
            verify(store, manifest, synthetic.EXPECTED)
            self._verified.add(seen)

    @staticmethod
    def _demand_told(store: LocalStore, there: list[Version], told: list[Any], where: str) -> None:
        promised: dict[str, bytes] = {}
        alive = set[Version]()
        for what, about, content in told:
            if what == "open":
                promised.pop(about, None)
            elif what == "durable":
                promised[about] = content
            elif what == "published":
                alive.add(about)
            else:
                alive.discard(about)
        assert alive <= set(there), f"{alive - set(there)} was acknowledged and is gone {where}"
        for key, content in promised.items():
            try:
                assert store.get(key) == content, f"{key} holds other bytes than were acknowledged {where}"
            except StoreError as error:
                raise AssertionError(f"{key} was acknowledged and is gone {where}") from error


def recorded_run(top: Path, base: Path, keeps: set[str] = KEPT_BY) -> RecordedDisk:
    disk = RecordedDisk(top, keeps)
    with disk.recording():
        publish_and_serve(disk, Witness(disk, str(top / STORE)), base)
    return disk


def test_whenever_the_power_goes_acknowledged_versions_are_whole_and_no_torn_one_is_seen(
    top: Path, base: Path, scratch: Path, capsys: pytest.CaptureFixture[str]
):
    disk, survivors = recorded_run(top, base), Survivors(scratch)
    for state in disk.states(random.Random(SEED), DRAWS):
        survivors.demand(state)
    with capsys.disabled():
        print(f"\npower loss: {disk.count} changes, {survivors.count} different states read, seed {SEED}")
    assert survivors.count > 1000


def test_ranks_that_write_at_the_same_time_lose_no_more_than_a_lone_one(top: Path, base: Path, scratch: Path):
    disk, survivors = RecordedDisk(top), Survivors(scratch)
    with disk.recording():
        claim = claim_epoch(Witness(disk, str(top / STORE)), LAYOUT)

        def publish(rank: int) -> None:
            store = Witness(disk, str(top / STORE))
            publisher = synthetic.open_publisher(
                store,
                base,
                claim,
                rank=Rank(rank, 3),
                on_published=lambda done: disk.tell(("published", done.version, b"")),
            )
            held = synthetic.rank_factors(synthetic.factors(0), rank, 3)
            publisher.submit(0, convert(synthetic.BASE, held), training={})
            publisher.close()

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(publish, range(3)))
    for state in disk.states(random.Random(SEED), DRAWS):
        survivors.demand(state)
    assert survivors.count > 300


def test_after_a_power_loss_a_new_life_publishes_and_nothing_half_written_stays(top: Path, base: Path, scratch: Path):
    disk, survivors = recorded_run(top, base), Survivors(scratch)
    states = list(disk.states(random.Random(SEED), DRAWS))
    for state in random.Random(SEED).sample(states, 12):
        store = survivors.demanded(state)
        claim = claim_epoch(store, LAYOUT)
        assert claim.epoch >= max(
            (version.epoch for version in Catalog(store, synthetic.ADAPTER).versions()), default=0
        )
        [manifest] = synthetic.publish(store, base, claim=claim)
        assert Catalog(store, synthetic.ADAPTER).newest() == manifest.version
        collect_all(store)
        owners = {version_of(entry.key) for entry in store.list(LAYOUT.data)}
        assert owners == set(Catalog(store, synthetic.ADAPTER).versions())
        store.sweep(synthetic.ADAPTER, older_than_s=0)
        assert not list(store.root.rglob(".*"))


@pytest.mark.parametrize("kept", sorted(KEPT_BY))
def test_a_disk_that_keeps_only_files_or_only_names_is_caught(top: Path, base: Path, scratch: Path, kept: str):
    disk, survivors = recorded_run(top, base, keeps={kept}), Survivors(scratch)
    with pytest.raises(AssertionError, match="replay"):
        for state in disk.states(random.Random(SEED), DRAWS):
            survivors.demand(state)


def test_a_directory_that_another_rank_made_and_had_no_time_to_sync_does_not_take_our_shard_with_it(
    top: Path, scratch: Path
):
    """One rank makes a directory; before it can sync it, the other puts its shard there; then the power goes."""
    keys = [f"policy/data/00000001-000000000000/nonce/rank-{rank:05d}.json" for rank in range(2)]
    survivors, moments = Survivors(scratch), 0
    while True:
        folder = top / str(moments)
        folder.mkdir()
        disk, syncs = RecordedDisk(folder), 0
        ours, theirs = (Witness(disk, str(folder / STORE)) for _ in range(2))

        def in_between(
            name: str, args: tuple[Any, ...], disk: RecordedDisk = disk, theirs: Witness = theirs, moment: int = moments
        ) -> None:
            nonlocal syncs
            if name == "fsync":
                syncs += 1
                if syncs == moment + 1:
                    theirs.put(keys[1], b"theirs")

        disk.before = in_between
        with disk.recording():
            ours.put(keys[0], b"ours")
        for state in disk.states(random.Random(SEED), draws=1):
            survivors.demand(state)
        if syncs <= moments:
            break
        moments += 1
    assert moments >= 7  # one for every directory of the way, and the file itself


def test_a_commit_repeated_after_an_io_error_is_durable_when_it_says_so(top: Path, scratch: Path):
    """The name was linked, its fsync failed, the caller tried again: finding it there does not make it durable."""
    disk = RecordedDisk(top)
    store, failed = Witness(disk, str(top / STORE)), False

    def fail_once(name: str, args: tuple[Any, ...]) -> None:
        nonlocal failed
        if name == "fsync" and not failed and (store.root / "m" / "1").exists():
            failed = True
            raise OSError(5, "Input/output error")

    disk.before = fail_once
    with disk.recording():
        with pytest.raises(StoreError) as caught:
            store.put_if_absent("m/1", b"ours")
        assert caught.value.retryable
        assert store.put_if_absent("m/1", b"ours")
    survivors = Survivors(scratch)
    for state in disk.states(random.Random(SEED), DRAWS):
        survivors.demand(state)
