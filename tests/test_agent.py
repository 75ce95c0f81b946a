"""The agent against an engine that misbehaves: whatever fails, the last good version keeps serving."""

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_engine import BASE_NAME, FakeEngine, base_scores, effect_of
from synthetic import ADAPTER, BASE, EXPECTED, factors, open_publisher, write_base

from publisher.convert import convert
from rollout.agent import Action, Agent
from rollout.delivery import Delivery, Target
from rollout.router import Router
from rollout.watch import Watcher
from shared import strict_json
from shared.base_model import identify
from shared.catalog import Catalog
from shared.errors import StoreError
from shared.fetch import fetch
from shared.manifest import VOID, Canary
from shared.store import Store
from shared.stores import open_store
from shared.versions import Version, served_name

SEQUENCE = (1, 9, 14, 23, 8)


class Bench:
    """A store, a publisher and an agent over a fake engine."""

    def __init__(self, folder: Path, max_lora_rank: int = 8) -> None:
        self.folder, self.base = folder, write_base(folder / "base")
        self.store: Store = open_store(str(folder / "store"))
        self.catalog, self.engine, self.router = Catalog(self.store, ADAPTER), FakeEngine(), Router()
        self.publisher = open_publisher(self.store, self.base)
        self.max_lora_rank = max_lora_rank
        self.agent = self.new_agent()

    def new_agent(self, retry_wait_s: float = 0.0, **clocks: Callable[[], float]) -> Agent:
        self.router = Router()
        target = Target(BASE_NAME, BASE, identify(self.base), self.max_lora_rank, self.folder / "cache")
        watcher = Watcher(self.catalog, poll_interval_s=0.01, list_interval_s=0.0)
        delivery = Delivery(self.catalog, self.engine, target)
        return Agent(
            self.catalog,
            self.engine,
            watcher,
            self.router,
            delivery,
            node="n0",
            max_loras=2,
            quarantine_after=2,
            retry_wait_s=retry_wait_s,
            **clocks,
        )

    def publish(self, number: int, *, canary_off_by: float = 0.0, scale: float = 1.0) -> Version:
        """Publish a version whose canary is what a faithful engine shows (`canary_off_by` aside)."""
        version = Version(1, number)
        slices = list(convert(BASE, factors(number)))
        if scale != 1.0:
            slices = [
                type(s)(s.name, s.tensor * scale if "lora_B" in s.name else s.tensor, s.shape, s.offset, s.aliases)
                for s in slices
            ]
        effect = self._effect(slices) + canary_off_by
        canary = Canary((SEQUENCE,), (tuple(v + effect for v in base_scores(SEQUENCE)),), 1e-4)
        self.publisher.submit(number, slices, training={"step": number}, canary=canary)
        while version not in self.catalog.versions():
            self.publisher.check()
        return version

    def _effect(self, slices: list) -> float:  # type: ignore[type-arg]
        probe = open_store(str(self.folder / f"probe{len(list(self.folder.iterdir()))}"))
        publisher = open_publisher(probe, self.base)
        publisher.submit(0, slices, training={})
        publisher.close()
        manifest = Catalog(probe, ADAPTER).manifest(Version(1, 0))
        place = fetch(probe, manifest, EXPECTED, Path(probe.url.removeprefix("file://")) / "out", base_name="b")
        return effect_of(place)

    @property
    def serving(self) -> Version | None:
        return self.router.routed.version if self.router.routed else None


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_published_version_is_loaded_proven_receipted_and_routed(bench: Bench) -> None:
    version = bench.publish(0)
    assert bench.agent.tick() is Action.DELIVER
    assert bench.serving == version
    receipt = strict_json.load_object(
        bench.store.get(bench.catalog.layout.receipt(version, "n0")), key="r", max_bytes=9999
    )
    assert receipt["digest"] == bench.catalog.manifest(version).digest
    assert receipt["canary"]["trainer_gap"] < 1e-4
    assert bench.agent.tick() is Action.WAIT


