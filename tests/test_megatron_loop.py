"""The trainer's life on a real store with real Megatron: versions, canaries, checkpoints, resuming to the same bits.

The rollout fleet is a stand-in that feeds trajectories (tests/trajectory_fleet.py); everything else is the real thing.
"""

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from run_processes import wait_for
from tiny_model import hf_logp, load_hf, merge_into_hf
from trajectory_fleet import Fleet, make_group, put_groups

from publisher.epochs import claim_epoch
from publisher.resume import places
from shared.adapter_files import read_tensors
from shared.catalog import Catalog
from shared.config import Config, LoraConfig, ModelConfig, StoreConfig, TaskConfig, TrainConfig, to_toml
from shared.console import main
from shared.errors import Fenced, LorasyncError, StoreError, UsageError, WrongBase
from shared.layout import Layout, version_of
from shared.local_store import LocalStore
from shared.store import Entry
from shared.versions import Version
from trainer.checkpoint import CheckpointWriter, newest
from trainer.loop import Trainer, train

pytestmark = pytest.mark.megatron

ADAPTER = "policy"
LAYOUT = Layout(ADAPTER)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(f"file://{tmp_path / 'store'}")


@pytest.fixture
def config(tiny_hf: Path, store: LocalStore) -> Config:
    return Config(
        store=StoreConfig(url=store.url, adapter=ADAPTER, poll_interval_s=0.02),
        model=ModelConfig(path=str(tiny_hf)),
        task=TaskConfig(train_prompts="", heldout_prompts="", reward="", max_new_tokens=6),
        lora=LoraConfig(rank=4, alpha=8),
        train=TrainConfig(
            steps=4, prompts_per_step=3, group_size=4, max_staleness=0, lr=1e-3, checkpoint_every=2, take_timeout_s=30.0
        ),
    )


def fed(config: Config, store: LocalStore, **options: Any) -> Fleet:
    per_version = config.train.prompts_per_step * config.train.publish_every
    return Fleet(store, config.store.adapter, options.pop("groups", per_version), **options)


def with_train(config: Config, **changes: Any) -> Config:
    return replace(config, train=replace(config.train, **changes))


def adapter_of(store: LocalStore, version: Version) -> dict[str, torch.Tensor]:
    manifest = Catalog(store, ADAPTER).manifest(version)
    found = {}
    for shard in manifest.shards:
        for spec, content in read_tensors(store.get(shard.key), key=shard.key):
            values = torch.frombuffer(bytearray(content), dtype=torch.bfloat16)
            found[spec.name] = values.reshape(spec.shape).float()
    return found


def test_a_life_publishes_a_version_per_step_and_leaves_the_base_as_it_was(config: Config, store: LocalStore):
    with fed(config, store):
        outcome = train(config)
    catalog = Catalog(store, ADAPTER)
    assert catalog.versions() == [Version(1, n) for n in range(5)]
    assert outcome["base_model_unchanged"] and outcome["done"]
    assert (outcome["step"], outcome["taken_groups"], outcome["dropped_groups"]) == (4, 12, 0)
    assert (outcome["staleness_mean"], outcome["staleness_max"]) == (0.0, 0)
    assert catalog.progress() == outcome
    assert (outcome["store_failures"], outcome["missed_hints"], outcome["missed_checkpoints"]) == (0, 0, 0)
    costs = {"canary_s", "publish_copy_s", "publish_wait_s", "publish_write_s"}
    assert costs <= outcome.keys() and costs <= catalog.manifest(Version(1, 4)).training.keys()
    assert "clipped_fraction" not in catalog.manifest(Version(1, 4)).training  # always 0
    for number, manifest in enumerate(map(catalog.manifest, catalog.versions())):
        assert (manifest.training["step"], manifest.training["taken_groups"]) == (number, 3 * number)
        parent = manifest.parent
        assert parent is None if number == 0 else parent is not None and parent.version == Version(1, number - 1)


