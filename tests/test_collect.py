"""The collector against readers, pins, rollbacks, committers, other collectors and its own death, on every store."""

import contextlib
import random
import shutil
import threading
from pathlib import Path

import pytest
from tiny_versions import (
    ADAPTER,
    LAYOUT,
    ClockedStore,
    alive,
    data_of,
    manifest_of,
    put_attempt,
    put_version,
    put_versions,
)

from publisher.collect import choose, collect, mark, sweep, void
from publisher.commit import put_manifest
from publisher.retention import Rule
from publisher.rollback import roll_back
from shared.catalog import Catalog
from shared.errors import KeyMissing, StoreError, UsageError
from shared.fates import Fate, Fates
from shared.leases import FORGET_AFTER_S, Lease
from shared.manifest import VOID
from shared.store import Store
from shared.stores import open_store
from shared.versions import Version

RULE = Rule(keep_versions=2, orphan_after_s=3600)
ROUNDS = 40


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def v(number: int, epoch: int = 1) -> Version:
    return Version(epoch, number)


def no_wait(_seconds: float) -> None:
    return


@pytest.fixture
def store(tmp_path: Path) -> ClockedStore:
    """In memory, with a clock of its own."""
    return ClockedStore(open_store(f"memory://collect-{tmp_path.name}"))


def collector(store: Store) -> tuple[Catalog, Fates]:
    return Catalog(store, ADAPTER), Fates(store, LAYOUT, by="collector")


def run(store: Store, rule: Rule = RULE):  # type: ignore[no-untyped-def]
    return collect(*collector(store), rule, sleep=no_wait)


def test_old_versions_go_with_their_data_and_the_others_stay_whole(any_store: Store):
    put_versions(any_store, range(6))
    outcome = run(any_store)
    assert [version.number for version in outcome.collected] == [0, 1, 2, 3]
    assert (outcome.swept.bytes, outcome.swept.objects) == (400, 4)
    assert alive(any_store) == [4, 5]
    assert [len(data_of(any_store, v(n))) for n in range(6)] == [0, 0, 0, 0, 1, 1]
    assert any_store.get(LAYOUT.manifest(v(0))) == VOID
    with pytest.raises(KeyMissing, match="collected"):
        Catalog(any_store, ADAPTER).manifest(v(0))


def test_a_second_collection_finds_nothing_to_do_and_waits_for_nobody(any_store: Store):
    put_versions(any_store, range(6))
    run(any_store)
    before = [(entry.key, entry.size) for entry in any_store.list(ADAPTER)]

    def no_reason(_seconds: float) -> None:
        raise AssertionError("nothing was voided, so there is nobody to wait for")

    outcome = collect(*collector(any_store), RULE, sleep=no_reason)
    assert (outcome.collected, outcome.swept.objects) == ((), 0)
    assert [(entry.key, entry.size) for entry in any_store.list(ADAPTER)] == before


def test_pinned_leased_rolled_back_and_latest_versions_are_never_deleted(any_store: Store):
    put_versions(any_store, range(8))
    catalog, fates = collector(any_store)
    fates.pin(v(0), "the paper's")
    lease = Lease(any_store, LAYOUT, "node")
    lease.take({v(1)})
    roll_back(catalog, v(2), by="test")
    run(any_store)
    assert catalog.versions() == [v(0), v(1), v(2), v(7), v(2, epoch=2)]
    assert all(data_of(any_store, v(n)) for n in (0, 1, 2, 7))
    assert not any(data_of(any_store, v(n)) for n in (3, 4, 5, 6))
    fates.unpin(v(0))
    lease.release()
    run(any_store)
    assert catalog.versions() == [v(2), v(7), v(2, epoch=2)]


def test_the_fate_says_what_was_collected(any_store: Store):
    digest = put_version(any_store, v(0)).digest
    put_versions(any_store, range(1, 4))
    run(any_store)
    last = Fates(any_store, LAYOUT).last(v(0))
    assert last is not None and (last.fate, last.by, last.digest) == (Fate.COLLECTED, "collector", digest)


def test_a_damaged_manifest_may_go_like_any_other(any_store: Store):
    put_versions(any_store, range(4))
    any_store.put(LAYOUT.manifest(v(0)), b"torn by somebody")
    run(any_store)
    assert alive(any_store) == [2, 3] and not data_of(any_store, v(0))


