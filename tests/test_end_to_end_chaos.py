"""Anything may be killed at any time: trainer, node, engine, at random moments, over and over. A soak.

    CHAOS_SEED=7 pytest -m soak tests/test_end_to_end_chaos.py

The demo's own settings and prompts. Whatever happens, nothing is published twice or half, nothing wrong is learned
from, and the run reaches its reward. The seed is printed; it fixes who is killed and after how long, not what the
processes are doing at that time.
"""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_fixtures import free_port
from rescore import ROUNDING, gap_by_version
from run_processes import (
    START_S,
    Command,
    Run,
    demand_each_group_decided_once,
    engine_core,
    engine_group,
    wait_for,
    written,
)

from rollout.demo.settings import FINAL_REWARD_AT_LEAST, DemoOptions, main_config
from rollout.engine import VllmEngine

pytestmark = [pytest.mark.soak, pytest.mark.engine, pytest.mark.megatron]

KILLS = 8
QUIET_S = (0.0, 6.0)  # after a kill, once the node serves again and the trainer has made a step
RESCORED = 64  # samples of each version


class Pair:
    """A trainer and a node, each started again whenever it was killed."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.trainer, self.node = run.train(), run.rollout()

    def __enter__(self) -> "Pair":
        return self

    def __exit__(self, *_: object) -> None:
        self.trainer.kill()
        self.node.kill()

    def kill_trainer(self) -> None:
        self.trainer.kill()
        self.trainer = self._run.train()

    def kill_node(self) -> None:
        self.node.kill()
        self.node = self._run.rollout()

    def kill_engine(self) -> None:
        """Its core or its server."""
        group = engine_group(self.node)
        os.kill(engine_core(group) if random.random() < 0.5 else group, signal.SIGKILL)

    def commands(self) -> tuple[Command, Command]:
        return self.trainer, self.node


def test_a_run_survives_whatever_is_killed(tmp_path: Path):
    seed = int(os.environ.get("CHAOS_SEED", "0")) or random.SystemRandom().randrange(1, 10_000)
    print(f"CHAOS_SEED={seed}")
    random.seed(seed)
    run = written(main_config(DemoOptions(out=tmp_path, adapter=tmp_path.name, port=free_port(), seed=seed)), tmp_path)
    with Pair(run) as pair:
        killers: list[Callable[[], None]] = [pair.kill_trainer, pair.kill_node, pair.kill_engine]
        killed = 0
        while killed < KILLS:
            since, killer, quiet_s = time.time(), random.choice(killers), random.uniform(*QUIET_S)
            wait_for(lambda since=since: run.done() or recovered(run, since), 2 * START_S, *pair.commands())
            quiet_until = time.monotonic() + quiet_s
            wait_for(lambda until=quiet_until: run.done() or time.monotonic() > until, START_S, *pair.commands())
            if run.done():
                break
            print(f"{killer.__name__} at step {(run.catalog.progress() or {}).get('step')}, serving {run.serving()}")
            killer()
            killed += 1
        wait_for(run.done, 1200, *pair.commands())
        assert pair.trainer.wait(START_S) == 0
        engine = VllmEngine(f"http://127.0.0.1:{run.config.rollout.port}", timeout_s=60.0)
        gaps = gap_by_version(some_of_each_version(run), run.catalog, engine, run.base, tmp_path / "scratch")
        assert pair.node.stop() == 0

    steps = run.config.train.steps
    print(f"{killed} kills, {len(run.catalog.versions())} versions, held-out reward {run.final_reward():.3f}")
    assert killed >= KILLS // 2
    assert max(gaps.values()) <= ROUNDING, gaps
    demand_each_group_decided_once(run, steps)
    receipts = run.receipts()
    assert len(receipts) == len(set(receipts)) and receipts[-1] == run.catalog.newest()
    assert run.cached == [str(run.catalog.newest())]
    code, told, _ = run.ask("verify", "--all", "--json", "--base", run.base)
    assert code == 0 and all(result["ok"] for result in json.loads(told))
    progress = run.catalog.progress()
    assert progress is not None and progress["step"] == steps and progress["base_model_unchanged"]
    assert run.final_reward() >= FINAL_REWARD_AT_LEAST


def recovered(run: Run, since: float) -> bool:
    """Whether the node serves and the trainer has made a step, both by what they said since then (Unix seconds)."""
    hint, progress = run.hint(), run.catalog.progress()
    serves = bool(hint.get("version")) and float(hint["updated_at"]) > since
    return serves and progress is not None and progress["updated_at"] > since and progress["loss"] is not None


def some_of_each_version(run: Run) -> list:
    by_version: dict[object, list] = {}
    for sample in run.samples():
        by_version.setdefault(sample.token_versions[0], []).append(sample)
    return [s for made in by_version.values() for s in random.sample(made, min(RESCORED, len(made)))]
