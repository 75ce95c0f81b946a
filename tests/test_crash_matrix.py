"""SIGKILL before every change that a process makes to a disk, in every part of a version's way.

What a killed process leaves is read by the real readers: the latest whole version is there and verified, the one under
way is whole or invisible. Then the next life does its work, and nothing is left behind that nobody owns.
"""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import synthetic
from crash_points import LAYOUT, NODE, RECORD, End, Life, Nursery, activate, collect_garbage, go_back, in_parts_of
from memory_folder import memory_folder

from publisher.epochs import Claim, claim_epoch
from shared import strict_json, transfer
from shared.catalog import Catalog
from shared.fetch import MANIFEST, fetch, verify
from shared.layout import version_of
from shared.local_store import LocalStore
from shared.manifest import PART_BYTES
from shared.versions import Version

SMALL_PART = 4096  # bytes
AT_ONCE = 4  # requests under way; most of a multi-rank one is waiting
FIRST, SECOND = Version(1, 0), Version(1, 1)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


@pytest.fixture
def folder() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


@dataclass(frozen=True)
class Bench:
    """A folder with a base model, and a store that is copied for every kill."""

    folder: Path
    base: Path
    claim: Claim

    @classmethod
    def made(cls, folder: Path, count: int) -> "Bench":
        """With `count` versions on the store."""
        store, base = LocalStore(str(folder / "template")), synthetic.write_base(folder / "base")
        claim = claim_epoch(store, LAYOUT)
        synthetic.publish(store, base, count, claim=claim)
        return cls(folder, base, claim)

    def copy(self, name: object) -> Path:
        """A place of its own for one kill, with the store in it."""
        place = self.folder / f"kill-{name}"
        shutil.copytree(self.folder / "template", place / "store")
        return place


def publishing(bench: Bench, place: Path, rank: int = 0, world: int = 1, store: str = "store", **how: Any) -> Life:
    """A rank's part of the second version."""
    words = {"url": str(place / store), "base": str(bench.base), "version": list(SECOND), "nonce": bench.claim.nonce}
    return Life("publish", {**words, "rank": rank, "world": world}, **how)


def demand_readable(store: LocalStore) -> list[Version]:
    """Check that every version reads back and that the hint does not lead; the versions."""
    catalog = Catalog(store, synthetic.ADAPTER)
    versions = catalog.versions()
    for version in versions:
        verify(store, catalog.manifest(version), synthetic.EXPECTED)
    hint = catalog.hint()
    assert hint is not None and hint[0] in versions
    return versions


def demand_recovery(store: LocalStore, bench: Bench) -> None:
    """Check that a new life publishes."""
    [manifest] = synthetic.publish(store, bench.base)
    assert manifest.version == Version(2, 0)
    assert demand_readable(store)[-1] == manifest.version
    demand_clean(store)


def demand_clean(store: LocalStore) -> None:
    """Check that nothing is stored that no version owns, once a collector has come by a day later."""
    for entry in store.list(LAYOUT.probes):
        os.utime(store.root / entry.key, (0, 0))
    collect_garbage(str(store.root))
    assert not store.list(LAYOUT.probes)
    owners = {version_of(entry.key) for entry in store.list(LAYOUT.data)}
    assert owners == set(Catalog(store, synthetic.ADAPTER).versions())
    store.sweep(synthetic.ADAPTER, older_than_s=0)
    assert not list(store.root.rglob(".*"))