def test_a_reader_that_leases_after_the_choice_keeps_its_data_and_a_later_one_is_told_that_it_expired(any_store: Store):
    put_versions(any_store, range(4))
    catalog, fates = collector(any_store)
    marked = mark(catalog, fates, choose(catalog, fates, RULE).decision.collect)
    early = Lease(any_store, LAYOUT, "early")
    early.take({v(0)})
    manifest = catalog.manifest(v(0))
    void(catalog, marked)
    Lease(any_store, LAYOUT, "late").take({v(1)})
    with pytest.raises(KeyMissing, match="collected"):
        catalog.manifest(v(1))
    swept = sweep(catalog)
    assert swept.in_use == (v(0), v(1)), "whoever holds a lease is believed"
    assert len(any_store.get(manifest.shards[0].key)) == 100
    early.release()
    assert sweep(catalog).versions == (v(0),)


def test_attempts_without_a_manifest_go_when_they_are_old_by_the_stores_clock(store: ClockedStore):
    put_versions(store, range(3))
    put_attempt(store, v(3))
    store.now += 3599
    assert run(store).orphans == ()
    store.now += 2
    outcome = run(store)
    assert outcome.orphans == (v(3),) and not data_of(store, v(3))
    assert Fates(store, LAYOUT).last(v(3)) is None, "it was never a version"


def test_an_attempt_that_goes_on_is_no_orphan(store: ClockedStore):
    put_attempt(store, v(3))
    store.now += 3000
    store.put(f"{LAYOUT.attempt(v(3), 'abc')}/rank-00001.safetensors", b"later")
    store.now += 3000
    assert run(store).orphans == ()


def test_a_committer_that_comes_after_the_void_is_told_and_one_that_comes_before_it_wins(any_store: Store):
    catalog, _ = collector(any_store)
    late, early = (manifest_of(v(n), put_attempt(any_store, v(n))) for n in (0, 1))
    put_manifest(any_store, LAYOUT, early)
    assert void(catalog, (), [v(0), v(1)]) == (v(0),)
    with pytest.raises(StoreError, match="collected before it was committed") as caught:
        put_manifest(any_store, LAYOUT, late)
    assert not caught.value.retryable and "new epoch" in caught.value.hint
    sweep(catalog)
    assert alive(any_store) == [1] and data_of(any_store, v(1)) and not data_of(any_store, v(0))


def test_a_zombie_committer_cannot_bring_a_collected_version_back(any_store: Store):
    manifest = put_version(any_store, v(0))
    put_versions(any_store, range(1, 4))
    run(any_store)
    with pytest.raises(StoreError, match="collected"):
        put_manifest(any_store, LAYOUT, manifest)
    assert alive(any_store) == [2, 3]


