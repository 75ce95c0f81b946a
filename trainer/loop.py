"""One life of a trainer: take trajectories, step, publish, checkpoint, until the steps are done.

    version (epoch, number): epoch is this life, number is step // publish_every, so a version tells its age in steps
    a life begins by publishing the state it found: the base model's as number 0, or a checkpoint's, its child

Promises: one optimizer step per batch; a version every `publish_every` steps; the step waits for the store only where
the configuration says so (a full publishing queue that is to be waited for); a life that was succeeded stops (Fenced).
With `frozen`, the negative control, nothing is published after number 0, so samplers never see what is learned;
staleness is then counted against number 0, and no checkpoint is kept.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from publisher.epochs import Claim, claim_epoch, demand_unfenced
from publisher.publisher import Publisher
from shared.base_model import BaseIdentity, identify
from shared.catalog import Catalog, check_layout
from shared.config import Config
from shared.errors import Corrupt, KeyMissing, UsageError
from shared.layout import Layout
from shared.manifest import Manifest
from shared.store import Store
from shared.stores import open_store, probe
from shared.versions import Version
from trainer.batch import make_batch
from trainer.checkpoint import Checkpoint, CheckpointWriter, newest
from trainer.intake import Group, Intake, Position, Rules, staleness
from trainer.lineage import Lineage
from trainer.policy import Policy, Step
from trainer.progress import ProgressHint

log = logging.getLogger(__name__)

FENCE_CHECK_S = 5.0


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
    """What a life starts from, and how far it is."""

    claim: Claim
    lineage: Lineage
    started_at: float  # Unix seconds
    step: int = 0
    parent: Manifest | None = None
    position: Position = field(default_factory=Position)
    totals: Totals = field(default_factory=Totals)
    last: dict[str, float] = field(default_factory=dict)  # metrics of the last step


def train(
    config: Config, *, frozen: bool = False, store: Store | None = None, clock: Callable[[], float] = time.time
) -> dict[str, Any]:
    """Train to the last step and return the final progress (see `Trainer.progress`).

    Raises:
        UsageError: the configuration, the base model or the store's URL.
        StoreUnfit, StoreError: the store.
        Corrupt: the base model or every checkpoint is damaged, or training diverged.
        Fenced: another trainer took over.
        LorasyncError: no trajectories came for `take_timeout_s`.
    """
    store = store or open_store(config.store.url, config.store.options)
    return Trainer(config, store, frozen=frozen, clock=clock).run()


class Trainer:
    """Owns the life; the policy does the learning, the intake the waiting, the publisher the publishing."""

    def __init__(
        self, config: Config, store: Store, *, frozen: bool = False, clock: Callable[[], float] = time.time
    ) -> None:
        self._config, self._train, self._frozen, self._clock = config, config.train, frozen, clock
        self._store, self._layout = store, Layout(config.store.adapter)
        probe(store, self._layout.probes)
        check_layout(store, self._layout)
        self._policy = Policy(config)
        self._base = identify(config.model.path)
        self._life = self._begin()
        self._checked_fence_at = time.monotonic()
        self._told: tuple[int, int] | None = None
        self._publisher = Publisher(
            store,
            self._layout,
            self._life.claim,
            base_path=config.model.path,
            lora=config.lora,
            parallel=asdict(self._policy.layout),
            parent=self._life.parent,
            queue_versions=config.train.queue_versions,
            on_full_queue=config.train.on_full_queue,
        )
        self._checkpoints = CheckpointWriter(store, self._layout)
        self._hint = ProgressHint(store, self._layout, self._life.claim.epoch)
        self._intake = Intake(
            store,
            self._layout,
            self._life.lineage,
            Rules(
                group_size=config.train.group_size,
                vocab_size=int(self._policy.hf_config["vocab_size"]),
                max_tokens=int(self._policy.hf_config["max_position_embeddings"]),
            ),
            max_staleness=config.train.max_staleness,
            position=self._life.position,
            poll_interval_s=config.store.poll_interval_s,
        )

    def run(self) -> dict[str, Any]:
        """Train to the last step; see `train`."""
        with self._closing():
            self._publish()
            self._tell()
            while self._life.step < self._train.steps:
                self._step()
            self._publisher.close()
            if not self._frozen and self._life.step % self._train.checkpoint_every:
                self._checkpoint()
            self._checkpoints.close()
            unchanged = self._policy.base_unchanged()
            outcome = self.progress() | {"done": True, "base_model_unchanged": unchanged}
            self._hint.tell(outcome)
        if not unchanged:
            raise Corrupt("the base model's parameters changed during training", op="train")
        return outcome

    def progress(self) -> dict[str, Any]:
        """How far this life is: what `trainer.json` holds. `*_groups` count over all lives that led here."""
        life, position, totals = self._life, self._intake.position, self._life.totals
        return {
            "epoch": life.claim.epoch,
            "number": self._number,
            "step": life.step,
            "steps": self._train.steps,
            "frozen": self._frozen,
            "consumed_groups": position.consumed,
            "taken_groups": position.taken,
            "dropped_groups": position.consumed - position.taken,
            "dropped": dict(position.dropped),
            "staleness_mean": totals.staleness_sum / max(1, totals.groups),
            "staleness_max": totals.staleness_max,
            "lives": totals.lives,
            "skipped_versions": self._publisher.skipped,
            "missed_checkpoints": self._checkpoints.missed,
            **{name: life.last.get(name) for name in ("loss", "mean_reward", "grad_norm", "wait_s", "step_s")},
            "started_at": life.started_at,
            "updated_at": self._clock(),
            "done": False,
        }

    @property
    def _number(self) -> int:
        return 0 if self._frozen else self._life.step // self._train.publish_every

    def _begin(self) -> Life:
        """Claim the next epoch, then find what to go on from: a claim first, so that nobody adds to it meanwhile."""
        claim = claim_epoch(self._store, self._layout)
        checkpoint = newest(self._store, self._layout)
        if checkpoint is None:
            return Life(claim, Lineage(claim.epoch), started_at=self._clock())
        if self._frozen:
            raise UsageError(
                "a frozen run starts from the base model, and this adapter has a checkpoint",
                op="train",
                key=self._layout.checkpoints,
                hint="Use another store.adapter for it",
            )
        return self._resume(claim, checkpoint)

    def _resume(self, claim: Claim, checkpoint: Checkpoint) -> Life:
        state, key = checkpoint.state, self._layout.checkpoint(checkpoint.epoch, checkpoint.step)
        for what, ours in self._identity().items():
            if (theirs := state.get(what)) != ours:
                raise UsageError(
                    f"the checkpoint was trained with {what} {theirs}, the configuration says {ours}",
                    op="resume",
                    key=key,
                    hint="Resume with the same model and [lora], or use another store.adapter",
                )
        try:
            before, position = Lineage.from_json(state["lineage"]), Position.from_json(state["position"])
            totals = Totals(**state["totals"])
            last = {str(name): float(value) for name, value in state["last"].items()}
            base = BaseIdentity(**state["base"])
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise Corrupt(f"malformed checkpoint: {error!r}", op="resume", key=key) from error
        self._base.demand(base, version=str(Version(checkpoint.epoch, checkpoint.step // self._train.publish_every)))
        self._policy.restore(checkpoint.tensors)
        totals.lives += 1
        number = checkpoint.step // self._train.publish_every
        parent = self._parent(before, number)
        log.info("resumed epoch=%d step=%d parent=%s", claim.epoch, checkpoint.step, parent and parent.version)
        return Life(
            claim,
            before.resumed(claim.epoch, number),
            started_at=self._clock(),
            step=checkpoint.step,
            parent=parent,
            position=position,
            totals=totals,
            last=last,
        )

    def _parent(self, before: Lineage, number: int) -> Manifest | None:
        """The newest committed version that the resumed state descends from."""
        catalog = Catalog(self._store, self._layout.adapter)
        for version in reversed(catalog.versions()):
            if before.includes(version) and version.number <= number:
                try:
                    return catalog.manifest(version)
                except KeyMissing:  # expired since the listing
                    continue
        return None

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        lora = self._config.lora
        return {
            "lora": {"rank": lora.rank, "alpha": lora.alpha, "targets": sorted(lora.targets)},
            "publish_every": self._train.publish_every,
        }

    def _step(self) -> None:
        """Take a batch and learn from it; publish and checkpoint where it is due."""
        life, current = self._life, Version(self._life.claim.epoch, self._number)
        asked_at = time.monotonic()
        groups = self._intake.take(
            self._train.prompts_per_step, current, self._train.take_timeout_s, heartbeat=self._heartbeat
        )
        taken_at = time.monotonic()
        batch = make_batch([group.samples for group in groups], self._policy.device)
        step = self._policy.update(batch, life.step + 1)
        life.step += 1
        life.totals.add(groups, current)
        life.last = _metrics(step, batch.mean_reward) | {
            "wait_s": round(taken_at - asked_at, 3),
            "step_s": round(time.monotonic() - taken_at, 3),
        }
        log.info("step=%d %s", life.step, " ".join(f"{name}={value:.4g}" for name, value in life.last.items()))
        if life.step % self._train.publish_every == 0 and not self._frozen:
            self._publish()
        if life.step % self._train.checkpoint_every == 0 and not self._frozen:
            self._checkpoint()
        self._tell()

    def _publish(self) -> None:
        life = self._life
        training = {"step": life.step, "taken_groups": self._intake.position.taken, **life.last}
        self._publisher.submit(self._number, self._policy.slices(), training=training, canary=self._policy.canary())

    def _checkpoint(self) -> None:
        life = self._life
        state = {
            **self._identity(),
            "base": self._base.to_json(),
            "lineage": life.lineage.to_json(),
            "position": self._intake.position.to_json(),
            "totals": asdict(life.totals),
            "last": life.last,
        }
        self._checkpoints.submit(Checkpoint(life.claim.epoch, life.step, state, self._policy.capture()))

    def _tell(self) -> None:
        """Renew the hint."""
        self._told = (self._life.step, self._intake.position.consumed)
        self._hint.tell(self.progress())

    def _heartbeat(self) -> None:
        """While waiting: notice a successor and a failed publication, and tell samplers what was dropped."""
        self._publisher.check()
        if time.monotonic() - self._checked_fence_at > FENCE_CHECK_S:
            demand_unfenced(self._store, self._layout, self._life.claim)
            self._checked_fence_at = time.monotonic()
        if self._told != (self._life.step, self._intake.position.consumed):
            self._tell()

    @contextmanager
    def _closing(self) -> Iterator[None]:
        """End the threads; after an error drop what is queued, for the error is what counts."""
        try:
            yield
        except BaseException:
            self._publisher.close(abandon=True)
            raise
        finally:
            self._checkpoints.shutdown()
            self._hint.close()


def _metrics(step: Step, mean_reward: float) -> dict[str, float]:
    """What the manifest and the hint say of a step."""
    return {
        "loss": float(step.loss.total.detach()),
        "mean_reward": mean_reward,
        "grad_norm": step.grad_norm,
        "clipped_fraction": step.loss.clipped_fraction,
        "behaviour_weight": step.loss.behaviour_weight,
        "kl_to_behaviour": step.loss.kl_to_behaviour,
    }
