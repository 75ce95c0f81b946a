"""The whole loop over one URL, on a directory and on S3: publish, notice, fetch, prove, route, sample, take.

Publisher, watcher, agent, sampler and intake are the real ones; Megatron and vLLM are left out, so it is a matter of
seconds. Nothing but the URL and its options differs between the two runs.
"""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fake_engine import BASE_NAME, FakeEngine
from synthetic import ADAPTER, BASE, factors, open_publisher, write_base

from publisher.convert import convert
from publisher.lineage import Lineage
from rollout.agent import Agent
from rollout.delivery import Delivery, Target
from rollout.router import Router
from rollout.sampler import Sampler
from rollout.tasks.prompts import Prompt
from rollout.watch import Watcher
from shared.base_model import identify
from shared.catalog import Catalog
from shared.config import Config, ModelConfig, RolloutConfig, StoreConfig, TaskConfig, TrainConfig
from shared.layout import groups_of
from shared.stores import open_store, probe
from shared.versions import Version
from trainer.intake import Group, Intake, Rules, staleness

VERSIONS = 4
TRAIN = TrainConfig(prompts_per_step=8, group_size=2, max_staleness=1)
ROLLOUT = RolloutConfig(node="n0", groups_per_request=4, max_concurrent_groups=8)
DEADLINE_S = 60.0


@dataclass(frozen=True)
class Place:
    """A URL and what it needs."""

    url: str
    options: dict[str, Any]


@pytest.fixture(params=["file", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "file":
        return Place(f"file://{tmp_path / 'store'}", {})
    server = request.getfixturevalue("s3")
    return Place(server.url(f"loop/{tmp_path.name}"), server.options)


class Loop:
    """A trainer's and a node's ends of the store, each with a client of its own."""

    def __init__(self, place: Place, folder: Path) -> None:
        base = write_base(folder / "base")
        config = Config(
            store=StoreConfig(place.url, ADAPTER, place.options, poll_interval_s=0.02),
            model=ModelConfig(str(base)),
            task=TaskConfig(train_prompts="", heldout_prompts="", reward="", max_new_tokens=4),
            train=TRAIN,
            rollout=ROLLOUT,
        )
        ours, theirs = (open_store(place.url, place.options) for _ in range(2))
        probe(ours, Catalog(ours, ADAPTER).layout.probes)
        self.publisher = open_publisher(ours, base)
        rules = Rules(group_size=TRAIN.group_size, vocab_size=128, max_tokens=64)
        layout = Catalog(ours, ADAPTER).layout
        self.intake = Intake(ours, layout, Lineage(1), rules, max_staleness=1, poll_interval_s=0.02)
        self.catalog, self.engine, self.router = Catalog(theirs, ADAPTER), FakeEngine(), Router()
        self.watcher = Watcher(self.catalog, poll_interval_s=0.02, list_interval_s=30.0)
        target = Target(BASE_NAME, BASE, identify(base), ROLLOUT.max_lora_rank, folder / "cache")
        self.agent = Agent(
            self.catalog,
            self.engine,
            self.watcher,
            self.router,
            Delivery(self.catalog, self.engine, target),
            node=ROLLOUT.node,
            max_loras=ROLLOUT.max_loras,
            quarantine_after=1,
        )
        prompts = [Prompt(id=str(n), token_ids=(5, n)) for n in range(3, 60)]
        self.sampler = Sampler(self.catalog, self.engine, self.router, config, prompts, lambda *_: 1.0)

    def publish(self, number: int) -> None:
        training = {"step": number, "taken_groups": self.intake.position.taken}
        self.publisher.submit(number, convert(BASE, factors(number)), training=training)

    def serve(self, version: Version) -> None:
        """Let the agent work until it serves this version."""
        deadline = time.monotonic() + DEADLINE_S
        while self.router.routed is None or self.router.routed.version != version:
            self.agent.tick()
            self.publisher.check()
            assert self.agent.health.last_error == ""
            assert time.monotonic() < deadline
            self.watcher.wait()


@pytest.fixture
def loop(place: Place, tmp_path: Path) -> Iterator[Loop]:
    loop, stopping = Loop(place, tmp_path), threading.Event()
    sampling = threading.Thread(target=loop.sampler.run, args=(stopping,))
    sampling.start()
    yield loop
    stopping.set()
    sampling.join()
    loop.watcher.close()
    loop.publisher.close(abandon=True)


def test_every_version_is_served_and_sampled_and_every_batch_is_fresh_and_taken_once(loop: Loop):
    batches: list[list[Group]] = []
    for number in range(VERSIONS):
        version = Version(1, number)
        loop.publish(number)
        loop.serve(version)
        batches.append(loop.intake.take(TRAIN.prompts_per_step, version, DEADLINE_S))
        assert all(staleness(group, version) <= TRAIN.max_staleness for group in batches[-1])
    taken = [group.samples[0].group for batch in batches for group in batch]
    assert len(taken) == len(set(taken)) == VERSIONS * TRAIN.prompts_per_step
    assert loop.intake.position.dropped == {}

    store, layout = loop.catalog.store, loop.catalog.layout
    assert loop.catalog.versions() == [Version(1, number) for number in range(VERSIONS)]
    receipts = [entry.key for entry in store.list(layout.receipts)]
    assert receipts == [layout.receipt(version, ROLLOUT.node) for version in loop.catalog.versions()]
    assert store.list(layout.probes) == []
    put = sum(groups_of(entry.key) for entry in store.list(layout.all_trajectories))
    per_version = TRAIN.prompts_per_step * TRAIN.publish_every
    assert len(taken) <= put <= (VERSIONS - 1 + TRAIN.max_staleness + 1) * per_version, "the pace held"
