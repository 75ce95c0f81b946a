"""How far a run is, read from the store alone: what the live view shows and the summary is made of."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rollout.evaluate import Evaluation
from shared import strict_json
from shared.catalog import MAX_HINT_BYTES, Catalog
from shared.layout import version_of
from shared.versions import Version


@dataclass(frozen=True)
class HeldoutReward:
    """One recorded evaluation. `final` marks the one after the end of training."""

    version: Version
    greedy: float
    sampled: float
    error: float
    final: bool


@dataclass(frozen=True)
class ReceiptTimes:
    """A receipt's times, Unix seconds."""

    submitted_at: float
    served_at: float


@dataclass
class RunState:
    """Everything a person asks while it runs."""

    trainer: Mapping[str, Any] = field(default_factory=dict)
    published: list[Version] = field(default_factory=list)
    nodes: list[dict[str, Any]] = field(default_factory=list)
    rewards: list[HeldoutReward] = field(default_factory=list)
    served: dict[Version, ReceiptTimes] = field(default_factory=dict)

    @property
    def publish_to_served_s(self) -> list[float]:
        """From the end of the optimizer step to routed, per version that was published while an engine served.

        Those published before any engine was up wait for it to start, which says nothing of delivery.
        """
        up = min((d.served_at for d in self.served.values()), default=0.0)
        return [d.served_at - d.submitted_at for d in self.served.values() if d.submitted_at >= up]

    @property
    def base(self) -> HeldoutReward | None:
        """Of version 0, which is the base model; None if it was not evaluated."""
        return next((r for r in self.rewards if r.version.number == 0 and not r.final), None)

    @property
    def final(self) -> HeldoutReward | None:
        """Of the version served when training had ended, measured after it."""
        return next((r for r in reversed(self.rewards) if r.final), None)

    @property
    def done(self) -> bool:
        """Training has ended and the last version was evaluated after it."""
        return bool(self.trainer.get("done")) and self.final is not None

    @property
    def given_up(self) -> str:
        """The last version, if training has ended and a node quarantined it: it will never be served."""
        last = str(self.published[-1]) if self.published else ""
        refused = any(last in node.get("quarantined", ()) for node in self.nodes)
        return last if refused and self.trainer.get("done") else ""


class RunReader:
    """Reads a run's state, fetching each evaluation and receipt once."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._rewards: dict[str, HeldoutReward] = {}
        self._receipts: dict[str, tuple[Version, ReceiptTimes]] = {}

    def read(self) -> RunState:
        """The state now.

        Raises:
            StoreError: the store failed.
        """
        store, layout = self._catalog.store, self._catalog.layout
        for entry in store.list(layout.evaluations):
            version = version_of(entry.key)
            if version and entry.key not in self._rewards:
                evaluation = Evaluation.from_parquet(store.get(entry.key), key=entry.key)
                self._rewards[entry.key] = HeldoutReward(
                    version,
                    evaluation.greedy_reward,
                    evaluation.sampled_reward,
                    evaluation.sampled_error,
                    final=entry.key.endswith(".final.parquet"),
                )
        for entry in store.list(layout.receipts):
            version = version_of(entry.key)
            if version and entry.key not in self._receipts:
                receipt = strict_json.load_object(store.get(entry.key), key=entry.key, max_bytes=MAX_HINT_BYTES)
                times = ReceiptTimes(float(receipt["submitted_at"]), float(receipt["served_at"]))
                self._receipts[entry.key] = version, times
        return RunState(
            trainer=self._catalog.progress() or {},
            published=self._catalog.versions(),
            nodes=self._catalog.nodes(),
            rewards=sorted(self._rewards.values(), key=lambda reward: (reward.version, reward.final)),
            served=dict(self._receipts.values()),
        )


def percentiles(values: list[float]) -> dict[str, float]:
    """p50 and p99, by linear interpolation."""
    if len(values) < 2:
        return dict.fromkeys(("p50", "p99"), values[0] if values else 0.0)
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p99": cuts[98]}
