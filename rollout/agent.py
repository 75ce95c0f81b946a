"""The agent: keeps one engine serving the latest version that it could prove.

    look -> decide -> deliver (manifest, fetch, verify, load, prove, receipt) -> route -> retire what nobody uses

Promises: a version is routed only after its proof and its receipt; whatever fails, the last good version keeps
serving; a version that fails `quarantine_after` times is left alone until a newer one comes; an engine that lost its
adapters (a restart) gets them again; names are immutable, never loaded in place; what is fetched and what is routed is
leased, so that no collector deletes it.
Does not: start the engine (`rollout.vllm_server`), sample (`rollout.sampler`).
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import Enum

from rollout.delivery import Delivery
from rollout.engine import Engine
from rollout.router import Router
from rollout.watch import Watcher
from shared import strict_json
from shared.catalog import Catalog
from shared.errors import Corrupt, EngineError, KeyMissing, LorasyncError, StoreError
from shared.manifest import Manifest
from shared.outage import Outage
from shared.versions import Version, parse_served_name

log = logging.getLogger(__name__)

MAX_REST_S = 30.0


class Action(Enum):
    """What to do next."""

    WAIT = "wait"
    DELIVER = "deliver"
    RELOAD = "reload"  # the engine was restarted and lost the routed version


@dataclass(frozen=True)
class Seen:
    """What the decision rests on."""

    wanted: Version | None  # the latest that is not quarantined
    routed: Version | None
    engine_up: bool
    engine_has_routed: bool
    room: bool  # whether one more version fits into the engine's slots
    rested: bool = True  # whether enough time has passed since the last failure


def decide(seen: Seen) -> Action:
    """Pure: the next action."""
    if not seen.engine_up:
        return Action.WAIT
    if seen.routed is not None and not seen.engine_has_routed:
        return Action.RELOAD
    newer = seen.wanted is not None and (seen.routed is None or seen.wanted > seen.routed)
    if newer and seen.room and seen.rested:
        return Action.DELIVER
    return Action.WAIT


@dataclass
class Health:
    """Counted, for the node's hint and for `status`."""

    failures: int = 0
    last_error: str = ""
    reloads: int = 0
    served_since: float | None = None


