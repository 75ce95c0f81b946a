"""An ordinary run of real processes: a Megatron trainer and a rollout node on real vLLM that share a URL, nothing else.

One run of six steps, with a long request of somebody else in flight while a newer version is routed; then several tests
look at what it left on the store. Faults are in test_end_to_end_faults.py and test_end_to_end_node.py.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from rescore import ROUNDING, gap_by_version, largest_gap, score_under
from run_processes import RUN_S, START_S, LongRequest, Run, changed, demand_each_group_decided_once, small_run, wait_for

from rollout.engine import VllmEngine
from rollout.vllm_server import VllmServer
from shared.versions import Version, served_name

pytestmark = [pytest.mark.engine, pytest.mark.megatron]

STEPS = 6


@dataclasses.dataclass(frozen=True)
class Ordinary:
    """A finished run, and the request that began under one version and ended under another's reign."""

    run: Run
    engine: VllmEngine
    began_under: Version
    overtaken_by: Version
    long: list[tuple[list[int], list[float]]]


@pytest.fixture(scope="module")
def ordinary(demo_server: VllmServer, tmp_path_factory: pytest.TempPathFactory) -> Ordinary:
    run = changed(small_run(tmp_path_factory.mktemp("ordinary"), steps=STEPS), rollout={"engine_url": demo_server.url})
    with run.rollout() as node, run.train() as trainer:
        wait_for(lambda: run.reached(Version(1, 2)), START_S, node, trainer)
        trainer.suspend()  # so that no newer version comes before the request is on its way
        began_under = wait_for(lambda: run.serving() == run.catalog.newest() and run.serving(), RUN_S, node)
        assert began_under is not None
        long = LongRequest(demo_server.url, served_name(run.config.store.adapter, began_under))
        trainer.resume()
        wait_for(lambda: run.reached(Version(1, began_under.number + 1)), RUN_S, node, trainer)
        assert long.running(), "the long request ended too early to show anything"
        overtaken_by = run.serving()
        assert overtaken_by is not None
        wait_for(run.done, RUN_S, node, trainer)
        assert trainer.wait(START_S) == 0
        assert node.stop() == 0
    return Ordinary(run, demo_server.engine(), began_under, overtaken_by, long.result())


def test_every_version_is_published_and_whole_and_the_last_one_is_served(ordinary: Ordinary):
    versions = [Version(1, number) for number in range(STEPS + 1)]
    assert ordinary.run.catalog.versions() == versions
    assert ordinary.run.serving() == versions[-1]
    code, told, _ = ordinary.run.ask("verify", "--all", "--json", "--base", ordinary.run.base)
    assert code == 0
    assert [result["ok"] for result in json.loads(told)] == [True] * len(versions)


def test_a_request_in_flight_finishes_on_its_version_after_newer_ones_are_routed(ordinary: Ordinary, tmp_path: Path):
    assert ordinary.overtaken_by > ordinary.began_under
    assert len(ordinary.long) == LongRequest.sequences
    sequences, logprobs = [whole for whole, _ in ordinary.long], [given for _, given in ordinary.long]
    assert {len(row) for row in logprobs} == {LongRequest.tokens}
    run, engine = ordinary.run, ordinary.engine
    own = score_under(ordinary.began_under, run.catalog, engine, run.base, tmp_path, sequences)
    other = score_under(ordinary.overtaken_by, run.catalog, engine, run.base, tmp_path, sequences)
    assert largest_gap(logprobs, own) <= ROUNDING
    # Every single sequence tells the versions apart, so none of them was moved to the newer one.
    apart = [np.abs(np.subtract(ours, theirs)).max() for ours, theirs in zip(own, other, strict=True)]
    assert min(apart) > 10 * ROUNDING


def test_every_sampled_token_scores_the_same_again_under_its_version(ordinary: Ordinary, tmp_path: Path):
    samples = ordinary.run.samples()
    gaps = gap_by_version(samples, ordinary.run.catalog, ordinary.engine, ordinary.run.base, tmp_path)
    assert len(samples) >= STEPS * 8 * 4 and len(gaps) > STEPS // 2
    assert max(gaps.values()) <= ROUNDING, gaps


def test_every_group_is_taken_at_most_once_and_within_the_staleness_bound(ordinary: Ordinary):
    run, progress = ordinary.run, ordinary.run.catalog.progress()
    demand_each_group_decided_once(run, STEPS)
    assert progress is not None
    position = run.position()
    assert (progress["taken_groups"], progress["consumed_groups"]) == (position.taken, position.consumed)
    assert progress["staleness_max"] <= run.config.train.max_staleness
    assert progress["base_model_unchanged"]


def test_the_node_keeps_one_receipt_per_version_that_it_served_and_cleans_up(ordinary: Ordinary):
    receipts = ordinary.run.receipts()
    assert len(receipts) == len(set(receipts))
    assert receipts[-1] == Version(1, STEPS)
    assert ordinary.run.cached == [str(Version(1, STEPS))]
    assert ordinary.run.hint()["lost_requests"] == 0
