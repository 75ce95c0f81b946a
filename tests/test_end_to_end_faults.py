"""Trainers that die and trainers that come back from the dead, and bad versions on the store, beside a running node.

Whatever happens to a trainer, the node keeps serving the last good version, and the next life goes on from there.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import synthetic
from engine_fixtures import free_port
from rescore import ROUNDING, gap_by_version, largest_gap, score_under
from run_processes import (
    RUN_S,
    START_S,
    Command,
    LongRequest,
    Run,
    changed,
    demand_each_group_decided_once,
    small_run,
    wait_for,
    written,
)
from s3_server import S3Server

from publisher import shard
from publisher.convert import convert
from publisher.epochs import claim_epoch
from publisher.publisher import Publisher
from rollout.demo.settings import FINAL_REWARD_AT_LEAST, DemoOptions, main_config
from rollout.proof import DEFAULT_SEQUENCE
from rollout.vllm_server import VllmServer
from shared.base_model import identify, read_base_config
from shared.config import LoraConfig
from shared.errors import Fenced
from shared.layout import stem
from shared.manifest import Manifest
from shared.versions import Version, served_name

pytestmark = [pytest.mark.engine, pytest.mark.megatron]


def kill_in_mid_publish(run: Run, s3: S3Server, version: Version, node: Command, trainer: Command) -> None:
    """SIGKILL the trainer while the store sits on its commit: shard and record are durable, the manifest is not."""
    layout = run.catalog.layout
    wait_for(s3.held, RUN_S, node, trainer)
    wait_for(lambda: run.serving() == run.catalog.newest(), RUN_S, node, trainer)
    # A checkpoint is written behind the step; the one before this version must be there, or all would begin anew.
    wait_for(lambda: run.checkpointed_step() is not None, RUN_S, node, trainer)
    trainer.kill()
    s3.hold("")
    left = [e.key.rsplit("/", 1)[-1] for e in run.catalog.store.list(f"{layout.adapter}/data/{stem(version)}")]
    assert "adapter_model.safetensors" in left and "rank-00000.json" in left
    assert version not in run.catalog.versions()


def content(manifest: Manifest) -> list[tuple[str, ...]]:
    return [shard.parts for shard in manifest.shards]


def test_a_trainer_killed_in_mid_publish_resumes_in_a_new_epoch(demo_server: VllmServer, s3: S3Server, tmp_path: Path):
    steps, killed_at = 8, Version(1, 4)
    run = changed(
        small_run(tmp_path, steps=steps),
        store={"url": s3.url("runs"), "options": s3.options},
        rollout={"engine_url": demo_server.url},
    )
    catalog, engine = run.catalog, demo_server.engine()
    s3.hold(catalog.layout.manifest(killed_at))
    with run.rollout() as node:
        with run.train() as trainer:
            wait_for(s3.held, START_S, node, trainer)
            last_good = wait_for(lambda: run.serving() == Version(1, 3) and run.serving(), RUN_S, node, trainer)
            assert last_good is not None
            long = LongRequest(demo_server.url, served_name(catalog.layout.adapter, last_good))
            kill_in_mid_publish(run, s3, killed_at, node, trainer)
        in_flight = long.result()
        resumed_from = run.checkpointed_step()
        assert resumed_from == 3
        assert run.serving() == last_good and node.code() is None
        with run.train() as trainer:
            wait_for(lambda: run.reached(Version(2, resumed_from)), START_S, node, trainer)
            wait_for(run.done, RUN_S, node, trainer)
            assert trainer.wait(START_S) == 0
        assert node.stop() == 0

    # What was in flight when the trainer died ended under the version that it began with.
    assert len(in_flight) == LongRequest.sequences
    sequences, logprobs = [whole for whole, _ in in_flight], [given for _, given in in_flight]
    assert (
        largest_gap(logprobs, score_under(last_good, catalog, engine, run.base, tmp_path / "a", sequences)) <= ROUNDING
    )

    first_life = [Version(1, number) for number in range(4)]
    assert catalog.versions() == [*first_life, *(Version(2, number) for number in range(resumed_from, steps + 1))]
    first = catalog.manifest(Version(2, resumed_from))
    assert first.parent is not None and first.parent.version == Version(1, resumed_from)
    assert content(first) == content(catalog.manifest(Version(1, resumed_from)))  # the same LoRA, bit for bit
    taken = resumed_from * run.config.train.prompts_per_step
    assert (first.training["step"], first.training["taken_groups"]) == (resumed_from, taken)  # the data position

    progress = catalog.progress()
    assert progress is not None
    assert (progress["epoch"], progress["lives"], progress["step"]) == (2, 2, steps)
    demand_each_group_decided_once(run, steps)
    receipts = run.receipts()
    assert len(receipts) == len(set(receipts)) and receipts[-1] == Version(2, steps)

    gaps = gap_by_version(run.samples(), catalog, engine, run.base, tmp_path / "b")
    assert max(gaps.values()) <= ROUNDING, gaps
    code, told, _ = run.ask("verify", "--all", "--json", "--base", run.base)
    assert code == 0 and all(result["ok"] for result in json.loads(told))


@pytest.mark.soak
def test_a_run_whose_trainer_is_killed_in_mid_publish_still_reaches_its_reward(s3: S3Server, tmp_path: Path):
    """The demo's own settings and engine; two to three minutes on two cores. Measured: 0.975 after 40 steps."""
    config = main_config(DemoOptions(out=tmp_path, adapter=tmp_path.name, port=free_port()))
    run = changed(written(config, tmp_path), store={"url": s3.url("runs"), "options": s3.options})
    killed_at = Version(1, 6)
    s3.hold(run.catalog.layout.manifest(killed_at))
    with run.rollout() as node:
        with run.train() as trainer:
            kill_in_mid_publish(run, s3, killed_at, node, trainer)
        with run.train() as trainer:
            wait_for(run.done, 1200, node, trainer)
            assert trainer.wait(START_S) == 0
        assert node.stop() == 0
    progress = run.catalog.progress()
    assert progress is not None and (progress["lives"], progress["step"]) == (2, config.train.steps)
    print(f"held-out reward {run.final_reward():.3f} after {progress['step']} steps in two lives")
    assert run.final_reward() >= FINAL_REWARD_AT_LEAST
    assert run.ask("verify", "--all", "--base", run.base)[0] == 0


