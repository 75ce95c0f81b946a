"""How a life of the trainer begins: from the base model, or from the newest checkpoint, in an epoch of its own.

A claim fences whoever trains now, so everything that may speak against beginning is checked first: a mistyped
configuration does not end a healthy trainer. Worked through: trainer A is at step 20. B starts with another rank, finds
A's checkpoint, says so and leaves; A never learns of it. C starts with the same configuration, claims, and looks once
more, for A may have committed step 25 in between; from the claim on A can commit nothing.

After a rollback (`publisher.rollback`) a life goes on from the newest checkpoint on the way to the weights that were
gone back to, and from none that came later: those lead to what was rolled back.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from publisher.commit import mend_hint
from publisher.epochs import Claim, claim_epoch
from publisher.lineage import Lineage, Past
from publisher.resume import past_of, places
from publisher.rollback import last_rollback
from shared.base_model import BaseIdentity
from shared.catalog import Catalog
from shared.config import Config
from shared.errors import Corrupt, KeyMissing, UsageError
from shared.layout import Layout
from shared.manifest import Manifest
from shared.store import Store
from shared.versions import Version
from trainer.checkpoint import Checkpoint, Fits, anywhere, newest
from trainer.intake import Group, Position, staleness

log = logging.getLogger(__name__)


@dataclass
class Totals:
    """Sums over the whole training, kept across lives."""

    staleness_sum: int = 0
    staleness_max: int = 0
    groups: int = 0
    lives: int = 1

    def add(self, groups: list[Group], current: Version) -> None:
        """Count the groups of one step."""
        ages = [staleness(group, current) for group in groups]
        self.staleness_sum += sum(ages)
        self.staleness_max = max(self.staleness_max, *ages)
        self.groups += len(ages)


@dataclass
class Life:
    """What a life starts from, and how far it is.

    Attributes:
        fits: whether a checkpoint of an (epoch, step) may be gone on from.
    """

    claim: Claim
    lineage: Lineage
    started_at: float  # Unix seconds
    step: int = 0
    parent: Manifest | None = None
    position: Position = field(default_factory=Position)
    totals: Totals = field(default_factory=Totals)
    last: dict[str, float] = field(default_factory=dict)  # metrics of the last step
    fits: Fits = anywhere


@dataclass(frozen=True)
class Saved:
    """What a life left in its checkpoint's JSON."""

    lineage: Lineage
    position: Position
    totals: Totals
    last: dict[str, float]


