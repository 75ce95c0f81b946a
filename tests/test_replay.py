"""Held-out evaluation and its replay, against a fake engine: what is not compared counts for nothing."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from fake_engine import BASE_NAME, FakeEngine
from synthetic import ADAPTER, BASE, publish, write_base

from rollout.commands import _replay_config
from rollout.delivery import Delivery, Target
from rollout.engine import Completion
from rollout.evaluate import evaluate
from rollout.heldout import Heldout
from rollout.replay import Replayed, replay
from rollout.replay_report import agrees
from rollout.router import Router
from rollout.tasks.prompts import Prompt, write_prompts
from shared.base_model import identify
from shared.catalog import Catalog
from shared.config import Config, ModelConfig, RolloutConfig, StoreConfig, TaskConfig
from shared.console import main, parser
from shared.errors import EngineError, UsageError
from shared.run_record import record_run, recorded_run
from shared.stores import open_store
from shared.versions import Version, parse_served_name

PROMPTS = [Prompt(id=str(number), token_ids=(1, number)) for number in range(4)]
DEADLINE_S = 20.0


def reward(_prompt: Prompt, _completion: str, finished: bool) -> float:
    return float(finished)


class Interrupted(FakeEngine):
    """Loses its first requests to a fault that passes, or that does not."""

    def __init__(self, faults: int, *, retryable: bool) -> None:
        super().__init__()
        self.faults, self.retryable = faults, retryable

    def complete(
        self, model: str, prompts: Sequence[Sequence[int]], *, n: int, max_tokens: int, temperature: float
    ) -> list[list[Completion]]:
        if self.faults:
            self.faults -= 1
            raise EngineError("cut off", op="complete", retryable=self.retryable)
        return super().complete(model, prompts, n=n, max_tokens=max_tokens, temperature=temperature)


class Bench:
    """Three published versions and what evaluates them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.base = folder, write_base(folder / "base")
        self.store = open_store(str(folder / "store"))
        publish(self.store, self.base, count=3)
        self.catalog, self.router = Catalog(self.store, ADAPTER), Router()
        self.config = Config(
            store=StoreConfig(self.store.url),
            model=ModelConfig(str(self.base)),
            task=TaskConfig(train_prompts="", heldout_prompts="", reward="", max_new_tokens=4),
            rollout=RolloutConfig(node="n0"),
        )

    def delivery(self, engine: FakeEngine, name_prefix: str = "") -> Delivery:
        target = Target(BASE_NAME, BASE, identify(self.base), 8, self.folder / "cache")
        return Delivery(self.catalog, engine, target, name_prefix=name_prefix)

    def heldout(self, engine: FakeEngine, limit: int = 512) -> Heldout:
        config = replace(self.config, rollout=replace(self.config.rollout, heldout_limit=limit))
        return Heldout(self.catalog, engine, self.router, config, PROMPTS, reward)

    def serve(self, engine: FakeEngine, heldout: Heldout, number: int) -> Version:
        delivered = self.delivery(engine).deliver(Version(1, number))
        self.router.route(delivered.manifest)
        heldout.enqueue(delivered.manifest)
        return delivered.manifest.version

    def replay(self, engine: FakeEngine, versions: Sequence[Version]) -> list[Replayed]:
        delivery = self.delivery(engine, "replay-x.")
        return list(replay(self.catalog, engine, delivery, versions, PROMPTS, reward, max_tokens=4, seed=0))

    def evaluations(self) -> list[str]:
        return [entry.key for entry in self.store.list(self.catalog.layout.evaluations)]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def run_until(heldout: Heldout, settled: Callable[[], object]) -> None:
    stopping = threading.Event()
    thread = threading.Thread(target=heldout.run, args=(stopping,))
    thread.start()
    deadline = time.monotonic() + DEADLINE_S
    while not settled() and time.monotonic() < deadline:
        stopping.wait(0.01)
    stopping.set()
    thread.join(DEADLINE_S)
    assert settled() and not thread.is_alive()


def test_a_limit_of_no_held_out_prompts_evaluates_nothing_even_after_training(bench: Bench) -> None:
    engine = FakeEngine()
    heldout = bench.heldout(engine, limit=0)
    version = bench.serve(engine, heldout, 2)
    bench.store.put(bench.catalog.layout.trainer, b'{"done":true}')
    heldout._evaluate_final()
    assert (bench.evaluations(), heldout.behind(), bench.router._leases[version]) == ([], False, 0)


def test_no_prompts_are_refused_rather_than_averaged() -> None:
    with pytest.raises(UsageError, match="no held-out prompts"):
        evaluate(FakeEngine(), BASE_NAME, [], reward, max_tokens=4, seed=0)