def test_a_zombie_trainer_is_fenced_and_its_successor_is_served(demo_server: VllmServer, tmp_path: Path):
    run = changed(small_run(tmp_path, steps=6), rollout={"engine_url": demo_server.url})
    catalog = run.catalog
    with run.rollout() as node, run.train() as zombie:
        wait_for(lambda: run.reached(Version(1, 1)), START_S, node, zombie)
        zombie.suspend()
        before = catalog.versions()
        with run.train() as successor:
            wait_for(lambda: run.reached(Version(2, 0)), START_S, node, successor)
            zombie.resume()
            assert zombie.wait(START_S) == Fenced.exit_code
            wait_for(run.done, RUN_S, node, successor)
            assert successor.wait(START_S) == 0
        assert node.stop() == 0
    [line] = [line for line in zombie.told().splitlines() if line.startswith("lorasync:")]
    assert "Fenced" in line and "epoch 2 was claimed after our epoch 1" in line
    assert "Traceback" not in zombie.told()
    # A commit that was under way may have been finished on waking up; nothing more.
    assert len([version for version in catalog.versions() if version.epoch == 1]) <= len(before) + 1
    assert run.serving() == catalog.newest() == Version(2, 6)
    progress = catalog.progress()
    assert progress is not None and progress["epoch"] == 2 and progress["done"]
    order = [line.split("version=")[1].split()[0] for line in node.told().splitlines() if " serving version=" in line]
    assert order == sorted(order), "the node went back"