def test_the_canary_in_a_manifest_is_what_transformers_says_of_the_published_bytes(
    config: Config, store: LocalStore, tiny_hf: Path
):
    with fed(config, store):
        train(with_train(config, lr=1e-2))
    manifest = Catalog(store, ADAPTER).manifest(Version(1, 4))
    assert manifest.canary is not None and manifest.lora.wire_alpha == manifest.lora.rank
    tokens_BT = torch.tensor(manifest.canary.sequences)
    stated_BS = torch.tensor(manifest.canary.logprobs)
    base_BS = hf_logp(load_hf(tiny_hf), tokens_BT)
    served_BS = hf_logp(merge_into_hf(load_hf(tiny_hf), adapter_of(store, Version(1, 4)), scale=1.0), tokens_BT)
    assert float((stated_BS - base_BS).abs().max()) > 0.1
    assert float((stated_BS - served_BS).abs().max()) < 1e-4 < manifest.canary.tolerance


def test_version_zero_changes_nothing_and_the_last_has_learned(config: Config, store: LocalStore):
    with fed(config, store):
        train(config)
    assert not any(t.any() for name, t in adapter_of(store, Version(1, 0)).items() if ".lora_B." in name)
    assert all(t.any() for name, t in adapter_of(store, Version(1, 4)).items() if ".lora_B." in name and "attn" in name)


def test_a_version_every_n_steps(config: Config, store: LocalStore):
    config = with_train(config, publish_every=2)
    with fed(config, store):
        train(config)
    catalog = Catalog(store, ADAPTER)
    assert [catalog.manifest(v).training["step"] for v in catalog.versions()] == [0, 2, 4]


def test_a_resumed_training_ends_with_the_same_bits_as_one_that_was_never_stopped(config: Config, store: LocalStore):
    whole = replace(config, store=replace(config.store, adapter="whole"))
    with fed(whole, store):
        train(with_train(whole, steps=6))
    with fed(config, store):
        train(with_train(config, steps=4))
        outcome = train(with_train(config, steps=6))
    assert (outcome["epoch"], outcome["lives"], outcome["step"], outcome["taken_groups"]) == (2, 2, 6, 18)
    catalog = Catalog(store, ADAPTER)
    resumed = catalog.manifest(Version(2, 4))
    assert resumed.parent is not None and resumed.parent.version == Version(1, 4)
    assert catalog.versions()[-1] == Version(2, 6)
    ours, reference = newest(store, LAYOUT), newest(store, Layout("whole"))
    assert ours is not None and reference is not None
    assert ours.tensors.keys() == reference.tensors.keys()
    assert all(torch.equal(ours.tensors[name], reference.tensors[name]) for name in reference.tensors)


def test_what_was_learned_after_the_last_checkpoint_is_learned_again_from_the_same_trajectories(
    config: Config, store: LocalStore
):
    # Checkpoints at 2 and 4. Nothing is sampled from number 5, so the life ends after step 5 and loses it.
    config = with_train(config, steps=6)
    with fed(config, store, last_number=4), pytest.raises(LorasyncError, match="stalled"):
        train(with_train(config, take_timeout_s=1.0))
    with fed(config, store):
        outcome = train(config)
    assert (outcome["epoch"], outcome["step"], outcome["taken_groups"]) == (2, 6, 18)
    # Number 5 of epoch 1 was thrown away, and what the second fleet made of it with it.
    assert outcome["dropped"]["not_an_ancestor"] == 3
    assert Catalog(store, ADAPTER).manifest(Version(2, 4)).training["step"] == 4


def test_a_frozen_run_trains_and_publishes_nothing_after_version_zero(config: Config, store: LocalStore):
    with fed(config, store, groups=12):
        outcome = train(config, frozen=True)
    assert Catalog(store, ADAPTER).versions() == [Version(1, 0)]
    assert (outcome["step"], outcome["number"], outcome["frozen"]) == (4, 0, True)
    assert newest(store, LAYOUT) is None


