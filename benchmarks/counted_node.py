"""One rollout node's real code for an hour of simulated time, over a store that counts what it is asked.

Real are Watcher, Agent, Delivery with download and verification, NodeHint, and what the sampler asks before it begins a
request; simulated are the clock, the engine, and a trainer that commits a version every VERSION_EVERY_S.
"""

import hashlib
import heapq
import random
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from publisher.convert import AdapterSlice
from publisher.epochs import claim_epoch
from publisher.publisher import Publisher
from rollout.agent import Agent
from rollout.delivery import Delivery, Target
from rollout.engine import Completion
from rollout.node_hint import NodeHint
from rollout.pace import ProducedGroups
from rollout.router import Router
from rollout.watch import Watcher
from shared import strict_json
from shared.base_model import BaseIdentity
from shared.catalog import Catalog
from shared.config import LoraConfig, RolloutConfig, StoreConfig
from shared.errors import KeyMissing
from shared.layout import Layout
from shared.manifest import Manifest
from shared.peft_names import expected_tensors
from shared.store import Entry, Fetched, Store
from shared.versions import Version

VERSION_EVERY_S = 20.0
HOUR_S = 3600.0
SUPERVISE_INTERVAL_S = 0.5  # rollout.node's
SEED = 1

BASE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "num_experts": 2,
    "moe_intermediate_size": 4,
}
LORA = LoraConfig(rank=2, alpha=4)
IDENTITY = BaseIdentity("qwen3_moe", "0" * 64, "0" * 64)
ADAPTER, NODE = "policy", "node-0"


class CountingStore:
    """A store in memory; counts requests as S3 bills them, by kind and by the folder below the adapter."""

    url = "memory://benchmark"

    def __init__(self) -> None:
        self._objects: dict[str, Fetched] = {}
        self.asked: Counter[tuple[str, str]] = Counter()

    def _count(self, kind: str, key: str) -> None:
        self.asked[kind, key.split("/")[1]] += 1

    def _get(self, key: str) -> Fetched:
        self._count("GET", key)
        if key not in self._objects:
            raise KeyMissing("no such object", op="get", key=key)
        return self._objects[key]

    def get(self, key: str, max_bytes: int | None = None) -> bytes:  # noqa: ARG002 - the interface's
        return self._get(key).content

    def get_range(self, key: str, start: int, end: int) -> bytes:
        return self._get(key).content[start:end]

    def get_if_changed(self, key: str, tag: str, max_bytes: int | None = None) -> Fetched | None:  # noqa: ARG002
        found = self._get(key)
        return None if found.tag == tag else found

    def put(self, key: str, content: bytes) -> None:
        self._count("PUT", key)
        self._objects[key] = Fetched(content, hashlib.md5(content).hexdigest())

    def put_if_absent(self, key: str, content: bytes) -> bool:
        if key in self._objects:
            self._count("PUT", key)
            return self._objects[key].content == content
        self.put(key, content)
        return True

    def put_stream(self, key: str, chunks: Iterable[bytes | memoryview], size: int) -> None:  # noqa: ARG002
        self.put(key, b"".join(chunks))

    def list(self, prefix: str, after: str = "") -> list[Entry]:
        self._count("LIST", prefix)
        keys = sorted(key for key in self._objects if key.startswith(f"{prefix}/") and key > after)
        return [Entry(key, len(self._objects[key].content), 0.0) for key in keys]

    def delete(self, key: str) -> None:
        self._count("DELETE", key)
        self._objects.pop(key, None)

    def sweep(self, prefix: str, older_than_s: float) -> int:
        raise NotImplementedError("nobody collects here")