def test_intermediate_versions_are_skipped_and_old_ones_unloaded(bench: Bench) -> None:
    bench.publish(0)
    bench.agent.tick()
    bench.publish(1)
    latest = bench.publish(2)
    bench.agent.tick()
    assert bench.serving == latest
    assert bench.engine.models() == [BASE_NAME, served_name(ADAPTER, latest)]
    assert served_name(ADAPTER, Version(1, 1)) not in " ".join(bench.engine.log)


def test_a_version_in_use_stays_loaded_with_its_files_until_its_last_lease_is_returned(bench: Bench) -> None:
    first = bench.publish(0)
    bench.agent.tick()
    with bench.router.lease():
        bench.publish(1)
        bench.agent.tick()
        assert bench.serving == Version(1, 1)
        assert served_name(ADAPTER, first) in bench.engine.models()
        assert bench.engine.directories[served_name(ADAPTER, first)].exists()
        bench.publish(2)
        assert bench.agent.tick() is Action.WAIT, "two slots, both in use: the third version waits"
    bench.agent.tick()
    assert served_name(ADAPTER, first) not in bench.engine.models()
    bench.agent.tick()
    assert bench.serving == Version(1, 2)


def test_an_engine_that_says_yes_and_does_nothing_is_found_out(bench: Bench) -> None:
    good = bench.publish(0)
    bench.agent.tick()
    bench.engine.ignores_adapters = True
    bad = bench.publish(1)
    for _ in range(3):
        bench.agent.tick()
    assert bench.serving == good
    assert bad in bench.agent.quarantined
    assert served_name(ADAPTER, bad) not in bench.engine.models()


def test_a_version_whose_canary_disagrees_is_quarantined_and_the_next_one_is_served(bench: Bench) -> None:
    good = bench.publish(0)
    bench.agent.tick()
    bad = bench.publish(1, canary_off_by=0.01)
    for _ in range(4):
        bench.agent.tick()
    assert (bench.serving, bench.agent.quarantined) == (good, frozenset({bad}))
    assert bench.agent.health.failures == 2, "left alone after two tries"
    mended = bench.publish(2)
    bench.agent.tick()
    assert bench.serving == mended


def test_the_rest_after_a_failure_holds_up_no_newer_version(bench: Bench) -> None:
    bench.agent = bench.new_agent(retry_wait_s=60.0)
    bench.publish(0)
    bench.agent.tick()
    bench.publish(1, canary_off_by=0.01)
    for _ in range(3):
        bench.agent.tick()
    assert bench.agent.health.failures == 1, "tried once, then it rests"
    mended = bench.publish(2)
    bench.agent.tick()
    assert bench.serving == mended


def test_a_clock_that_is_set_back_makes_no_rest_longer(bench: Bench) -> None:
    unix_s, elapsed_s = [1e9], [0.0]
    bench.agent = bench.new_agent(retry_wait_s=1.0, clock=lambda: unix_s[0], monotonic=lambda: elapsed_s[0])
    bench.publish(0, canary_off_by=0.01)
    bench.agent.tick()
    unix_s[0] -= 600.0
    bench.agent.tick()
    assert bench.agent.health.failures == 1, "it rests"
    elapsed_s[0] += 2.0
    bench.agent.tick()
    assert bench.agent.health.failures == 2, "tried again"


def test_an_adapter_that_leaks_into_the_base_model_is_not_routed(bench: Bench) -> None:
    bench.engine.leaks = True
    bench.publish(0)
    bench.agent.tick()
    assert bench.serving is None
    assert "base model's answers moved" in bench.agent.health.last_error


def test_a_zero_adapter_is_routed_although_it_changes_nothing(bench: Bench) -> None:
    version = bench.publish(0, scale=0.0)
    bench.agent.tick()
    assert bench.serving == version


def test_a_restarted_engine_gets_the_latest_version_again(bench: Bench) -> None:
    version = bench.publish(0)
    bench.agent.tick()
    bench.engine.restart()
    assert bench.agent.tick() is Action.RELOAD
    assert bench.serving is None, "nobody is routed to an engine that forgot"
    bench.agent.tick()
    assert bench.serving == version
    assert bench.agent.health.reloads == 1


