"""Stock PEFT loads what `lorasync export` writes, and what lies on the store, and scores tokens as we do.

The way of an adapter here is the real one: trainer's policy -> publisher -> store -> `lorasync export` -> PEFT, which
imports nothing of ours (tests/peft_oracle.py). PEFT runs twice: with the last transformers that keeps experts apart, as
the names do, and with ours, which fuses them in memory and for which PEFT converts. What our environment has not, or
has in another version, is installed in directories beside its packages. The reference is our transformers with the
adapter merged into the weights.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import ATTENTION, MOE, VOCAB, hf_logp, load_hf, merge_into_hf, random_adapter
from torch import Tensor

from publisher.epochs import claim_epoch
from publisher.publisher import Publisher
from shared.base_model import identify, read_base_config
from shared.catalog import Catalog
from shared.config import Config, LoraConfig, ModelConfig, StoreConfig, TaskConfig
from shared.console import main
from shared.fetch import CONFIG, WEIGHTS
from shared.layout import Layout
from shared.stores import open_store
from trainer.policy import Policy

pytestmark = pytest.mark.megatron

TOLERANCE = 1e-4  # nats
INSTALL_TIMEOUT_S, ORACLE_TIMEOUT_S = 300, 300
PINS = {  # by directory: what our environment has not, or has in another version
    "peft": ("peft==0.21.2", "accelerate==1.15.0"),
    "transformers4": ("transformers==4.57.6", "huggingface-hub==0.36.2", "tokenizers==0.22.2"),
}
READERS = {"transformers4": ("peft", "transformers4"), "our_transformers": ("peft",)}

LORAS = {
    "attention": LoraConfig(rank=8, alpha=16, targets=ATTENTION),
    "experts": LoraConfig(rank=8, alpha=16, targets=MOE),
    "all": LoraConfig(rank=8, alpha=16, targets=ATTENTION + MOE),
    "alpha_no_power_of_two": LoraConfig(rank=8, alpha=12, targets=ATTENTION + MOE, encoding="fp32"),
}


@dataclass(frozen=True)
class Published:
    """One version, where PEFT finds it, and what it must make of it."""

    lora: LoraConfig
    exported: Path
    stored: Path
    expected_BS: Tensor
    effect: float  # nats
    modules: int


def install(pins: Sequence[str], directory: Path) -> Path:
    """Packages in a directory of their own; what is there already, by the same pins, stays."""
    stamp = "\n".join(pins)
    if (directory / "pins.txt").exists() and (directory / "pins.txt").read_text() == stamp:
        return directory
    directory.parent.mkdir(exist_ok=True)
    aside = directory.with_name(f"{directory.name}.{os.getpid()}")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
    try:
        done = subprocess.run(
            [*command, "--no-deps", "--target", str(aside), *pins],
            capture_output=True,
            text=True,
            timeout=INSTALL_TIMEOUT_S,
        )
        if done.returncode != 0:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")] or ["pip said nothing"]
            pytest.fail(f"no package index gives {', '.join(pins)}, so PEFT was not asked: {errors[-1]}", pytrace=False)
        (aside / "pins.txt").write_text(stamp)
        shutil.rmtree(directory, ignore_errors=True)
        aside.rename(directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return directory


@pytest.fixture(scope="module", name="tokens_BT")
def random_tokens() -> Tensor:
    return torch.randint(3, VOCAB, (6, 20), generator=torch.Generator().manual_seed(11))


def on_the_wire(adapter: dict[str, Tensor], lora: LoraConfig) -> dict[str, Tensor]:
    """The values that the encoding can carry, so that the reference and the reader have the same."""
    return {name: t.bfloat16().float() for name, t in adapter.items()} if lora.encoding == "bf16" else adapter


def publish(folder: Path, tiny_hf: Path, lora: LoraConfig, tokens_BT: Tensor) -> Published:
    """Put a random adapter into a policy, publish and export it."""
    adapter = on_the_wire(random_adapter(tiny_hf, lora.targets, lora.rank, seed=5), lora)
    config = Config(
        store=StoreConfig(url=f"file://{folder / 'store'}"),
        model=ModelConfig(path=str(tiny_hf)),
        task=TaskConfig(train_prompts="", heldout_prompts="", reward="", max_new_tokens=6),
        lora=lora,
    )
    policy = Policy(config)
    for piece in policy.slices():
        rows, columns = (slice(o, o + n) for o, n in zip(piece.offset, piece.tensor.shape, strict=True))
        piece.tensor.copy_(adapter[piece.name][rows, columns])
    store, layout = open_store(config.store.url), Layout(config.store.adapter)
    publisher = Publisher(
        store,
        layout,
        claim_epoch(store, layout),
        base_path=str(tiny_hf),
        base=identify(tiny_hf),
        lora=lora,
        parallel={"tp": 1},
    )
    publisher.submit(0, policy.slices(), training={"step": 0}, canary=policy.canary())
    publisher.close()
    out = folder / "exported"
    assert main(["export", "latest", "--store", config.store.url, "--out", str(out), "--base", str(tiny_hf)]) == 0
    catalog = Catalog(store, config.store.adapter)
    shard = catalog.manifest(catalog.versions()[0]).shards[0]
    expected_BS = hf_logp(merge_into_hf(load_hf(tiny_hf), adapter, lora.alpha / lora.rank), tokens_BT)
    return Published(
        lora=lora,
        exported=out,
        stored=(folder / "store" / shard.key).parent,
        expected_BS=expected_BS,
        effect=float((expected_BS - hf_logp(load_hf(tiny_hf), tokens_BT)).abs().max()),
        modules=len(adapter) // 2,
    )


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, tiny_hf: Path, tokens_BT: Tensor) -> dict[str, Published]:
    return {name: publish(tmp_path_factory.mktemp(name), tiny_hf, lora, tokens_BT) for name, lora in LORAS.items()}


@pytest.fixture(scope="module")
def older_base(tmp_path_factory: pytest.TempPathFactory, tiny_hf: Path) -> Path:
    """The base model with its config spelled as transformers 4 did, which takes its defaults for what it can't find."""
    directory = Path(shutil.copytree(tiny_hf, tmp_path_factory.mktemp("older") / "base"))
    config = read_base_config(directory)
    config |= {"num_experts": config.pop("num_local_experts"), **config.pop("rope_parameters")}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@dataclass(frozen=True)
