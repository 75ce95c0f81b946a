"""Going back to an earlier version: readers follow, the trainer is fenced, the next one goes on from that past."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_versions import ADAPTER, LAYOUT, alive, data_of, put_version, put_versions

from publisher.collect import choose, collect
from publisher.epochs import Claim, claim_epoch, demand_unfenced
from publisher.lineage import Lineage
from publisher.resume import places
from publisher.retention import Rule
from publisher.rollback import last_rollback, roll_back
from shared import strict_json
from shared.base_model import BaseIdentity
from shared.catalog import Catalog
from shared.config import Config, LoraConfig, ModelConfig, StoreConfig, TaskConfig, TrainConfig
from shared.errors import Fenced, StoreError, UsageError
from shared.fates import Fates
from shared.leases import Lease
from shared.local_store import LocalStore
from shared.manifest import VOID
from shared.store import Store
from shared.versions import Version
from trainer.checkpoint import Checkpoint, write
from trainer.intake import Position
from trainer.life import Beginning, Life, Totals

BASE = BaseIdentity("qwen3_moe", "c" * 64, "d" * 64)
RULE = Rule(keep_versions=1)


def v(number: int, epoch: int = 1) -> Version:
    return Version(epoch, number)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path))


@pytest.fixture
def catalog(store: Store) -> Catalog:
    return Catalog(store, ADAPTER)


def go_back(catalog: Catalog, version: Version) -> Version:
    return roll_back(catalog, version, by="test", clock=lambda: 1_800_000_000.0).version


def run_collector(catalog: Catalog, rule: Rule = RULE) -> None:
    collect(catalog, Fates(catalog.store, LAYOUT), rule, sleep=lambda _s: None)


def beginning(publish_every: int = 1, frozen: bool = False) -> Beginning:
    config = Config(
        store=StoreConfig(url="file:///nowhere"),
        model=ModelConfig(path="/nowhere"),
        task=TaskConfig("t", "h", "r:r", 8),
        lora=LoraConfig(rank=4, alpha=8),
        train=TrainConfig(publish_every=publish_every),
    )
    return Beginning(config, BASE, frozen=frozen)


def put_checkpoint(store: Store, epoch: int, step: int, lineage: Lineage, begin: Beginning | None = None) -> None:
    life = Life(Claim(epoch, "n"), lineage, 0.0, step=step, position=Position(), totals=Totals())
    state = (begin or beginning()).state(life)
    write(store, LAYOUT, Checkpoint(epoch, step, state, {"lora.a": torch.full((2,), float(step))}), keep=100)


def train_to(store: Store, last: int, checkpoints: list[int], **training: Any) -> None:
    """Epoch 1: a version every step, a checkpoint at some."""
    claim_epoch(store, LAYOUT)
    for number in range(last + 1):
        put_version(store, v(number), lineage=Lineage(1).to_json(), **training)
    for step in checkpoints:
        put_checkpoint(store, 1, step, Lineage(1))


def test_the_old_bytes_are_the_latest_version_again(store: LocalStore, catalog: Catalog):
    put_versions(store, range(5))
    old, new = catalog.manifest(v(2)), catalog.manifest(go_back(catalog, v(2)))
    assert new.version == v(2, epoch=2) == catalog.newest()
    assert new.shards == old.shards
    assert new.parent is not None and (new.parent.version, new.parent.digest) == (old.version, old.digest)
    rolled_back = {"rolled_back_to": "0001-000002", "submitted_at": 1_800_000_000.0}
    assert new.training == {**old.training, **rolled_back}
    found = catalog.hint()
    assert found is not None and found[0] == new.version
    assert alive(store) == [0, 1, 2, 3, 4, 2], "history is not rewritten"


def test_the_trainer_that_runs_is_fenced(store: LocalStore, catalog: Catalog):
    claim = claim_epoch(store, LAYOUT)
    put_versions(store, range(3))
    go_back(catalog, v(1))
    with pytest.raises(Fenced, match="epoch 2 was claimed after our epoch 1"):
        demand_unfenced(store, LAYOUT, claim.epoch, op="commit")


@pytest.mark.parametrize(
    ("version", "problem"),
    [(v(4), "0001-000004 is the latest already"), (v(9), "no version 0001-000009"), (v(0), "was collected")],
)
def test_what_cannot_be_gone_back_to_fences_nobody(store: LocalStore, catalog: Catalog, version: Version, problem: str):
    put_versions(store, range(5))
    store.put(LAYOUT.manifest(v(0)), VOID)
    with pytest.raises(UsageError, match=problem):
        go_back(catalog, version)
    assert len(store.list(LAYOUT.epochs)) == 1 and store.list(LAYOUT.rollbacks) == []


def test_data_stays_as_long_as_a_rollback_uses_it_and_goes_with_the_last_one(store: LocalStore, catalog: Catalog):
    put_versions(store, range(5))
    go_back(catalog, v(2))
    put_versions(store, range(2, 5), epoch=3)
    store.put(LAYOUT.manifest(v(2)), VOID)  # by a collector that had begun before
    run_collector(catalog, Rule(keep_versions=4))
    assert data_of(store, v(2)) and v(2, epoch=2) in catalog.versions()
    run_collector(catalog, RULE)
    assert catalog.versions() == [v(3, epoch=3), v(4, epoch=3)] and not data_of(store, v(2))


def test_a_reader_of_a_rollback_that_is_collected_keeps_the_origins_data(store: LocalStore, catalog: Catalog):
    put_versions(store, range(5))
    new = go_back(catalog, v(2))
    put_versions(store, range(2, 6), epoch=3)
    lease = Lease(store, LAYOUT, "node")
    lease.take({new})
    manifest = catalog.manifest(new)
    for version in (v(2), new):
        Fates(store, LAYOUT).collect(version, "by a collector that chose before the lease")
        store.put(LAYOUT.manifest(version), VOID)
    run_collector(catalog)
    assert store.get(manifest.shards[0].key)
    lease.release()
    run_collector(catalog)
    assert data_of(store, v(2)) == []


def test_going_back_to_a_rollback_uses_the_data_of_its_origin(store: LocalStore, catalog: Catalog):
    put_versions(store, range(3))
    first = go_back(catalog, v(1))
    put_versions(store, range(1, 4), epoch=3)
    second = go_back(catalog, first)
    manifest = catalog.manifest(second)
    assert (second, manifest.training["rolled_back_to"]) == (v(1, epoch=4), "0001-000001")
    assert manifest.parent is not None and manifest.parent.version == first
    run_collector(catalog, Rule(keep_versions=1))
    assert store.get(manifest.shards[0].key)


def test_a_version_that_is_collected_while_it_is_gone_back_to_is_not_brought_back(store: LocalStore, catalog: Catalog):
    put_versions(store, range(3))
    put = store.put_if_absent

    def void_it_first(key: str, content: bytes) -> bool:
        if "/rollbacks/" in key:
            store.put(LAYOUT.manifest(v(1)), VOID)
        return put(key, content)

    store.put_if_absent = void_it_first  # type: ignore[method-assign]
    with pytest.raises(StoreError, match="collected just now; the trainer is fenced all the same"):
        go_back(catalog, v(1))
    assert catalog.newest() == v(2) and last_rollback(catalog) is None


def test_a_trainer_that_starts_in_the_middle_of_a_rollback_wins_and_it_is_said(store: LocalStore, catalog: Catalog):
    put_versions(store, range(3))
    put = store.put_if_absent

    def start_first(key: str, content: bytes) -> bool:
        if "/manifests/" in key:
            store.put_if_absent = put  # type: ignore[method-assign]
            claim_epoch(store, LAYOUT)
        return put(key, content)

    store.put_if_absent = start_first  # type: ignore[method-assign]
    with pytest.raises(Fenced, match="epoch 3 was claimed"):
        go_back(catalog, v(1))
    assert catalog.hint() == (None, ""), "LATEST is the trainer's"


def test_a_rollback_that_died_half_way_holds_nobody_up_and_is_voided_in_the_end(store: LocalStore, catalog: Catalog):
    train_to(store, 4, [1, 4])
    marker = strict_json.dumps({"rolled_back_to": "0001-000001", "training": {"step": 1}})
    store.put_if_absent(LAYOUT.rollback(v(1), v(1, epoch=2)), marker)
    assert last_rollback(catalog) is None
    run_collector(catalog, Rule(keep_versions=1, orphan_after_s=3600))
    assert data_of(store, v(1)), "it may still be committed"
    plan = choose(catalog, Fates(store, LAYOUT), Rule(orphan_after_s=-1))
    assert plan.decision.orphans == (v(1, epoch=2),)
    run_collector(catalog, Rule(keep_versions=1, orphan_after_s=-1))
    run_collector(catalog, Rule(keep_versions=1))
    assert data_of(store, v(1)) == [] and last_rollback(catalog) is None


def test_the_next_trainer_goes_on_from_the_newest_checkpoint_of_the_past_and_from_none_that_led_astray(
    store: LocalStore, catalog: Catalog
):
    train_to(store, 20, [5, 10, 15, 20])
    rollback = go_back(catalog, v(12))
    life, checkpoint = beginning().begin(store, LAYOUT, lambda: 0.0)
    assert checkpoint is not None and (checkpoint.epoch, checkpoint.step) == (1, 10)
    assert (life.claim.epoch, life.step) == (3, 10)
    assert life.lineage.includes(v(10)) and not life.lineage.includes(v(11))
    assert not life.lineage.includes(rollback), "it is two steps ahead of this life"
    assert life.parent is not None and life.parent.version == v(10)


def test_a_trainer_that_goes_on_exactly_there_descends_from_the_rollback_and_takes_its_trajectories(
    store: LocalStore, catalog: Catalog
):
    train_to(store, 20, [5, 10, 15, 20])
    rollback = go_back(catalog, v(10))
    life, _ = beginning().begin(store, LAYOUT, lambda: 0.0)
    assert life.step == 10 and life.lineage.includes(rollback) and life.lineage.includes(v(10))
    assert life.parent is not None and life.parent.version == rollback


def test_a_trainer_killed_before_its_first_checkpoint_after_a_rollback_does_not_go_astray_again(
    store: LocalStore, catalog: Catalog
):
    train_to(store, 20, [5, 10, 15, 20])
    go_back(catalog, v(10))
    beginning().begin(store, LAYOUT, lambda: 0.0)
    put_versions(store, [10, 11], epoch=3)
    life, checkpoint = beginning().begin(store, LAYOUT, lambda: 0.0)
    assert checkpoint is not None and (checkpoint.epoch, checkpoint.step, life.claim.epoch) == (1, 10, 4)


def test_so_it_is_when_the_rollback_itself_was_collected_meanwhile(store: LocalStore, catalog: Catalog):
    train_to(store, 20, [5, 10, 15, 20])
    go_back(catalog, v(10))
    claim_epoch(store, LAYOUT)
    put_versions(store, range(10, 16), epoch=3)
    run_collector(catalog)
    run_collector(catalog)  # what was gone back to goes after the rollback that used it
    assert catalog.versions() == [v(14, epoch=3), v(15, epoch=3)]
    _, checkpoint = beginning().begin(store, LAYOUT, lambda: 0.0)
    assert checkpoint is not None and (checkpoint.epoch, checkpoint.step) == (1, 10)


def test_checkpoints_made_after_a_rollback_count_and_so_do_those_before_it_if_they_are_damaged(
    store: LocalStore, catalog: Catalog
):
    train_to(store, 20, [5, 10, 15, 20])
    go_back(catalog, v(10))
    life, _ = beginning().begin(store, LAYOUT, lambda: 0.0)
    put_checkpoint(store, life.claim.epoch, 12, life.lineage)
    _, checkpoint = beginning().begin(store, LAYOUT, lambda: 0.0)
    assert checkpoint is not None and (checkpoint.epoch, checkpoint.step) == (3, 12)
    store.put(f"{LAYOUT.checkpoint(3, 12)}/state.json", b"{}")
    _, checkpoint = beginning().begin(store, LAYOUT, lambda: 0.0)
    assert checkpoint is not None and (checkpoint.epoch, checkpoint.step) == (1, 10)


def test_what_a_life_after_a_rollback_writes_deletes_nothing_of_its_past_for_what_led_astray(
    store: LocalStore, catalog: Catalog
):
    train_to(store, 30, [20, 30])
    go_back(catalog, v(20))
    life, _ = beginning().begin(store, LAYOUT, lambda: 0.0)
    later = Checkpoint(life.claim.epoch, 25, beginning().state(life), {"lora.a": torch.zeros(2)})
    write(store, LAYOUT, later, keep=2, fits=life.fits)
    assert places(store, LAYOUT) == [(1, 20), (3, 25)]


def test_a_life_that_resumed_elsewhere_is_gone_back_along_its_own_lineage(store: LocalStore, catalog: Catalog):
    """Epoch 1 reached 20; epoch 2 resumed at 10, published 10 .. 14, had no checkpoint yet, and is gone back to 13."""
    train_to(store, 20, [5, 10, 12, 20])
    claim_epoch(store, LAYOUT)
    lineage = Lineage(1).resumed(2, number=10)
    for number in range(10, 15):
        put_version(store, v(number, epoch=2), lineage=lineage.to_json())
    go_back(catalog, v(13, epoch=2))
    _, checkpoint = beginning().begin(store, LAYOUT, lambda: 0.0)
    assert checkpoint is not None and (checkpoint.epoch, checkpoint.step) == (1, 10), "12 and 20 were thrown away"


def test_steps_and_numbers_differ_where_not_every_step_is_published(store: LocalStore, catalog: Catalog):
    claim_epoch(store, LAYOUT)
    begin = beginning(publish_every=4)
    for number in range(6):
        put_version(store, v(number), step=4 * number, lineage=Lineage(1).to_json())
    for step in (7, 9, 16, 20):
        put_checkpoint(store, 1, step, Lineage(1), begin)
    go_back(catalog, v(3))
    life, checkpoint = begin.begin(store, LAYOUT, lambda: 0.0)
    assert checkpoint is not None and checkpoint.step == 9
    assert life.parent is not None and life.parent.version == v(2)


def test_without_a_checkpoint_of_that_past_the_trainer_says_the_way_out_and_claims_nothing(
    store: LocalStore, catalog: Catalog
):
    train_to(store, 20, [15, 20])
    go_back(catalog, v(12))
    with pytest.raises(UsageError, match="went back to step 12") as caught:
        beginning().begin(store, LAYOUT, lambda: 0.0)
    assert "step 15 of epoch 1, step 20 of epoch 1" in caught.value.hint and "keep_checkpoints" in caught.value.hint
    assert len(store.list(LAYOUT.epochs)) == 2
    for entry in store.list(LAYOUT.checkpoints):
        store.delete(entry.key)
    life, checkpoint = beginning().begin(store, LAYOUT, lambda: 0.0)
    assert checkpoint is None and life.step == 0, "anew, from the base model"


def test_of_several_rollbacks_the_newest_counts(store: LocalStore, catalog: Catalog):
    train_to(store, 20, [5, 10, 15, 20])
    go_back(catalog, v(15))
    go_back(catalog, v(7))
    _, checkpoint = beginning().begin(store, LAYOUT, lambda: 0.0)
    assert checkpoint is not None and checkpoint.step == 5