def test_an_evaluation_cut_off_by_a_passing_fault_is_tried_again(bench: Bench) -> None:
    engine = Interrupted(2, retryable=True)
    heldout = bench.heldout(engine)
    version = bench.serve(engine, heldout, 0)
    run_until(heldout, lambda: bench.evaluations() and bench.router._leases[version] == 0)
    assert heldout.lost == 0


def test_an_evaluation_that_the_engine_refuses_is_lost_and_its_version_let_go(bench: Bench) -> None:
    engine = Interrupted(1, retryable=False)
    heldout = bench.heldout(engine)
    version = bench.serve(engine, heldout, 0)
    run_until(heldout, lambda: heldout.lost and bench.router._leases[version] == 0)
    assert bench.evaluations() == []


def test_a_recorded_version_replays_to_its_record_and_leaves_engine_and_disk_as_they_were(bench: Bench) -> None:
    engine = FakeEngine()
    heldout = bench.heldout(engine)
    served = bench.serve(engine, heldout, 1)
    run_until(heldout, bench.evaluations)
    fresh = FakeEngine()
    done = bench.replay(fresh, [Version(1, 0), served])
    assert [one.recorded is not None for one in done] == [False, True]
    assert agrees(done) and done[1].matches and done[1].greedy_equal == len(PROMPTS)
    assert fresh.effects == {} and list((bench.folder / "cache" / ADAPTER).iterdir()) == []


def test_a_replay_that_compared_nothing_does_not_agree(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    done = bench.replay(FakeEngine(), bench.catalog.versions())
    assert len(done) == 3 and not agrees(done)
    assert "nothing compared" in capsys.readouterr().err


def test_the_names_that_replay_serves_are_no_agents_own(bench: Bench) -> None:
    engine = FakeEngine()
    bench.delivery(engine).deliver(Version(1, 0))
    bench.replay(engine, [Version(1, 0)])
    assert engine.log == [
        "load policy@0001-000000",
        "load replay-x.policy@0001-000000",
        "unload replay-x.policy@0001-000000",
    ]
    parsed = parse_served_name("replay-x.policy@0001-000000")
    assert parsed is not None and parsed[0] != ADAPTER


@pytest.fixture
def recorded(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A store that a node with a configuration file has left, and nothing but it."""
    monkeypatch.chdir(tmp_path)
    write_prompts(tmp_path / "heldout.jsonl", PROMPTS)
    task = TaskConfig("train.jsonl", "heldout.jsonl", "rollout.tasks.chain_sum:reward", max_new_tokens=4)
    options = {"key": "me", "secret": "hush"}
    config = replace(bench.config, task=task, store=replace(bench.config.store, options=options))
    record_run(bench.catalog, config)
    return bench


def replayed_config(bench: Bench, *words: str) -> Config:
    options = parser().parse_args(["replay", "--store", bench.store.url, "--versions", "0..3", *words])
    return _replay_config(options)


def test_the_stores_url_is_all_that_replay_needs(recorded: Bench, tmp_path: Path) -> None:
    config = replayed_config(recorded)
    assert config.model.path == str(recorded.base)
    assert config.task.heldout_prompts == str(tmp_path / "heldout.jsonl")
    assert (config.task.max_new_tokens, config.rollout.heldout_limit) == (4, 512)


def test_flags_win_over_what_the_store_says(recorded: Bench) -> None:
    config = replayed_config(recorded, "--model", "/m", "--set", "rollout.seed=5", "--reward", "mine:exact")
    assert (config.model.path, config.rollout.seed, config.task.reward) == ("/m", 5, "mine:exact")


def test_the_record_of_a_run_holds_no_credentials(recorded: Bench) -> None:
    content = recorded.store.get(recorded.catalog.layout.run)
    assert b"hush" not in content and recorded.store.url.encode() not in content


def test_a_password_in_a_prompt_url_is_not_recorded(bench: Bench) -> None:
    task = TaskConfig("", "https://me:hush@host/p.jsonl", "m:f", max_new_tokens=4)
    record_run(bench.catalog, replace(bench.config, task=task))
    assert recorded_run(bench.catalog)["task"]["heldout_prompts"] == "https://host/p.jsonl"


def test_an_adapter_that_is_not_there_is_answered_with_those_that_are(recorded: Bench) -> None:
    with pytest.raises(UsageError) as refused:
        replayed_config(recorded, "--adapter", "other")
    assert refused.value.hint == "--adapter is one of: policy"


def test_a_store_that_says_nothing_of_its_run_asks_for_a_file(bench: Bench) -> None:
    with pytest.raises(UsageError, match="does not say what the run was made of"):
        replayed_config(bench)


def test_a_held_out_limit_of_0_is_refused_before_an_engine_starts(
    recorded: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["replay", "--store", recorded.store.url, "--set", "rollout.heldout_limit=0"]
    assert main(words) == 2
    assert "rollout.heldout_limit is 0" in capsys.readouterr().err