class Answers:
    """What PEFT says of every directory, beside the transformers of that name."""

    reader: str
    told: dict[Path, dict[str, Any]]


@pytest.fixture(scope="module", params=READERS)
def answers(
    request: pytest.FixtureRequest,
    published: dict[str, Published],
    tiny_hf: Path,
    older_base: Path,
    tokens_BT: Tensor,
) -> Answers:
    """One process for all directories, for it takes seconds to import."""
    names = READERS[request.param]
    packages = [install(PINS[name], Path(sys.prefix, "peft-oracle", name)) for name in names]
    base = older_base if "transformers4" in names else tiny_hf
    directories = [directory for one in published.values() for directory in (one.exported, one.stored)]
    script = Path(__file__).with_name("peft_oracle.py")
    done = subprocess.run(
        [sys.executable, "-P", str(script), str(base), json.dumps(tokens_BT.tolist()), *map(str, directories)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, packages)), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=ORACLE_TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    pinned = {pin for name in names for pin in PINS[name] if pin.startswith(("peft==", "transformers=="))}
    assert pinned <= {f"{name}=={answer[name]}" for name in ("transformers", "peft")}
    return Answers(request.param, {Path(directory): told for directory, told in answer["adapters"].items()})


@pytest.mark.parametrize("place", ["exported", "stored"])
@pytest.mark.parametrize("name", LORAS)
def test_peft_loads_every_name_and_scores_as_transformers_with_merged_weights(
    published: dict[str, Published], answers: Answers, name: str, place: str
):
    one = published[name]
    told = answers.told[getattr(one, place)]
    assert (told["missing"], told["unexpected"]) == ([], [])
    if answers.reader == "transformers4":
        assert told["warnings"] == []
        assert told["adapted"] == one.modules, "an adapter on each linear layer that has one, and on no other"
    assert one.effect > 1000 * TOLERANCE
    assert float((torch.tensor(told["logp"]) - one.expected_BS).abs().max()) <= TOLERANCE


@pytest.mark.parametrize(("name", "alpha"), [("all", 8), ("alpha_no_power_of_two", 12)])
def test_alpha_is_in_the_values_where_that_is_exact_and_else_in_the_config(
    published: dict[str, Published], name: str, alpha: int
):
    one = published[name]
    for directory in (one.exported, one.stored):
        config = json.loads((directory / CONFIG).read_text())
        assert (config["r"], config["lora_alpha"]) == (one.lora.rank, alpha)


def test_the_stored_version_is_the_exported_one_byte_for_byte(published: dict[str, Published]):
    for one in published.values():
        assert (one.stored / WEIGHTS).read_bytes() == (one.exported / WEIGHTS).read_bytes()


def test_without_a_package_index_the_oracle_fails_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(pytest.fail.Exception, match=r"PEFT was not asked: ERROR: No matching distribution .*transform"):
        install(PINS["transformers4"], tmp_path / "oracle")
    assert not (tmp_path / "oracle").exists()
