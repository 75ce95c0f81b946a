"""Collecting behind the training: it goes on when the store fails, says so once, and ends at once."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_versions import ADAPTER, LAYOUT, ClockedStore, alive, data_of, put_attempt, put_versions

from publisher.collector import Collector
from publisher.retention import Rule
from shared.catalog import Catalog
from shared.errors import StoreError
from shared.stores import open_store
from shared.versions import Version

RULE = Rule(keep_versions=2)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline, nothing = time.monotonic() + 60, threading.Event()
    while not condition():
        assert time.monotonic() < deadline
        nothing.wait(0.01)


@pytest.fixture
def store(tmp_path: Path) -> ClockedStore:
    return ClockedStore(open_store(f"memory://collector-{tmp_path.name}"))


@pytest.fixture
def collector(store: ClockedStore) -> Iterator[Collector]:
    made = Collector(Catalog(store, ADAPTER), RULE, interval_s=0.01, grace_s=0.0)
    yield made
    made.close()


def test_versions_go_as_new_ones_come(store: ClockedStore, collector: Collector):
    for number in range(0, 12, 3):
        put_versions(store, range(number, number + 3))
        wait_for(lambda number=number: alive(store) == [number + 1, number + 2])
    wait_for(lambda: collector.collected == 10)
    assert collector.failures == 0


def test_a_store_that_fails_is_said_once_and_collected_when_it_answers(
    store: ClockedStore, collector: Collector, caplog: pytest.LogCaptureFixture
):
    failing = True

    def refuse(op: str, key: str) -> None:
        if failing:
            raise StoreError("503", op=op, key=key, retryable=True)

    with caplog.at_level(logging.WARNING):
        store.before = refuse
        wait_for(lambda: collector.failures >= 3)
        failing = False
        put_versions(store, range(5))
        wait_for(lambda: alive(store) == [3, 4])
    assert [record.message for record in caplog.records if "collector: failed" in record.message] != []
    assert len([record for record in caplog.records if "collector: failed" in record.message]) == 1


def counting_sweeps(store: ClockedStore) -> list[str]:
    """From now on, every walk for what killed writers left."""
    sweep, seen = store.inner.sweep, list[str]()
    store.sweep = lambda prefix, older_than_s: (seen.append(prefix), sweep(prefix, older_than_s))[1]  # type: ignore[attr-defined]
    return seen


def test_the_walk_for_leftovers_is_not_made_at_every_collection(store: ClockedStore):
    swept = counting_sweeps(store)
    collector = Collector(Catalog(store, ADAPTER), RULE, interval_s=0.01, grace_s=0.0)
    for number in range(0, 9, 3):
        put_versions(store, range(number, number + 3))
        wait_for(lambda number=number: alive(store) == [number + 1, number + 2])
    collector.close()
    assert collector.collected == 7 and len(swept) == 1


def test_where_every_version_is_kept_orphans_go_all_the_same_and_the_store_is_left_alone_for_an_hour(
    store: ClockedStore, monkeypatch: pytest.MonkeyPatch
):
    put_versions(store, range(5))
    put_attempt(store, Version(1, 9))
    store.now += 3601
    looks = list[str]()
    store.before = lambda op, key: looks.append(op) if op == "put" and "/clock-" in key else None
    waits, wait = list[float](), threading.Event.wait
    monkeypatch.setattr(threading.Event, "wait", lambda e, s=None: (waits.append(s), wait(e, s))[1])
    collector = Collector(Catalog(store, ADAPTER), Rule(orphan_after_s=3600), interval_s=0.0123, grace_s=0.0)
    wait_for(lambda: waits.count(0.0123) > 20)
    collector.close()
    assert data_of(store, Version(1, 9)) == [] and alive(store) == list(range(5))
    assert (collector.failures, len(looks)) == (0, 2), "one collection, which reads the clock twice"


def test_it_ends_in_the_middle_of_its_grace_and_another_one_finishes(store: ClockedStore):
    put_versions(store, range(5))
    slow = Collector(Catalog(store, ADAPTER), RULE, interval_s=0.01, grace_s=3600.0)
    wait_for(lambda: alive(store) == [3, 4])
    began = time.monotonic()
    slow.close()
    assert time.monotonic() - began < 9
    assert len(store.list(LAYOUT.data)) == 5, "the grace was not over"
    next_life = Collector(Catalog(store, ADAPTER), RULE, interval_s=0.01, grace_s=0.0)
    wait_for(lambda: len(store.list(LAYOUT.data)) == 2)
    next_life.close()
