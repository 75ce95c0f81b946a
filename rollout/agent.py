"""The agent: keeps one engine serving the latest version that it could prove.

    look -> decide -> deliver (manifest, fetch, verify, load, prove, receipt) -> route -> retire what nobody uses

Promises: a version is routed only after its proof and its receipt; whatever fails, the last good version keeps
serving; a version that fails `quarantine_after` times is left alone until a newer one comes; an engine that lost its
adapters (a restart) gets them again; names are immutable, never loaded in place.
Does not: start the engine (`rollout.vllm_server`), sample (`rollout.sampler`).
"""

import logging
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
from shared.versions import Version, parse_served_name

log = logging.getLogger(__name__)


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


def decide(seen: Seen) -> Action:
    """Pure: the next action."""
    if not seen.engine_up:
        return Action.WAIT
    if seen.routed is not None and not seen.engine_has_routed:
        return Action.RELOAD
    newer = seen.wanted is not None and (seen.routed is None or seen.wanted > seen.routed)
    if newer and seen.room:
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
        on_routed: Callable[[Manifest], None] = lambda _: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._catalog, self._engine, self._watcher, self._router = catalog, engine, watcher, router
        self._delivery, self._node = delivery, node
        self._max_loras, self._quarantine_after = max_loras, quarantine_after
        self._on_routed, self._clock = on_routed, clock
        self.health = Health()
        self._tries: Counter[Version] = Counter()
        self._loaded: set[Version] = set()
        self._retired = False  # whether the round before unloaded something

    @property
    def quarantined(self) -> frozenset[Version]:
        """Versions that failed too often."""
        return frozenset(v for v, tries in self._tries.items() if tries >= self._quarantine_after)

    def tick(self) -> Action:
        """Look once and act once. Lets no error of store, engine or version out: they are counted and logged."""
        wanted: Version | None = None
        try:
            wanted = self._wanted(self._watcher.look())
            action = decide(self._see(wanted))
            if action is Action.DELIVER and wanted is not None:
                self._deliver(wanted)
            elif action is Action.RELOAD:
                log.warning("engine lost its adapters, loading them again")
                self.engine_lost()
                self._watcher.wake()
            self._retire()
            return action
        except LorasyncError as error:
            self._count(error, wanted)
            return Action.WAIT

    def engine_lost(self) -> None:
        """Tell the agent that the engine is down: nobody is routed until it is back and proven again."""
        if self._router.routed is not None:
            self.health.reloads += 1
        self._router.route(None)
        self._loaded.clear()
        self._delivery.forget()

    def _wanted(self, latest: Version | None) -> Version | None:
        """The latest version that is not quarantined; the listing is only asked when the latest one is."""
        if latest not in self.quarantined:
            return latest
        return max((v for v in self._catalog.versions() if v not in self.quarantined), default=None)

    def _see(self, wanted: Version | None) -> Seen:
        routed = self._router.routed.version if self._router.routed else None
        try:
            # vLLM's server still lists its names when its core is dead. The version at hand when it died is blamed
            # once, for it may be what kills engines; without this it would be quarantined within milliseconds.
            self._engine.health()
            names = set(self._engine.models())
        except EngineError:
            return Seen(wanted, routed, False, False, False)
        self._adopt(names)
        has = routed is not None and self._delivery.name(routed) in names
        return Seen(wanted, routed, True, has, len(self._loaded) < self._max_loras)

    def _adopt(self, names: set[str]) -> None:
        """Count what an earlier life of this agent loaded as loaded, so that it is unloaded when nobody uses it."""
        for parsed in map(parse_served_name, names):
            if parsed is not None and parsed[0] == self._catalog.layout.adapter:
                self._loaded.add(parsed[1])

    def _deliver(self, version: Version) -> None:
        noticed = self._clock()
        delivered = self._delivery.deliver(version)
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
        self._router.route(manifest)
        self.health.served_since = served
        log.info("serving version=%s publish_to_served_s=%.3f", version, served - submitted)
        self._on_routed(manifest)

    def _retire(self) -> None:
        """Unload every version that nobody uses; delete the files of those unloaded by the round before.

        An adapter's files outlive its unloading: vLLM reads them again if it evicts and reloads a version in use.
        """
        unloaded = [version for version in sorted(self._loaded) if self._router.idle(version)]
        if unloaded or self._retired:
            self._delivery.sweep(keep=set(self._loaded))
        self._retired = bool(unloaded)
        for version in unloaded:
            self._unload(version)

    def _unload(self, version: Version) -> None:
        self._engine.unload(self._delivery.name(version))
        self._loaded.discard(version)
        log.info("unloaded version=%s", version)

    def _count(self, error: LorasyncError, wanted: Version | None) -> None:
        """Count a failure; one that the version itself is to blame for brings it nearer to quarantine."""
        self.health.failures += 1
        self.health.last_error = str(error)
        blamed = isinstance(error, Corrupt | EngineError) or (
            isinstance(error, StoreError) and not error.retryable and not isinstance(error, KeyMissing)
        )
        if blamed and not error.retryable and wanted is not None:
            self._tries[wanted] += 1
        state = "quarantined" if wanted in self.quarantined else "will try again"
        log.warning("version=%s failed (%s): %s", wanted, state, error)