def test_a_restarted_engine_gets_the_last_good_version_when_the_latest_is_quarantined(bench: Bench) -> None:
    good = bench.publish(0)
    bench.agent.tick()
    bench.publish(1, canary_off_by=0.01)
    for _ in range(3):
        bench.agent.tick()
    bench.engine.restart()
    bench.agent.tick()
    bench.agent.tick()
    assert bench.serving == good


def test_an_engine_that_is_down_counts_against_no_version(bench: Bench) -> None:
    bench.engine.down = True
    version = bench.publish(0)
    for _ in range(5):
        assert bench.agent.tick() is Action.WAIT
    bench.engine.down = False
    bench.agent.tick()
    assert bench.serving == version


def test_a_version_at_hand_when_the_engine_dies_is_blamed_once_and_served_after_its_restart(bench: Bench) -> None:
    good = bench.publish(0)
    bench.agent.tick()
    bench.engine.dies_at_load = True
    latest = bench.publish(1)
    for _ in range(5):
        bench.agent.tick()
    assert (bench.agent.health.failures, bench.agent.quarantined) == (1, frozenset())
    bench.engine.dies_at_load = False
    bench.engine.restart()
    bench.agent.engine_lost()
    bench.agent.tick()
    assert bench.serving == latest > good


def test_a_version_that_kills_every_engine_is_quarantined_and_the_last_good_one_serves(bench: Bench) -> None:
    good = bench.publish(0)
    bench.agent.tick()
    bench.engine.dies_at_load = True
    deadly = bench.publish(1)
    for _ in range(2):
        bench.agent.tick()
        bench.engine.restart()
        bench.agent.engine_lost()
    bench.engine.dies_at_load = False
    bench.agent.tick()
    assert (bench.serving, bench.agent.quarantined) == (good, frozenset({deadly}))


def test_a_restarted_agent_comes_back_to_the_latest_version(bench: Bench) -> None:
    version = bench.publish(0)
    bench.agent.tick()
    bench.agent = bench.new_agent()
    bench.agent.tick()
    assert bench.serving == version


def test_a_restarted_agent_unloads_what_its_earlier_life_left_in_the_engine(bench: Bench) -> None:
    old = bench.publish(0)
    bench.agent.tick()
    bench.agent = bench.new_agent()
    latest = bench.publish(1)
    bench.agent.tick()
    assert bench.serving == latest
    assert served_name(ADAPTER, old) not in bench.engine.models()


def test_files_that_no_loaded_version_needs_are_deleted(bench: Bench) -> None:
    bench.publish(0)
    bench.agent.tick()
    leftover = bench.folder / "cache" / ADAPTER / ".0001-000009.killed"
    leftover.mkdir()
    bench.publish(1)
    for _ in range(3):
        bench.agent.tick()
    assert [path.name for path in (bench.folder / "cache" / ADAPTER).iterdir()] == ["0001-000001"]


