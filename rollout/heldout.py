"""Evaluates every version on the held-out prompts as soon as it is served, and puts the outcomes on the store.

A version is held (`Router.hold`) from the moment it is routed until its evaluation is put, so it stays loaded although
newer versions are routed meanwhile. While more than one version waits, `behind` asks the sampler to pause: evaluation
sets the pace then, instead of versions going unmeasured. What is lost to a passing fault of store or engine is tried
again; without held-out prompts (`rollout.heldout_limit = 0`) nothing is evaluated.
"""

import logging
import queue
import threading
from collections.abc import Sequence

from rollout.engine import Engine
from rollout.evaluate import Evaluation, evaluate
from rollout.router import Router
from rollout.tasks.prompts import Prompt
from rollout.tasks.reward import Reward
from shared.catalog import Catalog
from shared.config import Config
from shared.errors import Corrupt, EngineError, StoreError
from shared.manifest import Manifest
from shared.versions import Version, served_name

log = logging.getLogger(__name__)

FINAL_SEED_OFFSET = 1_000_000
DONE_POLL_S = 1.0  # between looks whether the trainer is done
RETRY_WAIT_S = 1.0  # after a passing fault


class Heldout:
    """One thread evaluates (`run`); `enqueue` and `behind` may be called from any."""

    def __init__(
        self,
        catalog: Catalog,
        engine: Engine,
        router: Router,
        config: Config,
        prompts: Sequence[Prompt],
        reward: Reward,
    ) -> None:
        self._catalog, self._engine, self._router, self._config = catalog, engine, router, config
        self._prompts, self._reward = list(prompts)[: config.rollout.heldout_limit], reward
        self._waiting: queue.Queue[Manifest] = queue.Queue()
        self._final_done = not self._prompts
        self._troubled: set[Version] = set()  # whose evaluation failed, and was told
        self.lost = 0  # evaluations that failed for good; a version that is routed again is evaluated again

    def enqueue(self, manifest: Manifest) -> None:
        """Evaluate a version that was just routed. Asks the store nothing: the agent's thread calls it."""
        if self._prompts:
            self._router.hold(manifest.version)
            self._waiting.put(manifest)

    def behind(self) -> bool:
        """Whether more than one version waits."""
        return self._waiting.qsize() > 1

    def run(self, stopping: threading.Event) -> None:
        """Evaluate until told to stop; when the trainer says it is done, once more with other seeds."""
        while not stopping.is_set():
            try:
                manifest = self._waiting.get(timeout=DONE_POLL_S)
            except queue.Empty:
                self._evaluate_final()
                continue
            if self._evaluated(manifest):
                self._router.release(manifest.version)
            else:
                self._waiting.put(manifest)  # still held
                stopping.wait(RETRY_WAIT_S)

    def _evaluated(self, manifest: Manifest) -> bool:
        """Evaluate a version; whether that is settled, done or lost for good."""
        if self._exists(self._catalog.layout.evaluation(manifest.version, self._config.rollout.node)):
            return True  # by an earlier life of this node, or routed twice: its engine was started again meanwhile
        try:
            self._evaluate(manifest, self._config.rollout.node, self._config.rollout.seed)
        except (EngineError, StoreError) as error:
            again = error.retryable
            self.lost += not again
            if manifest.version not in self._troubled:
                log.warning(
                    "held-out evaluation of version=%s %s: %s",
                    manifest.version,
                    "will be tried again" if again else "lost",
                    error,
                )
            self._troubled.add(manifest.version)
            return not again
        self._troubled.discard(manifest.version)
        return True

    def _evaluate_final(self) -> None:
        """The served policy after the end of training, measured afresh: what a frozen run must show to be flat."""
        if self._final_done:
            return
        try:
            progress = self._catalog.progress()
            if not progress or not progress.get("done"):
                return
            newest = self._catalog.newest()  # not the hint, which a stalled trainer may have set back
            with self._router.lease() as manifest:
                if manifest is None or newest != manifest.version:
                    return
                seed = self._config.rollout.seed + FINAL_SEED_OFFSET
                self._evaluate(manifest, f"{self._config.rollout.node}.final", seed)
                self._final_done = True
        except (EngineError, StoreError) as error:
            self.lost += 1
            log.warning("final evaluation lost: %s", error)

    def _evaluate(self, manifest: Manifest, node: str, seed: int) -> Evaluation:
        name = served_name(self._catalog.layout.adapter, manifest.version)
        max_tokens = self._config.task.max_new_tokens
        evaluation = evaluate(self._engine, name, self._prompts, self._reward, max_tokens=max_tokens, seed=seed)
        key = self._catalog.layout.evaluation(manifest.version, node)
        self._catalog.store.put_if_absent(key, evaluation.to_parquet())
        log.info(
            "evaluated version=%s greedy=%.3f sampled=%.3f",
            manifest.version,
            evaluation.greedy_reward,
            evaluation.sampled_reward,
        )
        return evaluation

    def _exists(self, key: str) -> bool:
        try:
            self._catalog.store.get_range(key, 0, 1)
        except Corrupt:  # whatever stands there, ours will not
            return True
        except StoreError:  # missing, or not to be had now: then the put finds out
            return False
        return True
