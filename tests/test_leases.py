"""Leases: written when something changes or it is time, counted on the store's clock, safe from late writes."""

import itertools
import threading
from pathlib import Path

import pytest
from test_agent import Bench
from tiny_versions import LAYOUT, ClockedStore

from shared import strict_json
from shared.errors import StoreError, UsageError
from shared.leases import TTL_S, Lease, read_leases, store_now
from shared.store import Store
from shared.stores import open_store
from shared.versions import Version

V1, V2, V3 = Version(1, 1), Version(1, 2), Version(1, 3)


class Clock:
    """A host's own, whatever it says."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store(tmp_path: Path) -> ClockedStore:
    return ClockedStore(open_store(str(tmp_path)))


def writes(store: ClockedStore) -> list[str]:
    """From now on, every change of a lease."""
    seen: list[str] = []
    store.before = lambda op, key: seen.append(op) if "/leases/" in key else None
    return seen


def held(store: Store) -> dict[Version, tuple[str, ...]]:
    return dict(read_leases(store, LAYOUT, store_now(store, LAYOUT)).holders_of)


def test_what_is_taken_is_seen_and_what_is_released_is_not(any_store: Store):
    lease = Lease(any_store, LAYOUT, "node", life="a")
    lease.take({V1, V2})
    assert held(any_store) == {V1: ("node-a",), V2: ("node-a",)}
    lease.take({V2, V3})
    assert held(any_store) == {V2: ("node-a",), V3: ("node-a",)}
    lease.release()
    assert held(any_store) == {} and any_store.list(LAYOUT.leases) == []


def test_the_stores_clock_is_that_of_an_object_written_just_now_and_leaves_nothing(any_store: Store):
    first = store_now(any_store, LAYOUT)
    assert store_now(any_store, LAYOUT) >= first
    assert any_store.list(LAYOUT.probes) == []


def test_reading_the_clock_of_a_directory_leaves_no_directories(tmp_path: Path):
    local = open_store(str(tmp_path))
    for _ in range(5):
        store_now(local, LAYOUT)
    assert list((tmp_path / LAYOUT.probes).iterdir()) == []


def test_a_held_lease_is_written_once_in_a_third_of_its_time(store: ClockedStore):
    clock = Clock()
    lease = Lease(store, LAYOUT, "node", clock=clock)
    seen = writes(store)
    for _ in range(901):  # seconds, a look in each
        lease.take({V1})
        clock.now += 1
    assert seen == ["put"] * 10


def test_a_version_more_is_written_at_once_and_one_less_when_it_is_time(store: ClockedStore):
    clock = Clock()
    lease = Lease(store, LAYOUT, "node", clock=clock)
    seen = writes(store)
    lease.take({V1})
    lease.take({V1, V2})
    assert seen == ["put", "put", "delete"]
    lease.take({V2})
    assert seen == ["put", "put", "delete"] and V1 in held(store)
    clock.now += TTL_S / 3
    lease.take({V2})
    assert set(held(store)) == {V2}


def test_a_lease_that_nobody_renews_lapses_and_one_that_is_renewed_does_not(store: ClockedStore):
    clock = Clock()
    dead, living = Lease(store, LAYOUT, "dead"), Lease(store, LAYOUT, "living", clock=clock)
    dead.take({V1})
    living.take({V2})
    for _ in range(4):
        store.now += TTL_S / 2
        clock.now += TTL_S / 2
        living.renew()
    assert set(held(store)) == {V2}


@pytest.mark.parametrize("skew_s", [-600.0, 600.0])
def test_a_readers_clock_that_is_ten_minutes_off_changes_nothing(store: ClockedStore, skew_s: float):
    clock = Clock(store.now + skew_s)
    lease = Lease(store, LAYOUT, "node", clock=clock)
    lease.take({V1})
    store.now += TTL_S - 1
    assert set(held(store)) == {V1}
    store.now += 10
    assert held(store) == {}


def test_a_write_that_timed_out_and_lands_later_takes_nothing_from_the_lease_after_it(store: ClockedStore):
    lease = Lease(store, LAYOUT, "node")
    late: list[tuple[str, bytes]] = []
    put = store.put

    def time_out(key: str, content: bytes) -> None:
        late.append((key, content))
        raise StoreError("timed out", op="put", key=key, retryable=True)

    store.put = time_out  # type: ignore[method-assign]
    with pytest.raises(StoreError):
        lease.take({V1})
    store.put = put  # type: ignore[method-assign]
    assert lease.versions == frozenset()
    lease.take({V1, V2})
    put(*late[0])
    assert set(held(store)) == {V1, V2}


def test_a_reader_that_moves_to_another_object_while_it_is_looked_for_is_found(store: ClockedStore):
    lease = Lease(store, LAYOUT, "node")
    lease.take({V1})
    get, moved = store.inner.get, []

    def move_first(key: str, max_bytes: int | None = None) -> bytes:
        if not moved:
            moved.append(key)
            lease.take({V1, V2})
        return get(key, max_bytes)

    store.get = move_first  # type: ignore[attr-defined]
    assert set(held(store)) == {V1, V2}


def test_a_fleet_that_moves_all_the_time_is_read_to_the_end_and_nothing_is_read_twice(store: ClockedStore):
    """Each read of an object comes as the next node takes a new version: its object moves, read or not."""
    leases = [Lease(store, LAYOUT, f"node-{number:02d}", life="a") for number in range(40)]
    for lease in leases:
        lease.take({V1})
    get, read, one_by_one = store.inner.get, list[str](), threading.Lock()

    def move_another_first(key: str, max_bytes: int | None = None) -> bytes:
        with one_by_one:
            read.append(key)
            if len(read) <= len(leases):
                leases[-len(read)].take({V1, V2})
            return get(key, max_bytes)

    store.get = move_another_first  # type: ignore[attr-defined]
    found = read_leases(store, LAYOUT, store_now(store, LAYOUT))
    assert sorted(found.holders(V1)) == sorted(found.holders(V2)) == [f"node-{n:02d}-a" for n in range(40)]
    assert len(set(read)) == len(read)


def test_leases_that_never_stand_still_are_said_and_not_guessed(store: ClockedStore):
    lease = Lease(store, LAYOUT, "node")
    lease.take({V1})
    get, versions = store.inner.get, itertools.cycle([V2, V3])

    def move_first(key: str, max_bytes: int | None = None) -> bytes:
        lease.take({V1, next(versions)})
        return get(key, max_bytes)

    store.get = move_first  # type: ignore[attr-defined]
    with pytest.raises(StoreError, match="leases moved") as caught:
        held(store)
    assert caught.value.retryable


def test_a_lease_that_cannot_be_read_counts_for_every_version_until_it_is_an_hour_old(store: ClockedStore):
    for number, content in enumerate(
        [b"{", b"{}", b'{"holder":"x","ttl_s":"long","versions":[]}', b'{"versions":[7]}']
    ):
        store.put(LAYOUT.lease("odd", number), content)
    assert len(read_leases(store, LAYOUT, store.now).holders(V3)) == 4
    store.now += 3700
    assert read_leases(store, LAYOUT, store.now).holders(V3) == ()


def test_who_may_not_write_is_told_once_and_reads_without(store: ClockedStore, caplog: pytest.LogCaptureFixture):
    tries = []

    def refuse(op: str, key: str) -> None:
        tries.append(key)
        raise StoreError("may only read", op=op, key=key)

    store.before = refuse
    lease = Lease(store, LAYOUT, "node")
    for version in (V1, V2, V3):
        with lease.holding({version}):
            assert lease.versions == frozenset()
    assert len(tries) == 1
    assert len([record.message for record in caplog.records if "reading without" in record.message]) == 1


def test_a_refusal_that_passes_is_forgotten_after_the_leases_time(
    store: ClockedStore, caplog: pytest.LogCaptureFixture
):
    clock, refuses = Clock(), [True]

    def refuse(op: str, key: str) -> None:
        if refuses[0] and "/leases/" in key:
            raise StoreError("ExpiredToken", op=op, key=key)

    store.before = refuse
    lease = Lease(store, LAYOUT, "node", clock=clock)
    for _ in range(3):
        lease.take({V1})
        clock.now += TTL_S
    refuses[0] = False
    lease.take({V1})
    assert set(held(store)) == {V1}
    refuses[0] = True
    clock.now += TTL_S / 3
    lease.renew()
    refuses[0] = False
    clock.now += TTL_S - 1
    lease.take({V1, V2})
    assert set(held(store)) == {V1}, "asked a moment ago"
    clock.now += 1
    lease.take({V1, V2})
    assert set(held(store)) == {V1, V2}
    assert len([record.message for record in caplog.records if "reading without" in record.message]) == 2


def test_a_block_holds_and_lets_go_even_if_it_fails(store: ClockedStore):
    lease = Lease(store, LAYOUT, "node", life="a")
    with pytest.raises(KeyError), lease.holding({V1}):
        assert held(store) == {V1: ("node-a",)}
        raise KeyError
    assert held(store) == {}


def test_a_lease_says_who_holds_what_for_how_long(store: ClockedStore):
    Lease(store, LAYOUT, "node", life="a").take({V1})
    key = store.list(LAYOUT.leases)[0].key
    assert key == "policy/leases/node-a-000001.json"
    body = strict_json.load_object(store.get(key), key=key, max_bytes=999)
    assert body == {"holder": "node-a", "ttl_s": TTL_S, "versions": ["0001-000001"]}


def test_a_lease_under_a_name_that_is_no_key_of_ours_is_told_without_its_control_characters(tmp_path: Path):
    local = open_store(str(tmp_path))
    Lease(local, LAYOUT, "node").take({V1})
    (tmp_path / "policy" / "leases" / "copy of \x1b[2J.json").write_text("{}")
    assert read_leases(local, LAYOUT, store_now(local, LAYOUT)).holders(V2) == ("unreadable lease 'copy of \\x1b[2J'",)


def test_a_lease_of_more_than_an_hour_is_refused(store: ClockedStore):
    with pytest.raises(UsageError, match="at most 3600"):
        Lease(store, LAYOUT, "node", ttl_s=3601)


def test_a_busy_reader_is_kept_by_a_thread_and_a_store_that_fails_does_not_end_it(store: ClockedStore):
    lease = Lease(store, LAYOUT, "node", ttl_s=0.06)
    lease.take({V1})
    renewed, tries = threading.Event(), []

    def fail_once(op: str, key: str) -> None:
        if op == "put":
            tries.append(key)
            if len(tries) == 1:
                raise StoreError("503", op=op, key=key, retryable=True)
            renewed.set()

    store.before = fail_once
    with lease.kept():
        assert renewed.wait(30)
    assert len(set(tries)) == 1, "renewals write over the same object"


def test_a_node_leases_what_it_fetches_and_what_it_serves_and_nothing_once_it_stopped(tmp_path: Path):
    bench = Bench(tmp_path)
    first = bench.publish(0)
    bench.agent.tick()
    assert set(held(bench.store)) == {first}
    second = bench.publish(1)
    bench.agent.tick()
    assert set(held(bench.store)) == {first, second}, "the first one until the next renewal"
    bench.agent.stop()
    assert held(bench.store) == {}


def test_a_node_that_polls_writes_no_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bench = Bench(tmp_path)
    bench.publish(0)
    bench.agent.tick()
    written: list[str] = []
    put = bench.store.put
    monkeypatch.setattr(bench.store, "put", lambda key, content: (written.append(key), put(key, content)))
    for _ in range(50):
        bench.agent.tick()
    assert written == []


def test_a_lease_is_there_before_the_manifest_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bench = Bench(tmp_path)
    version = bench.publish(0)
    seen: list[bool] = []
    manifest = bench.catalog.manifest
    monkeypatch.setattr(bench.catalog, "manifest", lambda v: (seen.append(v in held(bench.store)), manifest(v))[1])
    bench.agent.tick()
    assert bench.serving == version and seen and all(seen)


def test_a_store_that_takes_no_leases_does_not_keep_a_node_from_serving_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bench = Bench(tmp_path)
    version = bench.publish(0)
    bench.agent.tick()

    def refuse(_versions: object) -> None:
        raise StoreError("503", op="put", key="lease", retryable=True)

    monkeypatch.setattr("rollout.delivery.Lease.take", lambda _self, versions: refuse(versions))
    bench.agent.tick()
    assert bench.serving == version and bench.agent.health.failures == 1
