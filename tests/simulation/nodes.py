"""Rollout nodes: the product's agent, delivery, watcher and router over an engine of a few lines.

Only the disk is missing: a node keeps the tensors that it fetched in memory, after `shared.transfer` matched every part
with its digest. What an agent loaded stays in its engine, which may outlive the agent, or lose it all while the agent
lives.
"""

import contextlib
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from unittest import mock

import rollout.delivery
from rollout.agent import Agent
from rollout.delivery import Delivered, Delivery, Target
from rollout.proof import Proof, Rows
from rollout.router import Router
from rollout.watch import Watcher
from shared.catalog import Catalog
from shared.coverage import demand_complete
from shared.errors import EngineError
from shared.leases import Lease
from shared.manifest import Manifest, Shard
from shared.transfer import verify
from shared.versions import Version

from .adapters import ADAPTER, BASE, BASE_CONFIG, RANK, Tensors, assembled
from .facts import LAYOUT
from .sim_store import SimStore
from .stage import Stage

POLL_S = 2.0
LIST_S = 16.0
MAX_LORAS = 3
QUARANTINE_AFTER = 3
NEXT_LIFE_S = 20.0  # at most, until a killed agent is started again

Shape = tuple[int, int]
Disk = dict[str, tuple[str, Tensors]]  # directory -> (the manifest's digest, what was fetched)

NO_PROOF = Proof(None, 0.0, 0.0)
TARGET = Target("tiny", BASE_CONFIG, BASE, RANK, Path("/nowhere"))


class NodeStore(SimStore):
    """A node's connection, which may flip bits, and its disk."""

    def __init__(self, stage: Stage, name: str, disk: Disk) -> None:
        super().__init__(stage.bucket, name, reads_flip=True)
        self.disk = disk


def fetch_into_memory(
    store: NodeStore, manifest: Manifest, expected: Mapping[str, Shape], directory: Path, *, base_name: str
) -> Path:
    """`shared.fetch.fetch` without a disk: what is there already is kept, every part is held against its digest."""
    demand_complete(manifest, expected)
    if store.disk.get(str(directory), ("",))[0] != manifest.digest:
        shards = [_verified(store, shard) for shard in manifest.shards]
        store.disk[str(directory)] = manifest.digest, assembled(manifest, shards)
    return directory


def _verified(store: SimStore, shard: Shard) -> bytes:
    content = bytearray(shard.size)

    def keep(start: int, part: memoryview) -> None:
        content[start : start + len(part)] = part

    verify(store, shard, look=keep)
    return bytes(content)


class SimEngine:
    """The part of `rollout.engine.Engine` that agent and delivery ask for. Loads from the node's disk."""

    def __init__(self) -> None:
        self.disk: Disk = {}
        self.loaded: dict[str, Tensors] = {}

    def health(self) -> None: ...

    def models(self) -> list[str]:
        return list(self.loaded)

    def load(self, name: str, path: str) -> None:
        if name in self.loaded:
            raise EngineError(f"{name} is loaded", op="load adapter")
        self.loaded[name] = self.disk[path][1]

    def unload(self, name: str) -> None:
        self.loaded.pop(name, None)

    def score(self, model: str, sequences: Sequence[Sequence[int]]) -> Rows:
        return [[0.0] for _ in sequences]


class SimLease(Lease):
    """A lease that no thread renews: the agent's rounds do."""

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        yield


class SimDelivery(Delivery):
    """The product's, but for the disk, and with a lease on the simulation's clock."""

    def __init__(self, catalog: Catalog, store: NodeStore, engine: SimEngine, lease: Lease) -> None:
        super().__init__(catalog, engine, TARGET)  # type: ignore[arg-type]  # the part that is asked for
        self._store, self._lease = store, lease

    def deliver(self, version: Version, beside: Collection[Version] = ()) -> Delivered:
        self._store.flipped.clear()
        return super().deliver(version, beside)

    def sweep(self, keep: Collection[Version], fetching: Version | None = None) -> None:
        kept = {str(version) for version in keep}
        for path in [path for path in self._store.disk if Path(path).name not in kept]:
            del self._store.disk[path]


@contextlib.contextmanager
def without_disk() -> Iterator[None]:
    """Deliveries fetch into memory and prove nothing while the block runs: there is no model to ask."""
    with (
        mock.patch.object(rollout.delivery, "fetch", fetch_into_memory),
        mock.patch.object(rollout.delivery, "prove", lambda *_: NO_PROOF),
    ):
        yield


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
        store = NodeStore(stage, name, self._engine.disk)
        catalog, router = Catalog(store, ADAPTER), Router()
        rng = random.Random(stage.rng.random())
        watcher = Watcher(catalog, poll_interval_s=POLL_S, list_interval_s=LIST_S, clock=actor.monotonic, rng=rng)
        lease = SimLease(
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
            delivery,
            node=self.name,
            max_loras=MAX_LORAS,
            quarantine_after=QUARANTINE_AFTER,
            on_routed=routed,
            clock=actor.clock,
            monotonic=actor.monotonic,
        )
        self.routed = None
        while True:
            if stage.happens(stage.bucket.weather.lose_engine):
                self._engine.loaded.clear()
                scheduler.note(name, "engine restarts")
            agent.tick()
            self.polls += 1
            scheduler.switch(watcher.pause_s())
