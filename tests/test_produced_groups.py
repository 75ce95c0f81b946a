"""How many groups exist: own files are counted at once, others' by a listing now and then, none twice."""

from collections.abc import Callable
from pathlib import Path

import pytest

from rollout.pace import LIST_ALL_EVERY_S, OPEN_VERSIONS, ProducedGroups
from shared.errors import StoreError
from shared.layout import Layout
from shared.local_store import LocalStore
from shared.store import Entry
from shared.versions import Version

LAYOUT = Layout("policy")
LIST_EVERY_S = 2.0


class CountingStore(LocalStore):
    """Counts its listings and what they answered; `down` refuses them; `meanwhile` runs in the middle of one, after the
    keys were read.
    """

    listings = 0
    listed = 0
    down = False
    meanwhile: Callable[[], None] = staticmethod(lambda: None)

    def list(self, prefix: str, after: str = "") -> list[Entry]:
        self.listings += 1
        if self.down:
            raise StoreError("connection reset", op="list", retryable=True)
        entries = super().list(prefix, after)
        self.listed += len(entries)
        self.meanwhile()
        return entries


class Bench:
    def __init__(self, folder: Path) -> None:
        self.now, self.sequence = 0.0, 0
        self.store = CountingStore(f"file://{folder}")
        self.produced = ProducedGroups(self.store, LAYOUT, LIST_EVERY_S, clock=lambda: self.now)

    def put(self, groups: int, node: str, number: int = 0) -> str:
        self.sequence += 1
        key = f"{LAYOUT.trajectories(Version(1, number))}/{node}-life-{self.sequence:06d}-g{groups}.parquet"
        self.store.put(key, b"x")
        return key

    def put_own(self, groups: int) -> None:
        self.produced.add(self.put(groups, "ours"))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_own_files_count_at_once_and_without_a_listing(bench: Bench):
    assert bench.produced.count() == 0
    bench.put_own(8)
    bench.put_own(3)
    assert bench.produced.count() == 11
    assert bench.store.listings == 1


def test_files_of_others_and_of_an_earlier_life_count_from_the_next_listing_on(bench: Bench):
    bench.put(5, "ours")
    assert bench.produced.count() == 5
    bench.put(8, "theirs")
    bench.now = LIST_EVERY_S / 2
    assert bench.produced.count() == 5
    bench.now = LIST_EVERY_S
    assert bench.produced.count() == 13
    assert bench.store.listings == 2


def test_no_file_counts_twice_and_none_is_lost_that_is_put_during_a_listing(bench: Bench):
    bench.put_own(8)
    bench.store.meanwhile = lambda: bench.put_own(4)
    assert bench.produced.count() == 12
    bench.store.meanwhile = lambda: None
    for second in range(1, 10):
        bench.now = float(second)
        assert bench.produced.count() == 12


def test_versions_that_can_hardly_grow_are_listed_once_a_minute_and_counted_all_the_while(bench: Bench):
    versions = 40
    for number in range(versions):
        bench.put(2, "theirs", number)
    assert (bench.produced.count(), bench.store.listed) == (2 * versions, versions)
    bench.store.listed = 0
    for _ in range(5):
        bench.now += LIST_EVERY_S
        assert bench.produced.count() == 2 * versions
    assert bench.store.listed == 5 * OPEN_VERSIONS
    bench.put(3, "theirs", versions - 1)
    bench.put(4, "theirs", 0)  # late by 39 versions
    bench.produced.add(bench.put(5, "ours", 1))
    bench.now += LIST_EVERY_S
    assert bench.produced.count() == 2 * versions + 3 + 5
    bench.now = LIST_ALL_EVERY_S
    assert bench.produced.count() == 2 * versions + 3 + 5 + 4


def test_the_more_files_a_listing_shows_the_longer_the_next_one_waits(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    page = 10
    monkeypatch.setattr("rollout.pace.PAGE", page)
    for _ in range(2 * page + 1):
        bench.put(1, "theirs")
    seconds = 0.0
    while seconds < 12 * LIST_EVERY_S:
        assert bench.produced.count() == 2 * page + 1
        bench.now = seconds = seconds + LIST_EVERY_S / 2
    assert bench.store.listings == 12 / 3, "a listing of three pages counts as three"


def test_a_listing_that_failed_is_asked_for_again_at_once(bench: Bench):
    bench.put(8, "theirs")
    bench.store.down = True
    with pytest.raises(StoreError):
        bench.produced.count()
    bench.store.down = False
    assert bench.produced.count() == 8
