"""Rollout nodes: the product's agent, watcher and router over an engine of a few lines.

`Delivery` here is `rollout.delivery.Delivery` without a disk: lease, manifest, every part against its digest, load.
What an agent loaded stays in its engine, which may outlive the agent, and may lose it all while the agent lives.
"""

import contextlib
import random
from collections.abc import Collection
from pathlib import Path

from rollout.agent import Agent
from rollout.delivery import Delivered
from rollout.proof import Proof
from rollout.router import Router
from rollout.watch import Watcher
from shared.catalog import Catalog
from shared.coverage import demand_complete
from shared.errors import EngineError, StoreError
from shared.leases import Lease
from shared.manifest import Manifest, Shard
from shared.transfer import verify
from shared.versions import Version, parse_served_name, served_name

from .adapters import ADAPTER, EXPECTED, Tensors, assembled
from .facts import LAYOUT
from .sim_store import SimStore
from .stage import Stage

POLL_S = 2.0
LIST_S = 16.0
MAX_LORAS = 3
QUARANTINE_AFTER = 3
NEXT_LIFE_S = 20.0  # at most, until a killed agent is started again
NO_PROOF = Proof(None, 0.0, 0.0)


class SimEngine:
    """The part of `rollout.engine.Engine` that the agent asks for."""

    def __init__(self) -> None:
        self.loaded: dict[str, Tensors] = {}

    def health(self) -> None: ...

    def models(self) -> list[str]:
        return list(self.loaded)

    def load_tensors(self, name: str, tensors: Tensors) -> None:
        if name in self.loaded:
            raise EngineError(f"{name} is loaded", op="load adapter")
        self.loaded[name] = tensors

    def unload(self, name: str) -> None:
        self.loaded.pop(name, None)


class SimDelivery:
    """What the agent asks of `rollout.delivery.Delivery`."""

    def __init__(self, catalog: Catalog, store: SimStore, engine: SimEngine, lease: Lease) -> None:
        self._catalog, self._store, self._engine, self._lease = catalog, store, engine, lease

    def name(self, version: Version) -> str:
        return served_name(ADAPTER, version)

    def deliver(self, version: Version) -> Delivered:
        self._store.flipped.clear()
        loaded = (parse_served_name(name) for name in self._engine.models())
        self._lease.take({version, *(found[1] for found in loaded if found)})
        manifest = self._catalog.manifest(version)
        demand_complete(manifest, EXPECTED)
        tensors = assembled(manifest, [self._verified(shard) for shard in manifest.shards])
        if self.name(version) not in self._engine.models():
            self._engine.load_tensors(self.name(version), tensors)
        return Delivered(manifest, self.name(version), Path(), NO_PROOF, 0.0, 0.0, 0.0)

    def _verified(self, shard: Shard) -> bytes:
        """A shard's bytes, after each part of them matched its digest."""
        content = bytearray(shard.size)

        def keep(start: int, part: memoryview) -> None:
            content[start : start + len(part)] = part

        verify(self._store, shard, look=keep)
        return bytes(content)

    def sweep(self, keep: Collection[Version]) -> None: ...

    def forget(self) -> None: ...


class Node:
    """A slot in the fleet: one engine, and one life of an agent after another."""

    def __init__(self, stage: Stage, name: str) -> None:
        self.name, self._stage = name, stage
        self._engine, self._lives = SimEngine(), 0
        self.agent: Agent | None = None
        self.routed: Version | None = None
        self.polls = 0

    def begin(self, delay_s: float = 0.0) -> None:
        """Start a life of the agent."""
        self._lives += 1
        name = f"{self.name}-{self._lives}"
        self._actor = self._stage.scheduler.spawn(
            name, lambda: self._live(name), skew_s=self._stage.skew_s(), delay_s=delay_s
        )

    def ended(self, name: str) -> None:
        """An agent is gone: another one is started, with the same engine or a new one."""
        if name == self._actor.name:
            if self._stage.rng.random() < 0.5:
                self._engine.loaded.clear()
            self.begin(self._stage.rng.random() * NEXT_LIFE_S)

    def arrived(self, latest: Version | None) -> bool:
        """Whether the latest version is served, or was given up for damaged too often."""
        given_up = self.agent.quarantined if self.agent else frozenset()
        return self.routed == latest or latest in given_up

    def _live(self, name: str) -> None:
        stage, scheduler, actor = self._stage, self._stage.scheduler, self._actor
        store = SimStore(stage.bucket, name, reads_flip=True)
        catalog, router = Catalog(store, ADAPTER), Router()
        rng = random.Random(stage.rng.random())
        watcher = Watcher(catalog, poll_interval_s=POLL_S, list_interval_s=LIST_S, clock=actor.monotonic, rng=rng)
        lease = Lease(
            store, LAYOUT, self.name, stage.scenario.lease_ttl_s, life=str(self._lives), clock=actor.monotonic
        )
        delivery = SimDelivery(catalog, store, self._engine, lease)

        def routed(manifest: Manifest) -> None:
            stage.seen.gave_up[self.name] = agent.quarantined
            self.routed = manifest.version
            tensors = self._engine.loaded[delivery.name(manifest.version)]
            stage.activated(self.name, manifest, tensors, bool(store.flipped))

        agent = self.agent = Agent(
            catalog,
            self._engine,  # type: ignore[arg-type]  # the part that the agent asks for
            watcher,
            router,
            delivery,  # type: ignore[arg-type]
            node=self.name,
            max_loras=MAX_LORAS,
            quarantine_after=QUARANTINE_AFTER,
            on_routed=routed,
            clock=actor.clock,
        )
        self.routed = None
        while True:
            if stage.happens(stage.bucket.weather.lose_engine):
                self._engine.loaded.clear()
                scheduler.note(name, "engine restarts")
            agent.tick()
            with contextlib.suppress(StoreError):
                lease.renew()
            self.polls += 1
            scheduler.switch(watcher.pause_s())