class Beginning:
    """Begins lives of one configuration on one base model.

    beginning = Beginning(config, base, frozen=False)
    life, checkpoint = beginning.begin(store, layout, clock)
    ...
    state = beginning.state(life)                    # what a later `begin` goes on from
    """

    def __init__(self, config: Config, base: BaseIdentity, *, frozen: bool) -> None:
        self._base, self._frozen, self._publish_every = base, frozen, config.train.publish_every
        lora = config.lora
        self._identity = {
            "lora": {"rank": lora.rank, "alpha": lora.alpha, "targets": sorted(lora.targets)},
            "publish_every": self._publish_every,
        }

    def begin(self, store: Store, layout: Layout, clock: Callable[[], float]) -> tuple[Life, Checkpoint | None]:
        """Find what to go on from, see that it fits, then claim the next epoch.

        Returns:
            The life, and the checkpoint whose tensors it goes on with, if there is one.

        Raises:
            UsageError: the checkpoint was trained with another configuration, or the run is frozen and there is one; or
                there was a rollback, and no checkpoint of its past is kept.
            Corrupt: every checkpoint is damaged, or made on another base model (WrongBase).
            Fenced: others kept winning the claim.
        """
        catalog = Catalog(store, layout.adapter)
        seen = self._newest(store, layout, _past(catalog))
        if seen is not None:
            self._saved(seen, layout)
        claim = claim_epoch(store, layout, clock)
        mend_hint(store, layout)
        past = _past(catalog)
        checkpoint = self._newest(store, layout, past, known=seen)
        if checkpoint is None:
            return Life(claim, Lineage(claim.epoch), started_at=clock(), fits=self._fits(past)), None
        saved, number = self._saved(checkpoint, layout), checkpoint.step // self._publish_every
        saved.totals.lives += 1
        lineage = saved.lineage.resumed(claim.epoch, number, past.rollback if past else None)
        parent = _parent(catalog, lineage, number)
        log.info("resumed epoch=%d step=%d parent=%s", claim.epoch, checkpoint.step, parent and parent.version)
        life = Life(
            claim,
            lineage,
            started_at=clock(),
            step=checkpoint.step,
            parent=parent,
            position=saved.position,
            totals=saved.totals,
            last=saved.last,
            fits=self._fits(past),
        )
        return life, checkpoint

    def _newest(
        self, store: Store, layout: Layout, past: Past | None, known: Checkpoint | None = None
    ) -> Checkpoint | None:
        """The newest checkpoint, after a rollback that of its past.

        Raises:
            UsageError: there are checkpoints, and all lead to what was rolled back.
        """
        found = newest(store, layout, known, self._fits(past))
        if found is None and past is not None and (kept := places(store, layout)):
            steps = ", ".join(f"step {step} of epoch {epoch}" for epoch, step in kept)
            raise UsageError(
                f"no checkpoint of the past of rollback {past.rollback}, which went back to step {past.step}",
                op="resume",
                key=layout.checkpoints,
                hint=f"Kept are {steps}. Roll back to a version from there on (retention.keep_checkpoints keeps more), "
                "or delete the adapter's checkpoints/ to begin anew from the base model",
            )
        return found

    def _fits(self, past: Past | None) -> Fits:
        if past is None:
            return anywhere
        return lambda epoch, step: past.holds(epoch, step, self._publish_every)

    def state(self, life: Life) -> dict[str, Any]:
        """A life as JSON; a copy, which does not change when the life goes on."""
        return {
            **self._identity,
            "base": self._base.to_json(),
            "lineage": life.lineage.to_json(),
            "position": life.position.to_json(),
            "totals": asdict(life.totals),
            "last": dict(life.last),
        }

    def _saved(self, checkpoint: Checkpoint, layout: Layout) -> Saved:
        """Read a checkpoint's state and check that this configuration may go on from it."""
        state, key = checkpoint.state, layout.checkpoint(checkpoint.epoch, checkpoint.step)
        if self._frozen:
            raise UsageError(
                "a frozen run starts from the base model, and this adapter has a checkpoint",
                op="train",
                key=layout.checkpoints,
                hint="Use another store.adapter for it",
            )
        for what, ours in self._identity.items():
            if (theirs := state.get(what)) != ours:
                raise UsageError(
                    f"the checkpoint was trained with {what} {theirs}, the configuration says {ours}",
                    op="resume",
                    key=key,
                    hint="Resume with the same model, [lora] and train.publish_every, or use another store.adapter",
                )
        try:
            base = BaseIdentity(**state["base"])
            saved = Saved(
                Lineage.from_json(state["lineage"]),
                Position.from_json(state["position"]),
                Totals(**state["totals"]),
                {str(name): float(value) for name, value in state["last"].items()},
            )
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise Corrupt(f"malformed checkpoint: {error!r}", op="resume", key=key) from error
        self._base.demand(base, version=str(Version(checkpoint.epoch, checkpoint.step // self._publish_every)))
        return saved


def _past(catalog: Catalog) -> Past | None:
    """What the newest rollback went back to, if there was one.

    Raises:
        Corrupt: it does not say so.
    """
    rollback = last_rollback(catalog)
    return past_of(rollback) if rollback else None


def _parent(catalog: Catalog, lineage: Lineage, number: int) -> Manifest | None:
    """The newest committed version that the resumed state descends from."""
    for version in reversed(catalog.versions()):
        if lineage.includes(version) and version.number <= number:
            try:
                return catalog.manifest(version)
            except KeyMissing:  # expired since the listing
                continue
    return None
