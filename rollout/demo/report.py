"""What the demo leaves behind: summary.json, a plot, a table, and whether its claims hold."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from rollout.demo.progress import HeldoutReward, RunState, percentiles
from rollout.demo.settings import BASE_REWARD_AT_MOST, FINAL_REWARD_AT_LEAST, FROZEN_GAIN_AT_MOST
from rollout.plot import Curve, plot_rewards
from rollout.replay import REPLAY_SCHEMA
from shared.errors import LorasyncError
from shared.versions import Version

Summary = Mapping[str, Any]


def summarise(
    main: RunState,
    frozen: RunState,
    *,
    verified: bool,
    replay_matches: bool,
    wall_s: float,
    store_url: str,
    adapter: str,
    seed: int,
) -> dict[str, Any]:
    """summary.json. Rewards are means over held-out prompts at temperature 1, sampled from the engine.

    Raises:
        LorasyncError: version 0, or the last version after training, was not evaluated.
    """
    base, final, frozen_final = main.base, main.final, frozen.final
    if base is None or final is None or frozen_final is None:
        problem = "version 0 or the last version was not evaluated, so there is nothing to compare"
        raise LorasyncError(problem, op="summarise", hint="The rollout node's log says why")
    return {
        "base_reward": base.sampled,
        "final_reward": final.sampled,
        "final_reward_greedy": final.greedy,
        "frozen_final_reward": frozen_final.sampled,
        "versions_published": len(main.published),
        "versions_served": len(main.served),
        "every_version_verified": verified,
        "steps": int(main.trainer["step"]),
        "publish_to_served_s": percentiles(main.publish_to_served_s),
        "staleness": {"mean": main.trainer["staleness_mean"], "max": main.trainer["staleness_max"]},
        "base_model_unchanged": bool(main.trainer.get("base_model_unchanged"))
        and bool(frozen.trainer.get("base_model_unchanged")),
        "replay_matches": replay_matches,
        "rewards": [
            {"version": str(r.version), "greedy": r.greedy, "sampled": r.sampled, "error": r.error, "final": r.final}
            for r in main.rewards
        ],
        "seed": seed,
        "wall_s": wall_s,
        "store_url": store_url,
        "adapter": adapter,
    }


def shortfalls(summary: Summary) -> list[str]:
    """The demo's claims that do not hold; none is the demo's success."""
    bound = summary["base_reward"] + FROZEN_GAIN_AT_MOST
    checks = {
        f"final_reward {summary['final_reward']:.3f} is below {FINAL_REWARD_AT_LEAST}": summary["final_reward"]
        >= FINAL_REWARD_AT_LEAST,
        f"base_reward {summary['base_reward']:.3f} is above {BASE_REWARD_AT_MOST}": summary["base_reward"]
        <= BASE_REWARD_AT_MOST,
        f"frozen_final_reward {summary['frozen_final_reward']:.3f} is above {bound:.3f}": summary["frozen_final_reward"]
        <= bound,
        "not every published version was verified": summary["every_version_verified"],
        "the base model changed": summary["base_model_unchanged"],
        "replay does not match what was recorded": summary["replay_matches"],
    }
    return [problem for problem, holds in checks.items() if not holds]


def unmatched(served: Iterable[Version], replayed: Path) -> list[Version]:
    """Served versions that were not recorded, or did not replay to their record (`replay.parquet`)."""
    rows = pq.read_table(replayed, schema=REPLAY_SCHEMA).to_pylist() if replayed.exists() else []
    matching = {row["version"] for row in rows if row["matches"]}
    return sorted(version for version in served if str(version) not in matching)


def plot(path: Path, main: RunState, frozen: RunState, publish_every: int) -> None:
    """Held-out reward by served version, beside the control that never gets one."""
    sampled = _during(main.rewards)
    steps = [reward.version.number * publish_every for reward in sampled]
    plot_rewards(
        path,
        [
            Curve("temperature 1", steps, [r.sampled for r in sampled], [r.error for r in sampled]),
            Curve("greedy", steps, [r.greedy for r in sampled]),
            _flat("publishing frozen at version 0", frozen),
        ],
        "Held-out reward by the version that vLLM serves",
    )


def _flat(label: str, frozen: RunState) -> Curve:
    """The control over its own steps: version 0 at the start, and again after training."""
    rewards = frozen.rewards
    steps = [float(frozen.trainer["step"]) if reward.final else 0.0 for reward in rewards]
    return Curve(label, steps, [r.sampled for r in rewards], [r.error for r in rewards])


def _during(rewards: Sequence[HeldoutReward]) -> list[HeldoutReward]:
    newest: dict[Version, HeldoutReward] = {reward.version: reward for reward in rewards if not reward.final}
    return list(newest.values())
