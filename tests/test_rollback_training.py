"""A rollback under the real trainer: the next life goes on from the same bits, takes what was sampled, and collects."""

from dataclasses import replace
from pathlib import Path

import pytest
from trajectory_fleet import Fleet

from publisher.rollback import roll_back
from shared.catalog import Catalog
from shared.config import Config, LoraConfig, ModelConfig, RetentionConfig, StoreConfig, TaskConfig, TrainConfig
from shared.local_store import LocalStore
from shared.versions import Version
from trainer.loop import train

pytestmark = pytest.mark.megatron

PER_STEP = 3


def test_training_goes_on_from_the_weights_that_were_gone_back_to(tiny_hf: Path, tmp_path: Path):
    store = LocalStore(str(tmp_path / "store"))
    config = Config(
        store=StoreConfig(url=store.url, poll_interval_s=0.02),
        model=ModelConfig(path=str(tiny_hf)),
        task=TaskConfig(train_prompts="", heldout_prompts="", reward="", max_new_tokens=6),
        lora=LoraConfig(rank=4, alpha=8),
        train=TrainConfig(
            steps=4, prompts_per_step=PER_STEP, group_size=4, max_staleness=0, checkpoint_every=2, take_timeout_s=60.0
        ),
        retention=RetentionConfig(keep_checkpoints=3),
    )
    catalog = Catalog(store, "policy")
    with Fleet(store, "policy", PER_STEP):
        train(config)
        rollback = roll_back(catalog, Version(1, 2))
    assert rollback.version == Version(2, 2) == catalog.newest()
    gone_back_to = [shard.parts for shard in rollback.shards]
    with Fleet(store, "policy", PER_STEP):
        retention = replace(config.retention, keep_versions=5, interval_s=0.02, grace_s=0.0)
        outcome = train(replace(config, train=replace(config.train, steps=6), retention=retention))
    assert (outcome["epoch"], outcome["step"], outcome["lives"]) == (3, 6, 2)
    assert outcome["failed_collections"] == 0 and outcome["collected_versions"] > 0
    assert Version(3, 6) == catalog.newest() and Version(1, 0) not in catalog.versions()
    assert [shard.parts for shard in catalog.manifest(Version(3, 2)).shards] == gone_back_to
    first = catalog.manifest(Version(3, 3)).parent
    assert first is not None and first.version == Version(3, 2)
    lineage = catalog.manifest(Version(3, 6)).training["lineage"]
    assert lineage == {"epoch": 3, "before": [[1, 2], [2, 2]]}
