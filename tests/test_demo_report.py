"""The demo's claims: each one that does not hold is named, and none is let through."""

from typing import Any

import pytest

from rollout.demo.progress import Delivery, Reward, RunState
from rollout.demo.report import shortfalls, summarise
from shared.versions import Version

V0, V1 = Version(1, 0), Version(1, 1)


def run(first: float, last: float, **trainer: Any) -> RunState:
    hint = {"step": 4, "staleness_mean": 0.5, "staleness_max": 1, "base_model_unchanged": True, "done": True, **trainer}
    rewards = [
        Reward(V0, 0.0, first, 0.01, False),
        Reward(V1, 1.0, last, 0.01, False),
        Reward(V1, 1.0, last, 0.01, True),
    ]
    deliveries = {V0: Delivery(submitted_at=0.0, served_at=30.0), V1: Delivery(submitted_at=40.0, served_at=41.5)}
    return RunState(trainer=hint, published=[V0, V1], rewards=rewards, deliveries=deliveries)


def summary(**changes: Any) -> dict[str, Any]:
    made = summarise(
        run(0.2, 0.95), run(0.2, 0.21), verified=True, replay_matches=True, wall_s=1.0, store_url="memory://x", seed=0
    )
    return {**made, **changes}


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
    made = summarise(
        run(0.2, 0.95),
        run(0.2, 0.2, base_model_unchanged=False),
        verified=True,
        replay_matches=True,
        wall_s=1.0,
        store_url="memory://x",
        seed=0,
    )
    assert made["base_model_unchanged"] is False