class Agent:
    """One engine's agent. `tick` belongs to one thread.

    Loop:
        agent = Agent(catalog, engine, watcher, router, delivery, node="node-0", max_loras=3, quarantine_after=3)
        while not stopping:
            agent.tick()
            watcher.wait()
    """

    def __init__(
        self,
        catalog: Catalog,
        engine: Engine,
        watcher: Watcher,
        router: Router,
        delivery: Delivery,
        *,
        node: str,
        max_loras: int,
        quarantine_after: int,
        retry_wait_s: float = 1.0,
        on_routed: Callable[[Manifest], None] = lambda _: None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._catalog, self._engine, self._watcher, self._router = catalog, engine, watcher, router
        self._delivery, self._node = delivery, node
        self._max_loras, self._quarantine_after, self._retry_wait_s = max_loras, quarantine_after, retry_wait_s
        self._on_routed, self._clock, self._monotonic = on_routed, clock, monotonic
        self.health = Health()
        self._tries: Counter[Version] = Counter()
        self._loaded: set[Version] = set()
        self._retired = False  # whether the round before unloaded something
        self._served: Version | None = None  # the last that was routed
        self._at_hand: Version | None = None
        self._failures_in_a_row, self._rest_until = 0, 0.0  # with the version at hand
        self._outage = Outage("agent")
        self._lease_failing = False
        self._routing = threading.Lock()
        self._engine_gone = False

    @property
    def quarantined(self) -> frozenset[Version]:
        """Versions that failed too often."""
        return frozenset(v for v, tries in self._tries.items() if tries >= self._quarantine_after)

    def tick(self) -> Action:
        """Look once and act once. Lets no error of store, engine or version out: they are counted and logged."""
        if self._engine_gone:
            self._forget_engine()
        self._keep_lease()
        wanted: Version | None = None
        try:
            wanted = self._wanted()
            if wanted != self._at_hand:  # what another version did is no reason to rest
                self._at_hand, self._failures_in_a_row, self._rest_until = wanted, 0, 0.0
            action = decide(self._see(wanted))
            if action is Action.DELIVER and wanted is not None:
                self._deliver(wanted)
                self._failures_in_a_row = 0
            elif action is Action.RELOAD:
                log.warning("engine lost its adapters, loading them again")
                self.engine_lost()
                self._watcher.wake()
            elif wanted is None or (self._router.routed and self._router.routed.version == wanted):  # nothing undone
                self._failures_in_a_row = 0
                self._outage.answered()
        except LorasyncError as error:
            self._count(error, wanted)
            return Action.WAIT
        self._retire()
        return action

    def _wanted(self) -> Version | None:
        """The newest version that is not quarantined; none below what was served, unless that is."""
        quarantined, served = self.quarantined, self._served
        newest = self._watcher.look(without=quarantined)
        steps_back = newest is not None and served is not None and newest < served
        return None if steps_back and served not in quarantined else newest

    def engine_lost(self) -> None:
        """Tell the agent that the engine is down, from any thread: nobody is routed until it is back and proven."""
        with self._routing:
            if self._router.routed is not None:
                self.health.reloads += 1
            self._router.route(None)
            self._engine_gone = True

    def stop(self) -> None:
        """Let go of what is leased; `tick` is over after this."""
        self._delivery.release()

    def _keep_lease(self) -> None:
        """Hold what is routed. A store that does not take it may collect it, and nothing is served worse for that."""
        routed = self._router.routed
        try:
            self._delivery.hold([routed.version] if routed else [])
        except StoreError as error:
            self.health.failures += 1
            if not self._lease_failing:
                log.warning("lease not renewed, trying again: %s", error)
            self._lease_failing = True
        else:
            self._lease_failing = False

    def _forget_engine(self) -> None:
        self._engine_gone = False
        self._loaded.clear()
        self._delivery.forget()

    def _see(self, wanted: Version | None) -> Seen:
        routed = self._router.routed.version if self._router.routed else None
        try:
            # vLLM's server still lists its names when its core is dead. The version at hand when it died is blamed
            # once, for it may be what kills engines; without this it would be quarantined within milliseconds.
            self._engine.health()
            names = set(self._engine.models())
        except EngineError:
            return Seen(wanted, routed, False, False, False)
        # What the engine lists is what is loaded: by this life or an earlier one, and less what somebody unloaded.
        parsed = (parse_served_name(name) for name in names)
        self._loaded = {found[1] for found in parsed if found and found[0] == self._catalog.layout.adapter}
        has = routed is not None and self._delivery.name(routed) in names
        rested = self._monotonic() >= self._rest_until
        return Seen(wanted, routed, True, has, len(self._loaded) < self._max_loras, rested)

    def _deliver(self, version: Version) -> None:
        noticed, routed = self._clock(), self._router.routed
        delivered = self._delivery.deliver(version, beside=[routed.version] if routed else [])
        self._loaded.add(version)
        served = self._clock()
        manifest = delivered.manifest
        submitted = float(manifest.training.get("submitted_at", noticed))
        receipt = {
            "node": self._node,
            "version": str(version),
            "digest": manifest.digest,
            "submitted_at": submitted,
            "served_at": served,
            "publish_to_served_s": served - submitted,
            "parts": {
                "notice": noticed - submitted,
                "fetch": delivered.fetched_s,
                "load": delivered.loaded_s - delivered.fetched_s,
                "prove": delivered.proven_s - delivered.loaded_s,
            },
            "canary": asdict(delivered.proof),
        }
        key = self._catalog.layout.receipt(version, self._node)
        self._catalog.store.put_if_absent(key, strict_json.dumps(receipt))  # the first delivery is the one that counts
        with self._routing:
            if self._engine_gone:  # it died while we delivered: the next tick begins anew
                return
            self._router.route(manifest)
        self._served = version
        self.health.served_since = served
        log.info("serving version=%s publish_to_served_s=%.3f", version, served - submitted)
        self._on_routed(manifest)

    def _retire(self) -> None:
        """Unload every version that nobody uses; delete the files of those unloaded by the round before.

        An adapter's files outlive its unloading: vLLM reads them again if it evicts and reloads a version in use.
        """
        unloaded = [version for version in sorted(self._loaded) if self._router.idle(version)]
        if unloaded or self._retired:
            self._delivery.sweep(keep=set(self._loaded), fetching=self._at_hand)
        self._retired = bool(unloaded)
        for version in unloaded:
            self._unload(version)

    def _unload(self, version: Version) -> None:
        """Unload a version; one that stays is tried again at the next tick, and is nobody's fault."""
        try:
            self._engine.unload(self._delivery.name(version))
        except EngineError as error:
            self.health.failures += 1
            log.warning("version=%s not unloaded: %s", version, error)
            return
        self._loaded.discard(version)
        log.info("unloaded version=%s", version)

    def _count(self, error: LorasyncError, wanted: Version | None) -> None:
        """Count a failure, and rest before the next try, longer each time.

        Only what the version itself may be to blame for brings it nearer to quarantine: bytes that are wrong, an
        engine that refuses or disproves it. A store or a disk that fails does not, nor an engine that can't be reached.
        """
        self.health.failures += 1
        self._failures_in_a_row += 1
        rest_s = min(self._retry_wait_s * 2 ** (self._failures_in_a_row - 1), MAX_REST_S)
        self._rest_until = self._monotonic() + rest_s  # a host's clock that is set back would make it longer
        if isinstance(error, KeyMissing) and wanted is not None:
            self._watcher.forget(wanted)
        if isinstance(error, Corrupt | EngineError) and not error.retryable and wanted is not None:
            self._tries[wanted] += 1
        quarantined = wanted in self.quarantined
        if isinstance(error, StoreError) and error.retryable:
            self._outage.failed(error)
        elif quarantined or str(error) != self.health.last_error or self._failures_in_a_row == 1:
            state = "quarantined" if quarantined else "will try again"
            log.warning("version=%s failed (%s): %s", wanted, state, error)
        self.health.last_error = str(error)
