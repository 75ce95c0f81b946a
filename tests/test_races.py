"""Two hundred rounds of eight writers on one name, on every kind of store: one winner each, and every loser is told.

What races is the real commit (`put_manifest`) of one version by trainers whose manifests differ, the real claim of an
epoch, and the write below it. On a directory the writers are processes; on memory threads of one; on S3 threads with
clients of their own, half of them s3fs and half obstore, while the server loses replies to writes that it has done.

A failing round prints its seed; RACE_SEED=... in the environment replays the choices, though not the threads' order.
"""

import multiprocessing
import os
import random
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import s3_server
from store_openers import SERVERS

from publisher.commit import put_manifest
from publisher.epochs import claim_epoch
from shared import strict_json
from shared.base_model import BaseIdentity
from shared.catalog import Catalog
from shared.errors import Fenced
from shared.layout import Layout
from shared.manifest import LoraShape, Manifest
from shared.obstore_store import ObstoreStore
from shared.retry import Retry
from shared.s3_store import S3Store
from shared.store import Store
from shared.stores import open_store
from shared.versions import Version

WRITERS = 8
ROUNDS = 200
CLAIM_ROUNDS = 8  # of eight claims each
ROUND_TIMEOUT_S = 120.0
LAYOUT = Layout("policy")
QUICK = Retry(attempts=12, first_wait_s=0.01)  # lost replies are many, and the server is near


def manifest(version: Version, writer: int) -> Manifest:
    """What this writer would commit; every writer's differs."""
    return Manifest(
        adapter=LAYOUT.adapter,
        version=version,
        parent=None,
        base=BaseIdentity("qwen3_moe", "0" * 64, "0" * 64),
        lora=LoraShape(rank=4, alpha=8, wire_alpha=4, targets=("linear_qkv",)),
        parallel={"tp": 1},
        encoding="bf16",
        shards=(),
        tensors={},
        aliases={},
        training={"step": version.number, "writer": writer},
        canary=None,
    ).sealed()


def race_for_versions(store: Store, writer: int, start: Callable[[], Any]) -> list[bool]:
    """One writer's part: which versions it won. A loser is told by Fenced."""
    won = []
    for number in range(ROUNDS):
        start()
        try:
            put_manifest(store, LAYOUT, manifest(Version(1, number), writer))
            won.append(True)
        except Fenced:
            won.append(False)
    return won


def race_for_names(store: Store, writer: int, start: Callable[[], Any]) -> list[bool]:
    """As each claim of an epoch does it: whether it is ours, in one word."""
    won = []
    for epoch in range(1, ROUNDS + 1):
        start()
        won.append(store.put_if_absent(LAYOUT.epoch(epoch), strict_json.dumps({"epoch": epoch, "writer": writer})))
    return won


def race_for_epochs(store: Store, _: int, start: Callable[[], Any]) -> list[tuple[int, str]]:
    """Every claim wins some epoch: the epochs and nonces that it got."""
    claims = []
    for _ in range(CLAIM_ROUNDS):
        start()
        claim = claim_epoch(store, LAYOUT)
        claims.append((claim.epoch, claim.nonce))
    return claims


Race = Callable[[Store, int, Callable[[], Any]], list[Any]]


@dataclass
class Track:
    """Where a race is run: the writers' stores, and what happens before each round."""

    run: Callable[[Race], list[list[Any]]]
    store: Store


def in_a_process(race: Race, url: str, writer: int) -> list[Any]:
    return race(open_store(url), writer, lambda: _BARRIER.wait(ROUND_TIMEOUT_S))


_BARRIER: Any = None


def _meet_at(barrier: Any) -> None:
    global _BARRIER
    _BARRIER = barrier


def by_processes(folder: Path) -> Track:
    url = f"file://{folder}"

    def run(race: Race) -> list[list[Any]]:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        barrier = context.Barrier(WRITERS)
        with ProcessPoolExecutor(WRITERS, context, _meet_at, (barrier,)) as pool:
            return _results(pool, in_a_process, [(race, url, writer) for writer in range(WRITERS)])

    return Track(run, open_store(url))


def by_threads(stores: list[Store], before: Callable[[], None] = lambda: None) -> Track:
    def run(race: Race) -> list[list[Any]]:
        barrier = threading.Barrier(WRITERS, before)
        with ThreadPoolExecutor(WRITERS) as pool:
            starts = [(stores[n], n, lambda: barrier.wait(ROUND_TIMEOUT_S)) for n in range(WRITERS)]
            return _results(pool, race, starts)

    return Track(run, stores[0])


def _results(pool: Executor, call: Callable[..., list[Any]], arguments: list[tuple[Any, ...]]) -> list[list[Any]]:
    return [future.result() for future in [pool.submit(call, *words) for words in arguments]]


@pytest.fixture(scope="module")
def quiet_s3() -> Iterator[s3_server.S3Server]:
    """A server of its own: moto's listings get slower with everything that the bucket holds."""
    with s3_server.running() as server:
        yield server


@pytest.fixture(params=["file", "memory", "s3", pytest.param("ceph", marks=pytest.mark.ceph)])
def track(request: pytest.FixtureRequest, tmp_path: Path) -> Track:
    seed = int(os.environ.get("RACE_SEED") or random.randrange(1 << 32))
    print(f"seed {seed}: RACE_SEED={seed} make test ARGS='{request.node.nodeid}'")
    if request.param == "file":
        return by_processes(tmp_path)
    if request.param == "memory":
        name = uuid.uuid4().hex
        return by_threads([open_store(f"memory://{name}") for _ in range(WRITERS)])
    server = request.getfixturevalue("quiet_s3" if request.param == "s3" else SERVERS[request.param][0])
    url, chance = server.url(uuid.uuid4().hex), random.Random(seed)
    stores: list[Store] = [(S3Store, ObstoreStore)[n % 2](url, server.options, QUICK) for n in range(WRITERS)]

    def lose_some() -> None:
        server.lose_replies(chance.choice([0, 0, 1, WRITERS, 2 * WRITERS]))

    return by_threads(stores, lose_some if request.param == "s3" else lambda: None)


def test_one_version_has_one_winner_and_its_losers_are_fenced(track: Track):
    won = track.run(race_for_versions)
    catalog = Catalog(track.store, LAYOUT.adapter)
    for number in range(ROUNDS):
        winners = [writer for writer in range(WRITERS) if won[writer][number]]
        assert len(winners) == 1, f"round {number}: {winners}"
        assert catalog.manifest(Version(1, number)).training["writer"] == winners[0]
    assert len(catalog.versions()) == ROUNDS


def test_one_name_has_one_winner_and_its_losers_are_told(track: Track):
    won = track.run(race_for_names)
    for epoch in range(1, ROUNDS + 1):
        winners = [writer for writer in range(WRITERS) if won[writer][epoch - 1]]
        assert len(winners) == 1, f"round {epoch}: {winners}"
        stored = strict_json.load_object(track.store.get(LAYOUT.epoch(epoch)), key="claim", max_bytes=1000)
        assert stored["writer"] == winners[0]


def test_claims_that_race_get_an_epoch_each_and_leave_none_out(track: Track):
    claims = [claim for mine in track.run(race_for_epochs) for claim in mine]
    assert sorted(epoch for epoch, _ in claims) == list(range(1, CLAIM_ROUNDS * WRITERS + 1))
    for epoch, nonce in claims:
        stored = strict_json.load_object(track.store.get(LAYOUT.epoch(epoch)), key="claim", max_bytes=1000)
        assert stored["nonce"] == nonce
