"""Who puts the manifest: rank 0 at once, the others if it has not done so within the grace."""

from pathlib import Path

import pytest
from synthetic import ADAPTER, BASE, EXPECTED, LORA, factors, rank_factors, write_base

from publisher.commit import Heading, Rank, commit, put_shard
from publisher.convert import convert
from publisher.epochs import Claim, claim_epoch
from publisher.shard import encode
from shared.base_model import identify
from shared.catalog import Catalog
from shared.errors import Fenced, StoreError
from shared.layout import Layout
from shared.local_store import LocalStore
from shared.manifest import VOID, LoraShape, Manifest
from shared.versions import Version

LAYOUT, VERSION, WORLD = Layout(ADAPTER), Version(1, 0), 3


class Bench:
    """A store on which every rank's shard and record lie."""

    def __init__(self, folder: Path) -> None:
        self.store = LocalStore(str(folder / "store"))
        self.catalog = Catalog(self.store, ADAPTER)
        self.claim: Claim = claim_epoch(self.store, LAYOUT)
        self.heading = Heading(
            adapter=ADAPTER,
            version=VERSION,
            parent=None,
            base=identify(write_base(folder / "base")),
            base_name="base",
            lora=LoraShape(LORA.rank, LORA.alpha, LORA.rank, LORA.targets),
            parallel={"tp": WORLD},
            encoding="bf16",
            training={"step": 0},
            canary=None,
        )
        order = {name: position for position, name in enumerate(EXPECTED)}
        for rank in range(WORLD):
            slices = list(convert(BASE, rank_factors(factors(), rank, WORLD)))
            shard = encode(slices, order, rank=LORA.rank, alpha=LORA.alpha, encoding="bf16", aliases=True)
            put_shard(self.store, LAYOUT, self.claim, self.heading, Rank(rank, WORLD), shard)
        self.waited: list[float] = []

    def commit(self, rank: int, grace_s: float = 2.0) -> Manifest | None:
        return commit(
            self.store,
            LAYOUT,
            self.claim,
            self.heading,
            WORLD,
            EXPECTED,
            rank=rank,
            grace_s=grace_s,
            wait=self.waited.append,
        )


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_rank_0_commits_at_once(bench: Bench):
    assert bench.commit(0) is not None
    assert bench.waited == [] and bench.catalog.versions() == [VERSION]


def test_another_rank_waits_out_the_grace_and_commits_the_same_if_rank_0_is_dead(bench: Bench):
    committed = bench.commit(1)
    assert sum(bench.waited) == pytest.approx(2.0)
    assert committed == bench.catalog.manifest(VERSION)
    assert bench.commit(0) == committed, "rank 0 was only slow: it finds its own bytes"


def test_another_rank_puts_nothing_that_rank_0_has_put(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    puts: list[str] = []
    put = bench.store.put_if_absent

    def noted(key: str, content: bytes) -> bool:
        puts.append(key)
        return put(key, content)

    monkeypatch.setattr(bench.store, "put_if_absent", noted)
    first = bench.commit(0)
    second = bench.commit(2)
    assert first == second
    assert puts == [LAYOUT.manifest(VERSION)]
    assert sum(bench.waited) == pytest.approx(0.25), "one look was enough"
    hint = bench.catalog.hint()
    assert hint is not None and hint[0] == VERSION


@pytest.mark.parametrize("rank", range(WORLD))
def test_every_rank_is_told_of_a_void(bench: Bench, rank: int):
    bench.store.put(LAYOUT.manifest(VERSION), VOID)
    with pytest.raises(StoreError, match="the attempt was collected before it was committed"):
        bench.commit(rank)
    assert bench.catalog.newest() is None and bench.catalog.hint() == (None, "")


@pytest.mark.parametrize("rank", [0, 1])
def test_who_is_succeeded_just_before_its_manifest_is_told_so_and_leaves_the_hint_alone(
    bench: Bench, rank: int, monkeypatch: pytest.MonkeyPatch
):
    put = bench.store.put_if_absent

    def succeeded(key: str, content: bytes) -> bool:
        monkeypatch.setattr(bench.store, "put_if_absent", put)
        claim_epoch(bench.store, LAYOUT)
        return put(key, content)

    monkeypatch.setattr(bench.store, "put_if_absent", succeeded)
    with pytest.raises(Fenced, match="epoch 2 was claimed after our epoch 1"):
        bench.commit(rank)
    assert bench.catalog.versions() == [VERSION], "it stands: no reader takes it after the successor's"
    assert bench.catalog.hint() == (None, "")