def test_what_a_cut_off_download_has_is_kept_for_its_next_try(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.agent = bench.new_agent(retry_wait_s=1000.0)
    for number in (0, 1):  # the second one unloads the first: the next round deletes files
        bench.publish(number)
        bench.agent.tick()
    latest = bench.publish(2)

    def cut_off(key: str, start: int, end: int) -> bytes:
        raise StoreError("connection reset", op="get", key=key, retryable=True)

    monkeypatch.setattr(bench.store, "get_range", cut_off)
    bench.agent.tick()
    cache = bench.folder / "cache" / ADAPTER
    assert [path.name for path in cache.glob(f".{latest}.*")]
    assert bench.agent.tick() is Action.WAIT
    assert [path.name for path in cache.glob(f".{latest}.*/**/*.safetensors")] == ["adapter_model.safetensors"]
    assert not (cache / "0001-000000").exists(), "what nobody needs went"


def test_a_lost_unload_reply_blames_no_version_and_holds_up_nothing(bench: Bench) -> None:
    first = bench.publish(0)
    bench.agent.tick()
    del bench.engine.effects[served_name(ADAPTER, first)]  # unloaded by somebody else: ours would get 404
    bench.agent.tick()
    for number in (1, 2, 3):
        latest = bench.publish(number)
        bench.agent.tick()
        assert bench.serving == latest
    assert bench.agent.quarantined == frozenset()


def test_a_full_disk_or_a_store_that_fails_quarantines_no_version(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = bench.publish(0)
    with monkeypatch.context() as full:
        full.setattr("shared.fetch.shutil.disk_usage", lambda _: SimpleNamespace(free=0))
        for _ in range(4):
            bench.agent.tick()
    assert (bench.serving, bench.agent.quarantined) == (None, frozenset())
    bench.agent.tick()
    assert bench.serving == version


def test_a_hint_that_names_a_missing_version_does_not_hold_the_node_up(bench: Bench) -> None:
    good = bench.publish(0)
    bench.store.put(bench.catalog.layout.latest, strict_json.dumps({"epoch": 1, "version": 7}))
    for _ in range(3):
        bench.agent.tick()
    assert bench.serving == good
    latest = bench.publish(8)
    bench.agent.tick()
    assert bench.serving == latest


def test_a_version_that_expired_while_its_engine_was_down_is_not_followed_by_an_older_one(bench: Bench) -> None:
    bench.publish(0)
    latest = bench.publish(1)
    bench.agent.tick()
    assert bench.serving == latest
    bench.store.put(bench.catalog.layout.manifest(latest), VOID)
    bench.engine.restart()
    for _ in range(5):
        bench.agent.tick()
    assert bench.serving is None, "nothing, rather than weights that the policy has left behind"
    newer = bench.publish(2)
    bench.agent.tick()
    assert bench.serving == newer


def test_an_engine_that_dies_during_a_delivery_is_not_routed_to(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    version = bench.publish(0)
    put = bench.store.put_if_absent

    def dies_meanwhile(key: str, content: bytes) -> bool:
        bench.agent.engine_lost()
        bench.engine.restart()
        return put(key, content)

    with monkeypatch.context() as dying:
        dying.setattr(bench.store, "put_if_absent", dies_meanwhile)
        bench.agent.tick()
    assert bench.serving is None
    bench.agent.tick()
    assert bench.serving == version


def test_a_version_zero_is_served_although_trainer_and_engine_differ_by_rounding(bench: Bench) -> None:
    version = bench.publish(0, scale=0.0, canary_off_by=8e-5)
    bench.agent.tick()
    assert bench.serving == version


def test_reading_the_hint_does_not_wake_the_watcher(bench: Bench) -> None:
    bench.publish(0)
    bench.publisher.close()  # LATEST is written after the manifest
    woken = threading.Event()
    watcher = Watcher(bench.catalog, poll_interval_s=60.0, list_interval_s=0.0)
    watcher.look()
    waiting = threading.Thread(target=lambda: (watcher.wait(), woken.set()))
    waiting.start()
    for _ in range(50):
        bench.catalog.hint()
    assert not woken.wait(0.5), "a read is no reason to look"
    bench.store.put(bench.catalog.layout.latest, strict_json.dumps({"epoch": 1, "version": 1}))
    assert woken.wait(5.0), "a write is"
    waiting.join()
    watcher.close()


def test_a_rank_above_the_engines_is_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    bench = Bench(tmp_path, max_lora_rank=2)
    bench.publish(0)
    bench.agent.tick()
    assert bench.serving is None
    assert "max_lora_rank 2" in bench.agent.health.last_error
    assert not (tmp_path / "cache").exists()


def test_a_corrupt_shard_is_never_loaded_and_the_last_good_version_serves(bench: Bench) -> None:
    good = bench.publish(0)
    bench.agent.tick()
    bad = bench.publish(1)
    shard = bench.folder / "store" / bench.catalog.manifest(bad).shards[0].key
    content = bytearray(shard.read_bytes())
    content[-5] ^= 0x10
    shard.write_bytes(content)
    for _ in range(3):
        bench.agent.tick()
    assert bench.serving == good
    assert bench.engine.log == [f"load {served_name(ADAPTER, good)}"]