def each(work: Callable[[int], None], count: int) -> None:
    """Do work 0 .. count - 1, some of it at once."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(work, range(count)))


def unharmed(nursery: Nursery, lives: list[Life], which: int = 0) -> int:
    """How many changes one of some lives makes when nobody dies."""
    ends = nursery.run(lives)
    assert [(end.signal, end.error) for end in ends] == [(0, "")] * len(lives), ends
    return ends[which].changes


def demand_killed(end: End, why: object) -> None:
    assert end.signal == signal.SIGKILL, (why, end)


def told(capsys: pytest.CaptureFixture[str], what: str, kills: int) -> None:
    with capsys.disabled():
        print(f"\ncrash matrix: {what}: {kills} kills", end="")
    assert kills > 0


def test_a_lone_publisher_killed_at_any_change_leaves_its_version_whole_or_invisible(
    nursery: Nursery, folder: Path, capsys: pytest.CaptureFixture[str]
):
    bench = Bench.made(folder, 1)
    changes = unharmed(nursery, [publishing(bench, bench.copy("none"))])
    seen = set[Version]()

    def kill(at: int) -> None:
        place = bench.copy(at)
        store = LocalStore(str(place / "store"))
        [end] = nursery.run([publishing(bench, place, kill_at=at)])
        demand_killed(end, at)
        versions = demand_readable(store)
        assert versions in ([FIRST], [FIRST, SECOND]), at
        seen.add(versions[-1])
        demand_recovery(store, bench)
        shutil.rmtree(place)

    each(kill, changes)
    assert seen == {FIRST, SECOND}
    told(capsys, "publish, 1 rank", changes)


def test_a_trainers_first_life_killed_at_any_change_is_followed_by_a_second(
    nursery: Nursery, folder: Path, capsys: pytest.CaptureFixture[str]
):
    """From an empty path on: the layout, the claim of the epoch, two versions."""
    base = synthetic.write_base(folder / "base")

    def training(name: object, kill_at: int | None = None) -> Life:
        return Life("lorasync", {"words": ["train", str(folder / str(name) / "store"), str(base), "2"]}, kill_at)

    def kill(at: int) -> None:
        [end] = nursery.run([training(at, at)])
        demand_killed(end, at)
        store = LocalStore(str(folder / str(at) / "store"))
        catalog = Catalog(store, synthetic.ADAPTER)
        before = catalog.versions()
        assert before == [FIRST, SECOND][: len(before)], at
        claimed = len(store.list(LAYOUT.epochs))
        assert claimed == 1 or not store.list(LAYOUT.data), at
        [manifest] = synthetic.publish(store, base)
        assert manifest.version == Version(claimed + 1, 0), at
        demand_clean(store)
        assert demand_readable(store)[-1] == manifest.version, at
        shutil.rmtree(folder / str(at))

    changes = unharmed(nursery, [training("none")])
    each(kill, changes)
    told(capsys, "first life", changes)


@pytest.mark.parametrize("world", [4, 8])
def test_when_any_rank_is_killed_the_others_commit_what_is_whole_or_name_it(
    nursery: Nursery, folder: Path, world: int, capsys: pytest.CaptureFixture[str]
):
    bench, kills = Bench.made(folder, 1), 0
    committed = set[bool]()
    for victim in (0, world // 2, world - 1):

        def lives(place: Path, kill_at: int | None, victim: int = victim) -> list[Life]:
            others = [publishing(bench, place, rank, world) for rank in range(world) if rank != victim]
            return [*others, publishing(bench, place, victim, world, last=True, kill_at=kill_at)]

        def kill(at: int, victim: int = victim) -> None:
            place = bench.copy(f"{victim}-{at}")
            store, why = LocalStore(str(place / "store")), f"rank {victim} of {world} at change {at}"
            *others, end = nursery.run(lives(place, at))
            demand_killed(end, why)
            versions = demand_readable(store)
            attempt = LAYOUT.attempt(SECOND, bench.claim.nonce)
            records = [entry.key for entry in store.list(attempt) if RECORD.search(entry.key)]
            if len(records) == world:
                assert versions == [FIRST, SECOND], why
                assert [other.error for other in others] == [""] * (world - 1), why
            else:
                assert versions == [FIRST], why
                assert all(f"missing {victim}" in other.error for other in others), (why, others)
            committed.add(versions[-1] == SECOND)
            demand_recovery(store, bench)
            shutil.rmtree(place)

        changes = unharmed(nursery, lives(bench.copy(f"none-{victim}"), None), -1)
        each(kill, changes)
        kills += changes
    assert committed == {True, False}
    told(capsys, f"publish, {world} ranks", kills)


@pytest.mark.parametrize(("world", "part_bytes"), [(1, PART_BYTES), (4, PART_BYTES), (8, PART_BYTES), (1, SMALL_PART)])
def test_a_download_killed_at_any_change_is_never_taken_for_whole_and_is_mended_by_the_next(
    nursery: Nursery,
    folder: Path,
    world: int,
    part_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    bench = Bench.made(folder, 1)
    url, store = str(folder / "template"), LocalStore(str(folder / "template"))
    nursery.run([publishing(bench, folder, rank, world, store="template") for rank in range(world)])
    monkeypatch.setattr(transfer, "PART_BYTES", part_bytes)
    manifest = in_parts_of(part_bytes, store, Catalog(store, synthetic.ADAPTER).manifest(SECOND))
    parts = len(manifest.shards[0].parts)
    assert len(manifest.shards) == world and (parts > transfer.THREADS) is (part_bytes == SMALL_PART)

    def downloading(place: Path, kill_at: int | None = None) -> Life:
        words = {"url": url, "version": list(SECOND), "part_bytes": part_bytes}
        return Life("download", {**words, "directory": str(place / "out")}, kill_at)

    def kill(at: int) -> None:
        place = folder / f"kill-{at}"
        [end] = nursery.run([downloading(place, at)])
        demand_killed(end, at)
        assert not (place / "out").exists() or same(place / "out", whole), at
        fetch(store, manifest, synthetic.EXPECTED, place / "out", base_name="base")
        assert same(place / "out", whole), at
        assert [path.name for path in place.iterdir()] == ["out"], at
        shutil.rmtree(place)

    changes = unharmed(nursery, [downloading(folder / "none")])
    whole = folder / "none" / "out"
    assert (whole / MANIFEST).read_bytes() == manifest.to_bytes()
    each(kill, changes)
    told(capsys, f"download, {world} shards, the first in {parts} parts", changes)


def test_a_collector_killed_at_any_change_deletes_nothing_in_use_and_is_finished_by_the_next(
    nursery: Nursery, folder: Path, capsys: pytest.CaptureFixture[str]
):
    bench = Bench.made(folder, 4)
    template = LocalStore(str(folder / "template"))
    orphan = LAYOUT.attempt(Version(1, 9), bench.claim.nonce)
    template.put(f"{orphan}/rank-00000.json", b"a dead rank's record")
    kept = [Version(1, 2), Version(1, 3)]

    def collecting(place: Path, kill_at: int | None = None) -> Life:
        return Life("collect", {"url": str(place / "store")}, kill_at)

    def kill(at: int) -> None:
        place = bench.copy(at)
        store = LocalStore(str(place / "store"))
        [end] = nursery.run([collecting(place, at)])
        demand_killed(end, at)
        assert demand_readable(store)[-2:] == kept, at
        demand_clean(store)
        assert demand_readable(store) == kept, at
        shutil.rmtree(place)

    changes = unharmed(nursery, [collecting(bench.copy("none"))])
    each(kill, changes)
    told(capsys, "gc", changes)


def test_a_rollback_killed_at_any_change_is_done_or_not_and_the_same_command_does_it_after_all(
    nursery: Nursery, folder: Path, capsys: pytest.CaptureFixture[str]
):
    bench = Bench.made(folder, 4)

    def going_back(place: Path, kill_at: int | None = None) -> Life:
        return Life("rollback", {"url": str(place / "store"), "version": list(FIRST)}, kill_at)

    def kill(at: int) -> None:
        place = bench.copy(at)
        store = LocalStore(str(place / "store"))
        catalog = Catalog(store, synthetic.ADAPTER)
        [end] = nursery.run([going_back(place, at)])
        demand_killed(end, at)
        before = demand_readable(store)
        assert before[:4] == [Version(1, number) for number in range(4)], at
        assert before[4:] in ([], [Version(2, 0)]), at
        go_back(str(store.root), list(FIRST))
        for _ in range(2):  # before and after a collector that would have let the first version go
            newest = demand_readable(store)[-1]
            assert newest.number == 0 and newest.epoch > 1, at
            assert catalog.manifest(newest).shards == catalog.manifest(FIRST).shards, at
            collect_garbage(str(store.root))
        shutil.rmtree(place)

    changes = unharmed(nursery, [going_back(bench.copy("none"))])
    each(kill, changes)
    told(capsys, "rollback", changes)


def same(one: Path, other: Path) -> bool:
    return {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in other.iterdir()}


def test_a_node_killed_at_any_change_serves_the_latest_in_its_next_life_and_keeps_nothing_else(
    nursery: Nursery, folder: Path, capsys: pytest.CaptureFixture[str]
):
    bench = Bench.made(folder, 2)

    def activating(place: Path, kill_at: int | None = None) -> Life:
        words = {"url": str(place / "store"), "base": str(bench.base), "cache": str(place / "cache")}
        return Life("activate", words, kill_at)

    def kill(at: int) -> None:
        place = bench.copy(at)
        store = LocalStore(str(place / "store"))
        catalog = Catalog(store, synthetic.ADAPTER)
        [end] = nursery.run([activating(place, at)])
        demand_killed(end, at)
        receipts = [entry.key for entry in store.list(LAYOUT.receipts)]
        assert receipts in ([], [LAYOUT.receipt(SECOND, NODE)]), at
        activate(str(place / "store"), str(bench.base), str(place / "cache"))
        receipt = strict_json.load_object(store.get(LAYOUT.receipt(SECOND, NODE)), key="receipt", max_bytes=10_000)
        assert receipt["digest"] == catalog.manifest(SECOND).digest, at
        assert demand_readable(store) == [FIRST, SECOND], at
        assert [path.name for path in (place / "cache" / synthetic.ADAPTER).iterdir()] == [str(SECOND)], at
        shutil.rmtree(place)

    changes = unharmed(nursery, [activating(bench.copy("none"))])
    each(kill, changes)
    told(capsys, "activate", changes)
