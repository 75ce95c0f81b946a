"""A rollout node whose engine is killed, and which is then killed itself, in the middle of a run: it comes back alone.

One run: a trainer, and a node with an engine of its own. First the engine's core dies, with requests in flight; the
node starts it again, and proves and routes the latest version. Then the node is killed; what it started goes with it,
and a new one goes on. The trainer waits meanwhile and finishes.
"""

import dataclasses
import os
import signal
from collections import Counter
from pathlib import Path

import pytest
from engine_fixtures import free_port, group_members
from rescore import ROUNDING, gap_by_version
from run_processes import (
    RUN_S,
    START_S,
    Run,
    changed,
    demand_each_group_decided_once,
    engine_core,
    engine_group,
    small_run,
    wait_for,
)

from rollout.engine import VllmEngine
from rollout.exchange import Request, exchange, parse_server_url
from rollout.vllm_settings import check_port
from shared.errors import UsageError
from shared.versions import Version

pytestmark = [pytest.mark.engine, pytest.mark.megatron]

STEPS = 9


def requests_running(url: str) -> bool:
    """Whether the engine is computing, by its own metrics."""
    [reply] = exchange(parse_server_url(url), [Request("GET", "/metrics")], op="read metrics", timeout_s=10)
    lines = [line for line in reply.content.decode().splitlines() if line.startswith("vllm:num_requests_running")]
    return any(float(line.split()[-1]) > 0 for line in lines)


def port_is_free(port: int) -> bool:
    """A process whose main thread is gone counts as gone, and may hold its sockets for some milliseconds more."""
    try:
        check_port("127.0.0.1", port)
    except UsageError:
        return False
    return True


@dataclasses.dataclass(frozen=True)
class Survived:
    """A finished run, and what was seen on its way."""

    run: Run
    routed_again: Version  # first after the engine's death
    latest_then: Version | None
    lost_requests: int
    reloads: int
    receipts_before_restart: list[Version | None]
    gaps: dict[Version, float]
    names_at_the_end: list[str]


@pytest.fixture(scope="module")
def survived(tmp_path_factory: pytest.TempPathFactory) -> Survived:
    run = small_run(tmp_path_factory.mktemp("survived"), port=free_port(), steps=STEPS)
    run = changed(run, rollout={"start_timeout_s": RUN_S})
    url = f"http://127.0.0.1:{run.config.rollout.port}"
    with run.train() as trainer:
        with run.rollout() as node:
            wait_for(lambda: run.reached(Version(1, 1)), START_S + RUN_S, node, trainer)
            group = engine_group(node)
            wait_for(lambda: requests_running(url), RUN_S, node, trainer)
            os.kill(engine_core(group), signal.SIGKILL)
            wait_for(lambda: run.serving() is None, RUN_S, node, trainer)
            latest_then = run.catalog.newest()
            routed_again = wait_for(run.serving, RUN_S, node, trainer)
            assert routed_again is not None
            assert group_members(group) == []
            wait_for(lambda: run.reached(Version(1, 4)), RUN_S, node, trainer)
            wait_for(lambda: run.hint()["reloads"], RUN_S, node)
            hint, group = run.hint(), engine_group(node)
            node.kill()
        wait_for(lambda: group_members(group) == [], START_S)
        wait_for(lambda: port_is_free(run.config.rollout.port), START_S)
        receipts = run.receipts()
        with run.rollout() as node:
            wait_for(run.done, START_S + RUN_S, node, trainer)
            assert trainer.wait(START_S) == 0
            engine = VllmEngine(url, timeout_s=60.0)
            scratch = tmp_path_factory.mktemp("scratch")
            gaps = gap_by_version(run.samples(), run.catalog, engine, run.base, scratch)
            names = engine.models()
            group = engine_group(node)
            assert node.stop() == 0
        wait_for(lambda: group_members(group) == [], START_S)
    return Survived(run, routed_again, latest_then, hint["lost_requests"], hint["reloads"], receipts, gaps, names)


def test_a_killed_engine_is_started_again_with_the_latest_version(survived: Survived):
    assert survived.latest_then is not None and survived.routed_again >= survived.latest_then
    assert survived.reloads == 1
    [first_log, _] = sorted(survived.run.file.parent.glob("rollout-*.log"))
    assert first_log.read_text(encoding="utf-8").count(", starting it again") == 1


def test_requests_that_died_with_the_engine_are_counted_and_leave_no_trace(survived: Survived):
    assert survived.lost_requests >= 1
    assert max(survived.gaps.values()) <= ROUNDING, survived.gaps
    demand_each_group_decided_once(survived.run, STEPS)


def test_a_killed_node_comes_back_by_itself_and_the_run_completes(survived: Survived):
    run = survived.run
    assert run.serving() == run.catalog.newest() == Version(1, STEPS)
    progress = run.catalog.progress()
    assert progress is not None and progress["done"] and progress["lives"] == 1
    code, told, _ = run.ask("verify", "--all", "--base", run.base)
    assert code == 0 and f"{STEPS + 1} of {STEPS + 1} versions whole" in told


def test_a_killed_node_leaves_nothing_behind_and_repeats_nothing(survived: Survived):
    run = survived.run
    receipts = run.receipts()
    assert len(receipts) == len(set(receipts))
    assert receipts[: len(survived.receipts_before_restart)] == survived.receipts_before_restart
    assert run.cached == [str(Version(1, STEPS))]
    assert survived.names_at_the_end == ["base", f"{run.config.store.adapter}@{Version(1, STEPS)}"]


def test_a_restarted_node_goes_on_with_other_prompts(survived: Survived):
    by_life: dict[str, Counter[str]] = {}
    for key, samples in survived.run.trajectories().items():
        life = key.rsplit("-", 3)[1]
        by_life.setdefault(life, Counter()).update({sample.prompt_id for sample in samples})
    first, second = by_life.values()
    both = first.keys() & second.keys()
    assert len(both) < min(len(first), len(second)) / 4, "chance alone gives about one in a hundred"


def test_cached_files_are_whole_adapters(survived: Survived):
    config = survived.run.config.rollout
    folder = Path(config.cache_dir, config.node, survived.run.config.store.adapter, str(Version(1, STEPS)))
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
        "sha256",
    ]