def test_a_frozen_run_never_resumes(config: Config, store: LocalStore):
    with fed(config, store):
        train(with_train(config, steps=2))
    with pytest.raises(UsageError, match="frozen run starts from the base model"):
        train(config, frozen=True)
    assert len(store.list(LAYOUT.epochs)) == 1, "a mistake fences nobody"


def test_samplers_are_told_of_drops_while_the_trainer_waits_so_that_nobody_waits_for_ever(
    config: Config, store: LocalStore
):
    class Told(LorasyncError):
        pass

    trainer = Trainer(config, store)
    heartbeat, deadline = trainer._heartbeat, time.monotonic() + 30
    put_groups(store, ADAPTER, Version(9, 9), "a", [make_group(Version(9, 9), "foreign", random.Random(0))])

    def look() -> None:
        heartbeat()
        progress = Catalog(store, ADAPTER).progress()
        if progress and progress["dropped_groups"] == 1:
            raise Told("told")
        assert time.monotonic() < deadline

    trainer._heartbeat = look  # type: ignore[method-assign]
    with pytest.raises(Told):
        trainer.run()


def test_a_trainer_that_was_succeeded_stops_while_it_waits(config: Config, store: LocalStore, monkeypatch):
    monkeypatch.setattr("trainer.loop.FENCE_CHECK_S", 0.0)
    trainer = Trainer(config, store)
    claim_epoch(store, LAYOUT)
    with pytest.raises(Fenced, match="epoch 2 was claimed"):
        trainer.run()


class LosesListings(LocalStore):
    """Fails every third listing of the claims once `armed`: a commit asks twice."""

    armed, asked, failures = False, 0, 0

    def list(self, prefix: str, after: str = "") -> list[Entry]:
        if self.armed and prefix == LAYOUT.epochs:
            self.asked += 1
            if self.asked % 3 == 1:
                self.failures += 1
                raise StoreError("connection reset", op="list", key=prefix, retryable=True)
        return super().list(prefix, after)


def test_a_fence_check_that_the_store_does_not_answer_ends_nothing(config: Config, store: LocalStore, monkeypatch):
    monkeypatch.setattr("trainer.loop.FENCE_CHECK_S", 0.0)
    flaky = LosesListings(store.url)
    trainer = Trainer(with_train(config, steps=2), flaky)
    flaky.armed = True
    with fed(config, store):
        outcome = trainer.run()
    assert outcome["step"] == 2 and flaky.failures > 0
    # Checkpoints count a lost one as missed; publisher and fence check try again.
    assert outcome["store_failures"] + outcome["missed_checkpoints"] == flaky.failures


class SlowStore(LocalStore):
    """Takes version 0; the shards of later ones when it is let."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.let = threading.Event()

    def put_stream(self, key: str, chunks: Iterable[bytes | memoryview], size: int) -> None:
        if "/data/" in key and version_of(key) != Version(1, 0):
            assert self.let.wait(60)
        super().put_stream(key, chunks, size)


def test_the_last_version_is_published_though_the_configuration_says_skip(
    config: Config, store: LocalStore, caplog: pytest.LogCaptureFixture
):
    """All four steps learn from version 0: version 1 is in the store's hands, 2 is queued, 3 and 4 find no place."""
    slow = SlowStore(store.url)
    trainer = Trainer(with_train(config, max_staleness=4, on_full_queue="skip"), slow)

    def let_at_the_end() -> None:
        deadline = time.monotonic() + 60
        while "the step waits number=4" not in caplog.text and time.monotonic() < deadline:
            slow.let.wait(0.02)
        slow.let.set()

    letting = threading.Thread(target=let_at_the_end)
    letting.start()
    with caplog.at_level("WARNING"), fed(config, store, groups=12, last_number=0):
        outcome = trainer.run()
    letting.join()
    assert (outcome["number"], outcome["skipped_versions"]) == (4, 2)
    assert Catalog(store, ADAPTER).newest() == Version(1, 4)


