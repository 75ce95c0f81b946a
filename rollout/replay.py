"""Serve each version again, with no trainer: the same prompts, seeds and engine, against what was recorded.

A version matches when its greedy completions equal the recorded ones token for token, and its reward at temperature 1
agrees within its sampling error. Versions without a record are measured and reported, and match nothing.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from rollout.delivery import Delivery
from rollout.engine import Engine
from rollout.evaluate import MAX_FILE_BYTES, Evaluation, evaluate
from rollout.tasks.prompts import Prompt
from rollout.tasks.reward import Reward
from shared.catalog import Catalog
from shared.errors import UsageError
from shared.store import Entry
from shared.versions import Version

Z = 3.0  # standard errors; two honest samplings of one policy differ by more in 0.3 % of cases

REPLAY_SCHEMA = pa.schema(
    [
        ("version", pa.string()),
        ("step", pa.int64()),
        ("greedy_reward", pa.float32()),
        ("sampled_reward", pa.float32()),
        ("sampled_error", pa.float32()),
        ("recorded_greedy_reward", pa.float32()),
        ("recorded_sampled_reward", pa.float32()),
        ("greedy_equal", pa.int64()),
        ("prompts", pa.int64()),
        ("matches", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class Replayed:
    """One version, served again. `recorded` is None where nothing was recorded."""

    version: Version
    step: int
    evaluation: Evaluation
    recorded: Evaluation | None

    @property
    def greedy_equal(self) -> int:
        """How many greedy completions equal the recorded ones."""
        if self.recorded is None:
            return 0
        pairs = zip(self.evaluation.outcomes, self.recorded.outcomes, strict=True)
        return sum(ours.greedy_tokens == theirs.greedy_tokens for ours, theirs in pairs)

    @property
    def matches(self) -> bool:
        """See the module."""
        if self.recorded is None or self.greedy_equal < len(self.evaluation.outcomes):
            return False
        error = math.hypot(self.evaluation.sampled_error, self.recorded.sampled_error)
        return abs(self.evaluation.sampled_reward - self.recorded.sampled_reward) <= Z * error + 1e-9

    def row(self) -> dict[str, object]:
        """For `REPLAY_SCHEMA`."""
        recorded = self.recorded
        return {
            "version": str(self.version),
            "step": self.step,
            "greedy_reward": self.evaluation.greedy_reward,
            "sampled_reward": self.evaluation.sampled_reward,
            "sampled_error": self.evaluation.sampled_error,
            "recorded_greedy_reward": recorded.greedy_reward if recorded else None,
            "recorded_sampled_reward": recorded.sampled_reward if recorded else None,
            "greedy_equal": self.greedy_equal,
            "prompts": len(self.evaluation.outcomes),
            "matches": self.matches if recorded else None,
        }


def parse_range(text: str, versions: Sequence[Version]) -> list[Version]:
    """The versions that a person means: `all`, `latest`, `3`, `0..12`, `0001-000003..0001-000012`.

    A bare number means that number in every epoch.

    Raises:
        UsageError: malformed, or nothing in the store fits.
    """
    if text in ("all", "latest"):
        found = list(versions) if text == "all" else list(versions[-1:])
    else:
        first, _, last = text.partition("..")
        low, high = _bound(first), _bound(last or first)
        found = [v for v in versions if _at_least(v, low) and _at_most(v, high)]
    if not found:
        have = f"{versions[0]} .. {versions[-1]}" if versions else "none"
        raise UsageError(f"no version in {text!r}", op="choose versions", hint=f"Have: {have}")
    return found


def replay(
    catalog: Catalog,
    engine: Engine,
    delivery: Delivery,
    versions: Sequence[Version],
    prompts: Sequence[Prompt],
    reward: Reward,
    *,
    max_tokens: int,
    seed: int,
) -> Iterator[Replayed]:
    """Deliver, evaluate, unload and delete each version in turn; yields each as it is done.

    Raises:
        UsageError: no prompts.
        LorasyncError: the version can't be delivered or the engine fails; nothing is skipped silently.
    """
    with delivery.holding(versions):
        for version in versions:
            delivered = delivery.deliver(version, beside=versions)
            try:
                evaluation = evaluate(engine, delivered.name, prompts, reward, max_tokens=max_tokens, seed=seed)
            finally:
                engine.unload(delivered.name)
                delivery.sweep(keep=())
            step = int(delivered.manifest.training.get("step", -1))
            yield Replayed(version, step, evaluation, _recorded(catalog, version, prompts, seed))


def _recorded(catalog: Catalog, version: Version, prompts: Sequence[Prompt], seed: int) -> Evaluation | None:
    """What some node recorded of this version with these very prompts and seeds."""
    wanted = [(prompt.id, seed + number) for number, prompt in enumerate(prompts)]
    folder = catalog.layout.evaluation(version, "x").rsplit("/", 1)[0]
    entries: list[Entry] = catalog.store.list(folder)
    for entry in entries:
        evaluation = Evaluation.from_parquet(catalog.store.get(entry.key, MAX_FILE_BYTES), key=entry.key)
        if [(outcome.prompt_id, outcome.seed) for outcome in evaluation.outcomes] == wanted:
            return evaluation
    return None


def _bound(text: str) -> Version | int:
    return int(text) if text.isdecimal() else Version.parse(text)


def _at_least(version: Version, bound: Version | int) -> bool:
    return version.number >= bound if isinstance(bound, int) else version >= bound


def _at_most(version: Version, bound: Version | int) -> bool:
    return version.number <= bound if isinstance(bound, int) else version <= bound