def publish(run: Run, base: Path, lora: LoraConfig, seed: int) -> Version:
    """Publish one version of seeded noise in a new epoch."""
    config = read_base_config(base)
    claim = claim_epoch(run.catalog.store, run.catalog.layout)
    layout = {"tp": 1, "pp": 1, "ep": 1, "etp": 1, "dp": 1}
    publisher = Publisher(
        run.catalog.store,
        run.catalog.layout,
        claim,
        base_path=str(base),
        base=identify(base),
        lora=lora,
        parallel=layout,
    )
    pieces = [
        dataclasses.replace(factor, lora_A=factor.lora_A * 0.1, lora_B=factor.lora_B * 0.1)
        for factor in synthetic.factors(seed, dict(config), lora.rank)
    ]
    publisher.submit(0, convert(config, pieces), training={"step": 0})
    publisher.close()
    return Version(claim.epoch, 0)


def nan_in_a_tensor(monkeypatch: pytest.MonkeyPatch, run: Run, base: Path, lora: LoraConfig) -> Version:
    """As a publisher that does not look would write it: every digest fits."""

    def poisoned(*arguments: Any, **options: Any) -> Any:
        encoded = encode(*arguments, **options)
        encoded.content[:2] = b"\xc0\x7f"
        return encoded

    encode = shard.encode
    with monkeypatch.context() as patched:
        patched.setattr("publisher.publisher.encode", poisoned)
        return publish(run, base, lora, seed=3)


def truncated(run: Run, base: Path, lora: LoraConfig, node: Command) -> Version:
    """A shard that loses its end after the commit, before the node looks."""
    node.suspend()
    version = publish(run, base, lora, seed=4)
    [piece] = run.catalog.manifest(version).shards
    file = Path(run.config.store.url.removeprefix("file://"), piece.key)
    file.write_bytes(file.read_bytes()[:-1000])
    node.resume()
    return version


def test_bad_versions_are_quarantined_while_the_last_good_one_is_served(
    demo_server: VllmServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = changed(small_run(tmp_path), rollout={"engine_url": demo_server.url, "quarantine_after": 2})
    engine, base, lora = demo_server.engine(), Path(run.base), run.config.lora
    other_base = Path(shutil.copytree(base, tmp_path / "other_base"))
    weights = bytearray((other_base / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other_base / "model.safetensors").write_bytes(weights)
    base_before = engine.score("base", [DEFAULT_SEQUENCE])

    def quarantined(version: Version, says: str) -> None:
        wait_for(lambda: str(version) in run.hint()["quarantined"], RUN_S, node)
        assert run.serving() == good
        assert says in str(run.hint()["last_error"])

    with run.rollout("--no-sample") as node:
        good = publish(run, base, lora, seed=1)
        wait_for(lambda: run.serving() == good, START_S, node)
        foreign = publish(run, other_base, lora, seed=2)
        quarantined(foreign, "another base model")
        poisoned = nan_in_a_tensor(monkeypatch, run, base, lora)
        quarantined(poisoned, "NaN or infinity in tensor")
        short = truncated(run, base, lora, node)
        quarantined(short, "does not match its digest")
        broad = publish(run, base, dataclasses.replace(lora, rank=16), seed=5)
        quarantined(broad, "rank 16 is above the engine's max_lora_rank 8")
        assert engine.score("base", [DEFAULT_SEQUENCE]) == base_before

        for version, code in ((good, 0), (foreign, 4), (poisoned, 4), (short, 4), (broad, 0)):
            assert run.ask("verify", str(version), "--base", run.base)[0] == code, version
        better = publish(run, base, lora, seed=6)
        wait_for(lambda: run.serving() == better, RUN_S, node)
        wait_for(lambda: run.cached == [str(better)], RUN_S, node)
        assert node.stop() == 0
    assert run.receipts() == [good, better]