def test_a_collector_that_is_killed_at_any_step_is_finished_by_the_next_one(tmp_path: Path):
    """Killed before its n-th change of the store, for every n until it lives."""
    deaths = 0
    while True:
        store = ClockedStore(open_store(f"memory://killed-{tmp_path.name}-{deaths}"))
        put_versions(store, range(6))
        put_attempt(store, v(9))
        Fates(store, LAYOUT).pin(v(1))
        Lease(store, LAYOUT, "node").take({v(2)})
        store.now += 3700  # past the lease, and the attempt is an orphan
        Lease(store, LAYOUT, "node").take({v(2)})
        left = [deaths]

        def die(op: str, key: str, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Killed(f"before {op} {key}")

        store.before = die
        died = True
        with contextlib.suppress(Killed):
            run(store)
            died = False
        store.before = lambda _op, _key: None
        assert data_of(store, v(1)) and data_of(store, v(2)) and data_of(store, v(4)) and data_of(store, v(5))
        for version in Catalog(store, ADAPTER).versions():
            assert data_of(store, version), f"killed at change {deaths}: {version} is committed and has no data"
        run(store)
        stored = {version.number for version in choose(*collector(store), RULE).seen.stored}
        assert (alive(store), stored) == ([1, 2, 4, 5], {1, 2, 4, 5}), f"killed at change {deaths}"
        if not died:
            assert deaths == 12, "each change was the last one once"
            return
        deaths += 1


def test_of_a_pin_and_a_collector_that_meet_one_wins_and_both_know(any_store: Store):
    put_versions(any_store, range(ROUNDS))
    outcomes = set()
    for number in range(ROUNDS):
        both, results = threading.Barrier(2), dict[str, bool]()

        def pin(number: int = number, both: threading.Barrier = both, results: dict[str, bool] = results) -> None:
            both.wait()
            try:
                results["pinned"] = Fates(any_store, LAYOUT, by="pin").pin(v(number))
            except UsageError:
                results["pinned"] = False

        def gather(number: int = number, both: threading.Barrier = both, results: dict[str, bool] = results) -> None:
            both.wait()
            results["collected"] = Fates(any_store, LAYOUT, by="collector").collect(v(number), "race")

        threads = [threading.Thread(target=body) for body in (pin, gather)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert results["pinned"] != results["collected"], f"round {number}: {results}"
        last = Fates(any_store, LAYOUT).last(v(number))
        assert last is not None and last.fate is (Fate.PINNED if results["pinned"] else Fate.COLLECTED)
        outcomes.add(results["pinned"])
    assert len(any_store.list(LAYOUT.fates)) == ROUNDS, "one entry each: the other's was refused"


def test_two_collectors_at_once_do_each_others_work_and_no_harm(any_store: Store):
    put_versions(any_store, range(12))
    Fates(any_store, LAYOUT).pin(v(3))
    both, failures = threading.Barrier(4), []

    def body() -> None:
        both.wait()
        try:
            run(any_store)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=body) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert failures == []
    assert alive(any_store) == [3, 10, 11]
    assert [n for n in range(12) if data_of(any_store, v(n))] == [3, 10, 11]


@pytest.mark.parametrize("seed", range(20))
def test_readers_that_lease_first_never_lose_their_data_to_a_collector_at_any_moment(seed: int, tmp_path: Path):
    """Steps of readers come between any two requests of the collector. Replay: -k 'any_moment and <seed>'."""
    rng = random.Random(seed)
    store = ClockedStore(open_store(f"memory://moments-{tmp_path.name}"))
    put_versions(store, range(8))
    catalog, reading = Catalog(store, ADAPTER), dict[Version, Lease]()

    def a_reader_comes(_op: str, key: str) -> None:
        if "/leases/" in key or rng.random() < 0.6:
            return
        version = v(rng.randrange(8))
        lease = Lease(store, LAYOUT, f"reader-{len(reading)}")
        lease.take({version})
        with contextlib.suppress(KeyMissing):
            catalog.manifest(version)
            reading[version] = lease

    store.before = a_reader_comes
    run(store)
    run(store)
    store.before = lambda _op, _key: None
    lost = [version for version in reading if not data_of(store, version)]
    assert reading and not lost, f"seed {seed}"
    for lease in reading.values():
        lease.release()
    run(store)
    assert set(alive(store)) >= {6, 7}


@pytest.mark.parametrize("skew_s", [-600.0, 600.0])
def test_a_collectors_clock_that_is_ten_minutes_off_changes_nothing(store: ClockedStore, skew_s: float):
    put_versions(store, range(6))
    put_attempt(store, v(7))
    Lease(store, LAYOUT, "node").take({v(0)})
    store.now += 290
    catalog = Catalog(store, ADAPTER)
    skewed = Fates(store, LAYOUT, by="skewed", clock=lambda: store.now + skew_s)
    outcome = collect(catalog, skewed, Rule(keep_versions=2, keep_younger_s=280, orphan_after_s=300), sleep=no_wait)
    assert ([version.number for version in outcome.collected], outcome.orphans) == ([1, 2, 3], ())
    store.now += 20
    outcome = collect(catalog, skewed, Rule(keep_versions=2, keep_younger_s=280, orphan_after_s=300), sleep=no_wait)
    assert ([version.number for version in outcome.collected], outcome.orphans) == ([0], (v(7),))


def test_an_empty_store_and_one_without_retention_are_left_as_they_are(any_store: Store):
    run(any_store)
    put_versions(any_store, range(5))
    before = [entry.key for entry in any_store.list(ADAPTER)]
    assert run(any_store, Rule()).collected == ()
    assert [entry.key for entry in any_store.list(ADAPTER)] == before


def test_leases_of_the_long_dead_are_deleted_and_younger_ones_are_not(store: ClockedStore):
    put_versions(store, range(2))
    Lease(store, LAYOUT, "dead").take({v(0)})
    store.now += FORGET_AFTER_S
    Lease(store, LAYOUT, "silent").take({v(0)})
    store.now += 3700
    run(store)
    assert [entry.key.rsplit("/", 1)[-1][:6] for entry in store.list(LAYOUT.leases)] == ["silent"]


def test_what_killed_writers_left_half_written_goes_after_a_day(tmp_path: Path):
    import os

    store = open_store(str(tmp_path))
    put_versions(store, range(2))
    folder = tmp_path / "policy" / "data" / "00000001-000000000001" / "abc"
    old, young = (folder / f".rank-00001.safetensors.{letter * 32}" for letter in "da")
    for path in (old, young):
        path.write_bytes(b"half")
    days_ago = old.stat().st_mtime - 2 * 86400
    os.utime(old, (days_ago, days_ago))
    assert run(store).leftovers == 1
    assert young.exists() and not old.exists()


def test_what_somebody_else_put_there_under_odd_names_stays_and_holds_nobody_up(tmp_path: Path):
    store = open_store(str(tmp_path))
    put_versions(store, range(4))
    odd = [
        tmp_path / "policy" / "data" / "00000001-000000000000" / "abc" / "copy of it.txt",
        tmp_path / "policy" / "fates" / "00000001-000000000001" / "\u00b2.json",
        tmp_path / "policy" / "rollbacks" / "00000001-000000000002" / "notes.txt",
    ]
    for path in odd:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    run(store)
    assert alive(store) == [2, 3] and all(path.exists() for path in odd)
    assert data_of(store, v(0)) == [str(odd[0].relative_to(tmp_path))]


@pytest.mark.parametrize(
    "void",
    ["backup/00000001-000000000005.json", "00000001-000000000005", "00000001-\u0660" + "\u0660" * 10 + "\u0665.json"],
)
def test_a_void_under_a_name_that_only_resembles_a_manifests_costs_no_version_its_data(tmp_path: Path, void: str):
    store = open_store(str(tmp_path))
    put_versions(store, range(6))
    copy = tmp_path / "policy" / "manifests" / void
    copy.parent.mkdir(exist_ok=True)
    copy.write_bytes(VOID)
    run(store, Rule())
    assert alive(store) == list(range(6)) and all(data_of(store, v(n)) for n in range(6)) and copy.exists()


def test_a_copy_of_every_manifest_beside_them_is_no_version(tmp_path: Path):
    store = open_store(str(tmp_path))
    put_versions(store, range(5))
    for folder in ("manifests", "data"):
        shutil.copytree(tmp_path / "policy" / folder, tmp_path / "copy")
        (tmp_path / "copy").rename(tmp_path / "policy" / folder / "backup")
    assert [version.number for version in run(store).collected] == [0, 1, 2]
    assert (alive(store), run(store).collected) == ([3, 4], ())
    assert len(list((tmp_path / "policy" / "data" / "backup").rglob("*.safetensors"))) == 5


def test_a_fate_that_lies_somewhere_else_is_none(tmp_path: Path):
    store = open_store(str(tmp_path))
    put_versions(store, range(2))
    log = LAYOUT.fate(v(0), 1).removesuffix("/000001.json")
    for name in ("backup/000001.json", "1.json", "000001"):
        store.put(f"{log}/{name}", b'{"at":1,"by":"x","fate":"pinned","reason":""}')
    fates = Fates(store, LAYOUT)
    assert (fates.logged(), fates.last(v(0))) == ({}, None)
    assert fates.pin(v(0)) and fates.logged() == {v(0): 1}


def test_a_store_that_fails_in_the_middle_costs_nothing_but_another_run(store: ClockedStore):
    put_versions(store, range(6))
    fails = [True]

    def refuse(op: str, key: str) -> None:
        if fails[0] and "/manifests/" in key:
            raise StoreError("503", op=op, key=key, retryable=True)

    store.before = refuse
    with pytest.raises(StoreError, match="503"):
        run(store)
    assert alive(store) == list(range(6))
    fails[0] = False
    run(store)
    assert alive(store) == [4, 5]


def test_a_fate_that_cannot_be_read_keeps_its_version(store: ClockedStore):
    put_versions(store, range(5))
    for number, content in enumerate([b"{", b'{"fate":"eaten","by":"","reason":"","at":1}']):
        store.put(LAYOUT.fate(v(number), 1), content)
    run(store)
    assert alive(store) == [0, 1, 3, 4]


def test_pins_come_and_go_until_the_version_is_collected(any_store: Store):
    fates = Fates(any_store, LAYOUT, by="somebody")
    assert fates.last(v(0)) is None and not fates.unpin(v(0))
    assert fates.pin(v(0), "good") and not fates.pin(v(0), "again")
    assert not fates.collect(v(0), "retention")
    assert fates.unpin(v(0)) and fates.pin(v(0)) and fates.unpin(v(0))
    assert fates.collect(v(0), "retention", "d1") and fates.collect(v(0), "retention", "d2")
    with pytest.raises(UsageError, match="0001-000000 was collected by somebody"):
        fates.pin(v(0))
    last = fates.last(v(0))
    assert last is not None and (last.n, last.digest) == (5, "d1")
    assert fates.logged() == {v(0): 5}