class SlowCheckpoints(LocalStore):
    """Takes the first checkpoint a while after the last step, and no sooner."""

    def __init__(self, url: str, text: Callable[[], str]) -> None:
        super().__init__(url)
        self._text = text

    def put_stream(self, key: str, chunks: Iterable[bytes | memoryview], size: int) -> None:
        if f"{LAYOUT.checkpoint(1, 1)}/" in key:
            wait_for(lambda: "step=2 " in self._text(), 60)
            threading.Event().wait(0.5)  # in which a step that does not wait has missed its checkpoint
        super().put_stream(key, chunks, size)


def test_the_last_checkpoint_is_written_though_the_one_before_is_slow(
    config: Config, store: LocalStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("trainer.loop.CheckpointWriter", partial(CheckpointWriter, max_wait_s=0.0))
    slow = SlowCheckpoints(store.url, lambda: caplog.text)
    with caplog.at_level("INFO"), fed(config, store):
        outcome = train(with_train(config, steps=2, checkpoint_every=1), store=slow)
    assert outcome["missed_checkpoints"] == 0
    assert places(store, LAYOUT) == [(1, 1), (1, 2)]


def test_a_silent_fleet_ends_the_training_with_a_reason(config: Config):
    with pytest.raises(LorasyncError, match="rollout fleet is stalled"):
        train(with_train(config, take_timeout_s=0.2))


def test_a_checkpoint_of_another_lora_or_another_base_is_refused(config: Config, store: LocalStore, tmp_path: Path):
    from tiny_model import build_tiny_model

    with fed(config, store):
        train(with_train(config, steps=2))
    with pytest.raises(UsageError, match=r"trained with lora .*'rank': 4.*'rank': 8"):
        train(replace(config, lora=LoraConfig(rank=8, alpha=8)))
    other = build_tiny_model(tmp_path / "other", seed=9)
    with pytest.raises(WrongBase, match="weights_sha256"):
        train(replace(config, model=ModelConfig(path=str(other))))
    with pytest.raises(UsageError, match="publish_every 1, the configuration says 2") as caught:
        train(with_train(config, publish_every=2))
    assert "train.publish_every" in caught.value.hint
    assert len(store.list(LAYOUT.epochs)) == 1, "a mistake fences nobody"


def test_the_command_prints_its_outcome_as_json(config: Config, store: LocalStore, tmp_path: Path):
    (tmp_path / "run.toml").write_text(to_toml(config))
    out = io.StringIO()
    with fed(config, store), contextlib.redirect_stdout(out):
        assert main(["train", "--config", str(tmp_path / "run.toml"), "--steps", "1", "--json"]) == 0
    outcome = json.loads(out.getvalue().splitlines()[-1])
    assert (outcome["step"], outcome["done"]) == (1, True)


def test_a_trainer_killed_at_any_moment_resumes_in_a_new_epoch_and_finishes(
    config: Config, store: LocalStore, tmp_path: Path
):
    """Real processes, SIGKILL, at whatever is under way when version 3 and a checkpoint are seen."""
    config = with_train(config, steps=8)
    (tmp_path / "run.toml").write_text(to_toml(config))
    command = [sys.executable, "-m", "shared.console", "train", "--config", str(tmp_path / "run.toml"), "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    catalog = Catalog(store, ADAPTER)
    with fed(config, store):
        first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 120
            while Version(1, 3) not in catalog.versions() or newest(store, LAYOUT) is None:
                assert first.poll() is None and time.monotonic() < deadline
        finally:
            first.send_signal(signal.SIGKILL)
            first.wait()
        second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert second.returncode == 0, second.stderr
    outcome = json.loads(second.stdout.splitlines()[-1])
    assert (outcome["epoch"], outcome["lives"], outcome["step"]) == (2, 2, 8)
    assert (outcome["taken_groups"], outcome["base_model_unchanged"]) == (24, True)
    first_of_second = min(v for v in catalog.versions() if v.epoch == 2)
    parent = catalog.manifest(first_of_second).parent
    assert parent is not None and parent.version == Version(1, first_of_second.number)
