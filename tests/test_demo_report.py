"""The demo's claims: each one that does not hold is named, and none is let through."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from rollout.demo.progress import HeldoutReward, ReceiptTimes, RunState
from rollout.demo.report import shortfalls, summarise, unmatched
from rollout.demo.run import demand_unused, run_demo
from rollout.demo.settings import DemoOptions
from rollout.replay import REPLAY_SCHEMA
from shared.errors import LorasyncError, UsageError
from shared.stores import open_store
from shared.versions import Version

V0, V1 = Version(1, 0), Version(1, 1)


def run(first: float, last: float, **trainer: Any) -> RunState:
    hint = {"step": 4, "staleness_mean": 0.5, "staleness_max": 1, "base_model_unchanged": True, "done": True, **trainer}
    rewards = [
        HeldoutReward(V0, 0.0, first, 0.01, False),
        HeldoutReward(V1, 1.0, last, 0.01, False),
        HeldoutReward(V1, 1.0, last, 0.01, True),
    ]
    served = {V0: ReceiptTimes(submitted_at=0.0, served_at=30.0), V1: ReceiptTimes(submitted_at=40.0, served_at=41.5)}
    return RunState(trainer=hint, published=[V0, V1], rewards=rewards, served=served)


def summarised(main: RunState, frozen: RunState) -> dict[str, Any]:
    return summarise(
        main, frozen, verified=True, replay_matches=True, wall_s=1.0, store_url="file:///x", adapter="demo", seed=0
    )


def summary(**changes: Any) -> dict[str, Any]:
    return {**summarised(run(0.2, 0.95), run(0.2, 0.21)), **changes}


def test_a_run_that_holds_its_claims_has_no_shortfall() -> None:
    assert shortfalls(summary()) == []


@pytest.mark.parametrize(
    "broken",
    [
        {"final_reward": 0.89},
        {"base_reward": 0.31},
        {"frozen_final_reward": 0.31},
        {"every_version_verified": False},
        {"base_model_unchanged": False},
        {"replay_matches": False},
    ],
)
def test_each_claim_that_fails_is_a_shortfall(broken: dict[str, Any]) -> None:
    assert len(shortfalls(summary(**broken))) >= 1


def test_a_version_that_waited_for_the_engine_to_start_says_nothing_of_delivery() -> None:
    assert summary()["publish_to_served_s"] == {"p50": 1.5, "p99": 1.5}


def test_a_run_is_done_only_after_training_and_its_last_evaluation() -> None:
    assert run(0.2, 0.9).done
    assert not run(0.2, 0.9, done=False).done
    unevaluated = run(0.2, 0.9)
    unevaluated.rewards = unevaluated.rewards[:2]
    assert not unevaluated.done


def test_a_changed_base_in_the_control_counts_as_well() -> None:
    made = summarised(run(0.2, 0.95), run(0.2, 0.2, base_model_unchanged=False))
    assert made["base_model_unchanged"] is False


def test_the_base_reward_is_that_of_version_0_or_there_is_none() -> None:
    unevaluated = run(0.2, 0.95)
    unevaluated.rewards = unevaluated.rewards[1:]
    with pytest.raises(LorasyncError, match="version 0"):
        summarised(unevaluated, run(0.2, 0.21))


@pytest.mark.parametrize(("matches", "missed"), [(True, []), (False, [V1]), (None, [V1])])
def test_every_served_version_must_replay_to_its_record(
    tmp_path: Path, matches: bool | None, missed: list[Version]
) -> None:
    rows = [{"version": str(V0), "matches": True}, {"version": str(V1), "matches": matches}]
    whole = [{**dict.fromkeys(REPLAY_SCHEMA.names), **row} for row in rows]
    pq.write_table(pa.Table.from_pylist(whole, schema=REPLAY_SCHEMA), tmp_path / "replay.parquet")
    assert unmatched([V1, V0], tmp_path / "replay.parquet") == missed


def test_without_a_replay_no_served_version_matches(tmp_path: Path) -> None:
    assert unmatched([V1, V0], tmp_path / "replay.parquet") == [V0, V1]


def test_a_second_demo_under_the_same_adapter_is_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    demand_unused(store, "demo")
    store.put("demo/layout.json", b"{}")
    with pytest.raises(UsageError, match="already holds a run of adapter demo"):
        demand_unused(store, "demo")
    with pytest.raises(UsageError, match="already holds"):
        run_demo(DemoOptions(tmp_path / "out", "demo", store.url), Console())
    assert not (tmp_path / "out").exists()


def test_a_store_that_two_processes_cannot_share_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one process's own"):
        run_demo(DemoOptions(tmp_path / "out", "demo", "memory://x"), Console())


def test_a_run_whose_last_version_was_quarantined_is_given_up_after_training_and_not_before() -> None:
    state = run(0.2, 0.9)
    assert state.given_up == ""
    state.nodes = [{"node": "n", "quarantined": [str(V1)]}]
    assert state.given_up == str(V1)
    state.trainer = {**state.trainer, "done": False}
    assert state.given_up == ""
