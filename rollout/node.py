"""A rollout node: an engine, its agent, a sampler and a held-out evaluation, as threads of one process.

    main thread    watches over the engine (starts it again if it died), renews the node's hint, ends on SIGTERM
    agent          keeps the engine on the latest proven version
    sampler        puts trajectories
    heldout        evaluates each version that is routed

The node knows the trainer only by what lies on the store, and keeps no state but a cache: killed and started again, it
comes back to the latest version.
"""

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable

from rollout.agent import Agent
from rollout.delivery import Delivery, engine_target
from rollout.engine import Engine
from rollout.heldout import Heldout
from rollout.node_hint import NodeHint
from rollout.router import Router
from rollout.sampler import Sampler
from rollout.supervise import Server, Supervisor
from rollout.tasks.prompts import configured_prompts
from rollout.tasks.reward import load_reward
from rollout.watch import Watcher
from shared.catalog import Catalog, check_layout
from shared.config import Config
from shared.errors import LorasyncError, StoreError, UsageError
from shared.run_record import record_run
from shared.signing import load_trust
from shared.stores import open_store, probe

log = logging.getLogger(__name__)

SUPERVISE_INTERVAL_S = 0.5
RESTART_WAIT_S = 2.0


class Node:
    """Puts the parts together and runs them until told to stop."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        server: Server | None,
        base_name: str,
        *,
        sample: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config, self._clock = config, clock
        self._supervisor = Supervisor(server) if server is not None else None
        store = open_store(config.store.url, config.store.options, config.store.client)
        self._catalog = Catalog(store, config.store.adapter, load_trust(config.store.trust))
        probe(store, self._catalog.layout.probes)
        check_layout(store, self._catalog.layout)
        target = engine_target(config, base_name)
        reward = load_reward(config.task.reward)
        train_prompts = configured_prompts(config, config.task.train_prompts) if sample else []
        heldout_prompts = configured_prompts(config, config.task.heldout_prompts)
        self._router = Router()
        self._watcher = Watcher(
            self._catalog,
            poll_interval_s=config.store.poll_interval_s,
            list_interval_s=config.store.list_interval_s,
        )
        delivery = Delivery(self._catalog, engine, target, reader=config.rollout.node)
        self._heldout = Heldout(self._catalog, engine, self._router, config, heldout_prompts, reward)
        self._agent = Agent(
            self._catalog,
            engine,
            self._watcher,
            self._router,
            delivery,
            node=config.rollout.node,
            max_loras=config.rollout.max_loras,
            quarantine_after=config.rollout.quarantine_after,
            on_routed=self._heldout.enqueue,
        )
        self._sampler = (
            Sampler(self._catalog, engine, self._router, config, train_prompts, reward, paused=self._heldout.behind)
            if sample
            else None
        )
        self._stopping = threading.Event()
        self._failure: BaseException | None = None
        record_run(self._catalog, config)
        self._hint = NodeHint(self._catalog, config.rollout.node, renew_s=config.rollout.hint_interval_s, clock=clock)
        self._hint.claim()
        self._hint_failing = False

    def stop(self) -> None:
        """Ask the node to drain and end; may be called from a signal handler."""
        self._stopping.set()

    def run(self) -> None:
        """Run until `stop`; in-flight requests finish before the engine is stopped.

        Raises:
            UsageError: another node took this one's name.
            LorasyncError: the engine would not stay up, or a part failed in a way it can't mend.
        """
        parts: list[tuple[str, Callable[[], None]]] = [("agent", self._follow)]
        parts.append(("heldout", lambda: self._heldout.run(self._stopping)))
        if self._sampler is not None:
            sampler = self._sampler
            parts.append(("sampler", lambda: sampler.run(self._stopping)))
        threads = [threading.Thread(target=self._guard, args=part, name=part[0], daemon=True) for part in parts]
        for thread in threads:
            thread.start()
        try:
            self._supervise()
        finally:
            self._stopping.set()
            self._watcher.wake()
            for thread in threads:
                thread.join(self._config.rollout.request_timeout_s)
            self._watcher.close()
            self._agent.stop()
            with contextlib.suppress(UsageError):  # the name is another's now: its hint stays
                self._tell("stopped")
        if self._failure is not None:
            raise self._failure

    def _guard(self, name: str, body: Callable[[], None]) -> None:
        """Run a thread's body; if it fails, the node ends and says why instead of living on without it."""
        try:
            body()
        except BaseException as error:
            log.exception("%s failed", name)
            is_ours = isinstance(error, LorasyncError)
            self._failure = error if is_ours else LorasyncError(f"{name} failed: {error!r}", op="run node")
            self._stopping.set()

    def _follow(self) -> None:
        while not self._stopping.is_set():
            self._agent.tick()
            self._watcher.wait()

    def _supervise(self) -> None:
        """Keep the engine alive, if it is ours, and the hint fresh: renewed on a change, and now and then without."""
        told_at, told = -math.inf, self._changing()
        while not self._stopping.wait(SUPERVISE_INTERVAL_S):
            routed = self._router.routed
            if self._supervisor is not None and (failure := self._supervisor.failure(serving=routed is not None)):
                self._restart(self._supervisor, failure)
                continue
            changing = self._changing()
            if changing != told or time.monotonic() - told_at >= self._config.rollout.hint_interval_s:
                self._tell("serving" if routed else "starting")
                told_at, told = time.monotonic(), changing

    def _restart(self, supervisor: Supervisor, failure: str) -> None:
        log.warning("engine %s, starting it again", failure)
        self._agent.engine_lost()
        self._tell("starting")
        if not self._stopping.wait(RESTART_WAIT_S):
            supervisor.restart(self._stopping.is_set)
            self._watcher.wake()

    def _changing(self) -> tuple[object, ...]:
        """Of the hint, what is worth a write at once; counters wait for the next one."""
        routed, health = self._router.routed, self._agent.health
        return (routed and routed.version, health.last_error, health.reloads, self._agent.quarantined)

    def _tell(self, state: str) -> None:
        """Renew the node's hint; a store that refuses it costs nothing but the hint.

        Raises:
            UsageError: another node took this one's name.
        """
        routed, health = self._router.routed, self._agent.health
        hint = {
            "node": self._config.rollout.node,
            "version": str(routed.version) if routed else None,
            "served_since": health.served_since if routed else None,
            "updated_at": self._clock(),
            "engine": self._config.rollout.engine_url
            or f"http://{self._config.rollout.host}:{self._config.rollout.port}",
            "state": state,
            "failures": health.failures,
            "last_error": health.last_error,
            "reloads": health.reloads,
            "quarantined": [str(version) for version in sorted(self._agent.quarantined)],
            "groups": self._sampler.groups if self._sampler else 0,
            "lost_requests": (self._sampler.lost if self._sampler else 0) + self._heldout.lost,
        }
        try:
            self._hint.tell(hint)
            self._hint_failing = False
        except StoreError as error:
            if not self._hint_failing:
                log.warning("node hint: %s", error)
            self._hint_failing = True
