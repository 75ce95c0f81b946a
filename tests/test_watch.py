"""The watcher: which version it tells, and what each look costs the store, however long the history."""

import itertools
import random
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from http_witness import witness
from s3_server import S3Server
from synthetic import ADAPTER, LORA, publish, write_base

from publisher.commit import mend_hint
from rollout.watch import MAX_BACK_OFF, Watcher
from shared import strict_json
from shared.base_model import identify
from shared.catalog import Catalog
from shared.config import Config, ModelConfig, StoreConfig, TaskConfig
from shared.local_store import LocalStore
from shared.manifest import VOID
from shared.store import Entry, Fetched
from shared.stores import open_store
from shared.versions import Version
from trainer.life import Beginning

V = Version
POLL_S, LIST_S = 1.0, 30.0
HISTORY = 2500


class CountingStore(LocalStore):
    """Counts requests as an object store would be asked them, and what listings answered."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"file://{folder}")
        self.asked: Counter[str] = Counter()
        self.listed = 0

    def get_if_changed(self, key: str, tag: str, max_bytes: int | None = None) -> Fetched | None:
        self.asked["get"] += 1
        return super().get_if_changed(key, tag, max_bytes)

    def get(self, key: str, max_bytes: int | None = None) -> bytes:
        self.asked["get"] += 1
        return super().get(key, max_bytes)

    def list(self, prefix: str, after: str = "") -> list[Entry]:
        self.asked["list"] += 1
        entries = super().list(prefix, after)
        self.listed += len(entries)
        return entries


class Bench:
    """A store with manifests that nobody opens, and a watcher on a clock that only `polls` moves."""

    def __init__(self, folder: Path) -> None:
        self.store = CountingStore(folder)
        self.catalog, self.now = Catalog(self.store, "policy"), 0.0
        self.watcher = self.new_watcher()

    def new_watcher(self) -> Watcher:
        return Watcher(self.catalog, poll_interval_s=POLL_S, list_interval_s=LIST_S, clock=lambda: self.now)

    def commit(self, *versions: Version) -> None:
        for version in versions:
            self.write(version, b'{"a manifest": "that nobody opens"}')

    def void(self, version: Version) -> None:
        self.write(version, VOID)

    def write(self, version: Version, content: bytes) -> None:
        path = self.store.root / self.catalog.layout.manifest(version)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def hint(self, version: Version) -> None:
        self.store.put(self.catalog.layout.latest, strict_json.dumps({"epoch": version.epoch, "version": version[1]}))

    def publish(self, *versions: Version) -> None:
        self.commit(*versions)
        self.hint(versions[-1])

    def polls(self, count: int) -> list[Version | None]:
        told = []
        for _ in range(count):
            told.append(self.watcher.look())
            self.now += POLL_S
        return told

    def cost(self) -> dict[str, int]:
        """Requests since the last call."""
        asked, self.store.asked = dict(self.store.asked), Counter()
        return asked


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.watcher.close()


def test_with_2500_versions_of_history_a_poll_is_one_request_and_nothing_is_listed(bench: Bench) -> None:
    history = [V(1, number) for number in range(HISTORY)]
    bench.publish(*history)
    assert bench.polls(1) == [history[-1]]
    assert (bench.cost(), bench.store.listed) == ({"get": 1, "list": 1}, 0), "the first look lists what the hint missed"
    for number in range(HISTORY, HISTORY + 50):  # a version each 20 polls, as long as nothing stands still
        bench.publish(V(1, number))
        assert bench.polls(20) == [V(1, number)] * 20
    assert bench.cost() == {"get": 1000}


def test_a_quiet_store_is_listed_ever_more_seldom_and_only_after_the_newest_key(bench: Bench) -> None:
    bench.publish(V(1, 0), V(1, 1))
    listings_at = []
    for second in range(2000):
        bench.polls(1)
        if bench.cost().get("list"):
            listings_at.append(second)
    gaps = [b - a for a, b in itertools.pairwise(listings_at)]
    assert gaps == [LIST_S * factor for factor in (1, 2, 4, 8, *(MAX_BACK_OFF,) * 3)]
    assert bench.store.listed == 0


def test_a_hint_that_raises_the_newest_version_ends_the_back_off(bench: Bench) -> None:
    bench.publish(V(1, 0))
    bench.polls(500)
    bench.publish(V(1, 1))
    bench.polls(1)
    bench.cost()
    bench.commit(V(1, 2))  # and its hint is lost
    assert bench.polls(int(LIST_S) + 1)[-1] == V(1, 2)
    assert bench.cost()["list"] == 1
    bench.commit(V(1, 3))
    assert bench.polls(int(LIST_S) + 1)[-1] == V(1, 3), "a listing that found something ends it too"


def test_a_version_whose_hint_was_never_written_is_found_at_start(bench: Bench) -> None:
    bench.publish(V(1, 0))
    bench.commit(V(1, 1), V(2, 0))
    assert bench.polls(1) == [V(2, 0)]


def test_a_replayed_older_hint_changes_nothing(bench: Bench) -> None:
    bench.publish(*(V(1, number) for number in range(5)))
    bench.polls(1)
    bench.hint(V(1, 2))
    assert bench.polls(3) == [V(1, 4)] * 3
    assert bench.cost()["list"] == 1, "that of the start"
    bench.watcher.close()
    bench.watcher = bench.new_watcher()
    assert bench.polls(1) == [V(1, 4)], "nor does it mislead who starts on it"


def test_a_hint_to_what_never_was_is_left_after_one_try(bench: Bench) -> None:
    bench.publish(V(1, 0), V(1, 1))
    bench.hint(V(1, 7))
    assert bench.polls(1) == [V(1, 7)]
    bench.watcher.forget(V(1, 7))
    assert bench.polls(100) == [V(1, 1)] * 100
    bench.hint(V(1, 7))  # told again
    assert bench.polls(1) == [V(1, 1)]
    bench.publish(V(1, 8))
    assert bench.polls(1) == [V(1, 8)]


def test_a_void_as_the_highest_name_is_no_version(bench: Bench) -> None:
    bench.commit(V(1, 0), V(1, 1))
    bench.void(V(1, 2))
    assert bench.polls(200)[-1] == V(1, 1)
    bench.hint(V(1, 2))
    bench.polls(1)
    bench.watcher.forget(V(1, 2))
    assert bench.polls(200) == [V(1, 1)] * 200


def test_an_expired_version_leaves_the_newest_that_there_still_is(bench: Bench) -> None:
    bench.publish(V(1, 0), V(1, 1), V(1, 2))
    bench.polls(1)
    bench.void(V(1, 2))
    bench.void(V(1, 1))
    bench.watcher.forget(V(1, 2))
    assert bench.polls(2) == [V(1, 0)] * 2


def test_a_listed_version_that_cannot_be_read_is_tried_again_ever_more_seldom(bench: Bench) -> None:
    bench.publish(V(1, 0), V(1, 1))
    bench.cost()
    tries = []
    for second in range(2000):
        if bench.polls(1) == [V(1, 1)]:
            tries.append(second)
            bench.watcher.forget(V(1, 1))
    assert len(tries) <= 8, "at the start, then when a listing is due: 30, 60, 120, 240, 480 seconds apart"
    assert bench.cost()["list"] <= 2 * len(tries)


def test_what_the_caller_will_not_have_is_passed_over_without_a_listing_each_time(bench: Bench) -> None:
    bench.publish(V(1, 0), V(1, 1), V(1, 2))
    bench.polls(1)
    bench.cost()
    for _ in range(20):
        assert bench.watcher.look(without={V(1, 2)}) == V(1, 1)
    assert bench.cost() == {"get": 20, "list": 1}, "listed once: until then only the hint's version was known"
    assert bench.watcher.look(without={V(1, 0), V(1, 1), V(1, 2)}) is None
    assert "list" not in bench.cost()


def test_whatever_happened_to_hints_and_manifests_a_reader_comes_to_the_newest_that_can_be_read(bench: Bench) -> None:
    """Commits, lost and replayed and lying hints, voids, in any order; `run(seed)` alone replays one."""

    def read() -> Version | None:
        version = bench.watcher.look()
        if version in real:
            return version
        if version is not None:
            bench.watcher.forget(version)
        return None

    def run(seed: int) -> None:
        rng = random.Random(seed)
        for number in range(30):
            step = rng.choice(("publish", "publish", "commit", "replay", "lie", "void", "poll", "poll", "poll"))
            if step in ("publish", "commit"):
                real.append(V(1, number))
                bench.commit(real[-1])
            if step == "publish":
                bench.hint(real[-1])
            elif step == "replay" and real:
                bench.hint(rng.choice(real))
            elif step == "lie":
                bench.hint(V(1, number))
            elif step == "void" and len(real) > 1:
                bench.void(real.pop(rng.randrange(len(real))))
            elif step == "poll":
                read()
                bench.now += POLL_S
        bench.cost()
        told = []
        for _ in range(int(3 * MAX_BACK_OFF * LIST_S)):
            told.append(read())
            bench.now += POLL_S
        settled = len(told) - told[::-1].index(None) if None in told else 0
        assert told[-1] == (real[-1] if real else None), f"seed {seed}"
        assert not real or settled <= MAX_BACK_OFF * LIST_S, f"seed {seed}: not settled after {settled} polls"
        assert bench.cost().get("list", 0) <= 16, f"seed {seed}"

    for seed in range(20):
        real: list[Version] = []
        bench.store.root = bench.store.root.parent / f"{seed}"
        bench.watcher.close()
        bench.watcher = bench.new_watcher()
        run(seed)


def test_nothing_published_yet_is_none_until_something_is(bench: Bench) -> None:
    assert bench.polls(3) == [None] * 3
    bench.publish(V(1, 0))
    assert bench.polls(1) == [V(1, 0)]


def test_a_trainer_that_starts_mends_the_hint_that_a_killed_one_left_behind(tmp_path: Path) -> None:
    store, base = open_store(str(tmp_path / "store")), write_base(tmp_path / "base")
    publish(store, base, 3)
    catalog = Catalog(store, ADAPTER)
    store.put(catalog.layout.latest, strict_json.dumps({"epoch": 1, "version": 1}))
    config = Config(StoreConfig(store.url), ModelConfig(str(base)), TaskConfig("t", "h", "r:r", 4), lora=LORA)
    life, _ = Beginning(config, identify(base), frozen=False).begin(store, catalog.layout, time.time)
    assert (life.claim.epoch, (catalog.hint() or [None])[0]) == (2, V(1, 2))


def test_a_hint_is_not_mended_towards_a_version_that_cannot_be_read(tmp_path: Path) -> None:
    store, base = open_store(str(tmp_path / "store")), write_base(tmp_path / "base")
    publish(store, base, 2)
    catalog = Catalog(store, ADAPTER)
    store.put(catalog.layout.manifest(V(1, 2)), b"damaged")
    mend_hint(store, catalog.layout)
    assert (catalog.hint() or [None])[0] == V(1, 1)


def test_on_a_real_s3_server_a_poll_is_one_http_request(s3: S3Server) -> None:
    """More versions than one page of a listing holds."""
    direct = Catalog(open_store(s3.url("watched"), s3.options), "policy")
    versions = [V(1, number) for number in range(1100)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda v: direct.store.put(direct.layout.manifest(v), b"{}"), versions))
    direct.store.put(direct.layout.latest, strict_json.dumps({"epoch": 1, "version": 1099}))
    with witness(s3.endpoint) as between:
        options = s3.options | {"endpoint_url": between.endpoint}
        catalog, now = Catalog(open_store(s3.url("watched"), options), "policy"), 0.0
        watcher = Watcher(catalog, poll_interval_s=POLL_S, list_interval_s=LIST_S, clock=lambda: now)
        assert watcher.look() == versions[-1]
        hint, listing = between.seen()
        assert hint.endswith("policy/LATEST") and "start-after" in listing
        between.forget()
        for second in range(int(LIST_S)):
            now = float(second)
            assert watcher.look() == versions[-1]
        assert between.seen() == [hint] * int(LIST_S)