class ObedientEngine:
    """Loads what it is told to, and answers differently under every adapter."""

    url = "http://engine"

    def __init__(self) -> None:
        self._names = {"base": 0.0}

    def health(self) -> None:
        pass

    def models(self) -> list[str]:
        return list(self._names)

    def load(self, name: str, path: str) -> None:  # noqa: ARG002 - the interface's
        self._names[name] = 0.5

    def unload(self, name: str) -> None:
        del self._names[name]

    def complete(self, *_: Any, **__: Any) -> list[list[Completion]]:
        raise NotImplementedError("nobody samples here")

    def complete_seeded(self, *_: Any, **__: Any) -> list[Completion]:
        raise NotImplementedError("nobody samples here")

    def score(self, model: str, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return [[self._names[model]] * (len(sequence) - 1) for sequence in sequences]


def first_version(store: Store, folder: Path) -> Manifest:
    """Publish a version as a trainer does; later ones are the same bytes under other manifests."""
    (folder / "config.json").write_bytes(strict_json.dumps(BASE))
    layout, torch_rng = Layout(ADAPTER), torch.Generator().manual_seed(SEED)
    claim = claim_epoch(store, layout)
    publisher = Publisher(store, layout, claim, base_path=str(folder), base=IDENTITY, lora=LORA, parallel={"tp": 1})
    shapes = expected_tensors(BASE, LORA.targets, LORA.rank)
    slices = [AdapterSlice(n, torch.randn(shape, generator=torch_rng), shape, (0, 0)) for n, shape in shapes.items()]
    publisher.submit(0, slices, training={"step": 0})
    publisher.close()
    return Catalog(store, ADAPTER).manifest(Version(1, 0))


class Node:
    """The real parts of a rollout node over a simulated clock."""

    def __init__(self, store: Store, folder: Path, poll_interval_s: float) -> None:
        self.now = 0.0
        catalog, engine, self.router = Catalog(store, ADAPTER), ObedientEngine(), Router()
        self.watcher = Watcher(
            catalog,
            poll_interval_s=poll_interval_s,
            list_interval_s=StoreConfig("").list_interval_s,
            clock=self._clock,
            rng=random.Random(SEED),
        )
        target = Target("base", BASE, IDENTITY, LORA.rank, folder / "cache")
        delivery = Delivery(catalog, engine, target, self._clock, reader=NODE)
        rollout = RolloutConfig(node=NODE)
        self.agent = Agent(
            catalog,
            engine,
            self.watcher,
            self.router,
            delivery,
            node=NODE,
            max_loras=rollout.max_loras,
            quarantine_after=rollout.quarantine_after,
            clock=self._clock,
            monotonic=self._clock,
        )
        self._hint_interval_s = rollout.hint_interval_s
        self._hint = NodeHint(catalog, NODE, renew_s=self._hint_interval_s, clock=self._clock)
        self._hint.claim()
        self._told: tuple[float, Version | None] = (0.0, None)

    def _clock(self) -> float:
        return self.now

    def supervise(self) -> None:
        """As `rollout.node` does: tell what changed, and now and then what did not."""
        version = self.router.routed.version if self.router.routed else None
        told_at, told = self._told
        if version != told or self.now - told_at >= self._hint_interval_s:
            self._hint.tell({"node": NODE, "version": str(version), "updated_at": self.now, "state": "serving"})
            self._told = self.now, version


def serve_for_an_hour(poll_interval_s: float) -> Counter[tuple[str, str]]:
    """Run one node's real code for an hour; what it asked of the store."""
    store = CountingStore()
    catalog = Catalog(store, ADAPTER)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = first_version(store, folder)
        store.asked.clear()
        node = Node(store, folder, poll_interval_s)
        steps = [(0.0, "look"), (0.0, "supervise"), (VERSION_EVERY_S, "publish")]
        number = 0
        while steps[0][0] < HOUR_S:
            node.now, step = heapq.heappop(steps)
            if step == "publish":
                number += 1
                later, asked = replace(first, version=Version(1, number)), store.asked.copy()
                store.put(catalog.layout.manifest(later.version), later.to_bytes())
                store.put(catalog.layout.latest, strict_json.dumps({"epoch": 1, "version": number, "digest": ""}))
                store.asked = asked  # the trainer's
                heapq.heappush(steps, (node.now + VERSION_EVERY_S, step))
            elif step == "look":
                node.agent.tick()
                heapq.heappush(steps, (node.now + node.watcher.pause_s(), step))
            else:
                node.supervise()
                heapq.heappush(steps, (node.now + SUPERVISE_INTERVAL_S, step))
    routed = node.router.routed
    if routed is None or routed.version.number < number - 1:
        raise AssertionError(f"the node did not follow: {node.agent.health}")
    return store.asked


def sample_for_an_hour(poll_interval_s: float) -> Counter[tuple[str, str]]:
    """What a sampler asks before each request that it begins, one a poll interval, beside its own files."""
    store, now = CountingStore(), 0.0
    catalog = Catalog(store, ADAPTER)
    produced = ProducedGroups(store, catalog.layout, clock=lambda: now)
    while now < HOUR_S:
        catalog.progress()
        produced.count()
        now += poll_interval_s
    return store.asked
