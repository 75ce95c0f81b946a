"""One life of a trainer: take trajectories, step, publish, checkpoint, until the steps are done.

    version (epoch, number): epoch is this life, number is step // publish_every, so a version tells its age in steps
    a life begins by publishing the state it found: the base model's as number 0, or a checkpoint's, its child

Promises: one optimizer step per batch; a version every `publish_every` steps; the step waits for the store only where
the configuration says so (a full publishing queue that is to be waited for); the last version is published
whatever that configuration says; a life that was succeeded stops (Fenced).
With `frozen`, the negative control, nothing is published after number 0, so samplers never see what is learned;
staleness is then counted against number 0, and no checkpoint is kept.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from publisher.collector import Collector
from publisher.epochs import demand_unfenced
from publisher.publisher import Published, Publisher
from publisher.retention import rule_of
from shared.base_model import identify
from shared.catalog import Catalog, check_layout
from shared.config import Config
from shared.errors import Corrupt, StoreError
from shared.layout import Layout
from shared.outage import Outage
from shared.signing import load_seal
from shared.store import Store
from shared.stores import open_store, probe
from shared.versions import Version
from trainer.batch import make_batch
from trainer.checkpoint import Checkpoint, CheckpointWriter
from trainer.intake import Intake, Rules
from trainer.life import Beginning
from trainer.policy import Policy, Step
from trainer.progress import ProgressHint

log = logging.getLogger(__name__)

FENCE_CHECK_S = 5.0


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
    store = store or open_store(config.store.url, config.store.options, config.store.client)
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
        seal = load_seal(config.store.sign_key)
        self._policy = Policy(config)
        base = identify(config.model.path)
        self._beginning = Beginning(config, base, frozen=frozen)
        self._life, checkpoint = self._beginning.begin(store, self._layout, clock)
        if checkpoint is not None:
            self._policy.restore(checkpoint.tensors)
        self._checked_fence_at, self._fence = time.monotonic(), Outage("fence check")
        self._published: Published | None = None
        self._canary_s = 0.0
        self._told: tuple[int, int] | None = None
        self._publisher = Publisher(
            store,
            self._layout,
            self._life.claim,
            base_path=config.model.path,
            base=base,
            lora=config.lora,
            parallel=asdict(self._policy.layout),
            parent=self._life.parent,
            queue_versions=config.train.queue_versions,
            on_full_queue=config.train.on_full_queue,
            seal=seal,
            on_published=self._note,
            clock=clock,
        )
        self._checkpoints = CheckpointWriter(store, self._layout, config.retention.keep_checkpoints, self._life.fits)
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
        self._collector = self._new_collector()

    def _new_collector(self) -> Collector:
        retention = self._config.retention
        return Collector(
            Catalog(self._store, self._layout.adapter),
            rule_of(retention, self._train.max_staleness),
            interval_s=retention.interval_s,
            grace_s=retention.grace_s,
        )

    def run(self) -> dict[str, Any]:
        """Train to the last step; see `train`."""
        with self._closing():
            self._publish()
            self._tell()
            while self._life.step < self._train.steps:
                self._step()
            if self._publisher.last_number < self._number:  # skipped, and what was asked for is the last version
                self._publish(must=True)
            self._publisher.close()
            if not self._frozen and self._life.step % self._train.checkpoint_every:
                self._checkpoint()
            self._checkpoints.close()
            unchanged = self._policy.base_unchanged()
            outcome = self.progress() | {"done": True, "base_model_unchanged": unchanged}
            self._hint.conclude(outcome)
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
            "missed_hints": self._hint.missed,
            "collected_versions": self._collector.collected,
            "failed_collections": self._collector.failures,
            "store_failures": self._publisher.store_failures + self._intake.store_failures + self._fence.failures,
            **self._publishing(),
            **{name: life.last.get(name) for name in ("loss", "mean_reward", "grad_norm", "wait_s", "step_s")},
            "started_at": life.started_at,
            "updated_at": self._clock(),
            "done": False,
        }

    @property
    def _number(self) -> int:
        return 0 if self._frozen else self._life.step // self._train.publish_every

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

    def _publish(self, *, must: bool = False) -> None:
        life, started = self._life, time.monotonic()
        canary = self._policy.canary()
        self._canary_s = time.monotonic() - started
        taken = self._intake.position.taken
        training: dict[str, Any] = {"step": life.step, "taken_groups": taken, **life.last, **self._publishing()}
        training["lineage"] = life.lineage.to_json()  # for who goes on from here after a rollback
        self._publisher.submit(self._number, self._policy.slices(), training=training, canary=canary, must=must)

    def _note(self, published: Published) -> None:
        self._published = published

    def _publishing(self) -> dict[str, float]:
        """What publishing takes, in seconds: the last canary, and of the last committed version the rest."""
        canary = {"canary_s": round(self._canary_s, 3)}
        if (last := self._published) is None:
            return canary
        return canary | {
            "publish_copy_s": round(last.copy_s, 3),
            "publish_wait_s": round(last.wait_s, 3),
            "publish_write_s": round(last.write_s, 3),  # behind the step
        }

    def _checkpoint(self) -> None:
        life = self._life
        state = self._beginning.state(life)
        checkpoint = Checkpoint(life.claim.epoch, life.step, state, self._policy.capture())
        self._checkpoints.submit(checkpoint, must=life.step >= self._train.steps)

    def _tell(self) -> None:
        """Renew the hint."""
        self._told = (self._life.step, self._intake.position.consumed)
        self._hint.tell(self.progress())

    def _heartbeat(self) -> None:
        """While waiting: notice a successor and a failed publication, and tell samplers what was dropped."""
        self._publisher.check()
        if time.monotonic() - self._checked_fence_at > FENCE_CHECK_S:
            self._check_fence()
        if self._told != (self._life.step, self._intake.position.consumed):
            self._tell()

    def _check_fence(self) -> None:
        """Stop if a later life began. A store that does not answer says nothing: the next look asks again."""
        try:
            demand_unfenced(self._store, self._layout, self._life.claim.epoch, op="train")
        except StoreError as error:
            self._fence.failed(error)
        else:
            self._fence.answered()
            self._checked_fence_at = time.monotonic()

    @contextmanager
    def _closing(self) -> Iterator[None]:
        """End the threads; after an error drop what is queued, for the error is what counts."""
        try:
            yield
        except BaseException:
            self._publisher.close(abandon=True)
            raise
        finally:
            self._collector.close()
            self._checkpoints.shutdown()
            self._hint.close()


def _metrics(step: Step, mean_reward: float) -> dict[str, float]:
    """What the manifest and the hint say of a step."""
    return {
        "loss": float(step.loss.total.detach()),
        "mean_reward": mean_reward,
        "grad_norm": step.grad_norm,
        "behaviour_weight": step.loss.behaviour_weight,
        "kl_to_behaviour": step.loss.kl_to_behaviour,
    }
