"""A tiny Qwen3-MoE and adapters for it, made of seeded noise: publishing and fetching without Megatron or vLLM."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from publisher.commit import Rank
from publisher.convert import MegatronLora, convert
from publisher.epochs import Claim, claim_epoch
from publisher.publisher import Publisher
from shared.adapter_files import TensorSpec, header_bytes, read_tensors
from shared.base_model import identify
from shared.catalog import Catalog
from shared.config import LoraConfig
from shared.layout import Layout
from shared.manifest import Manifest
from shared.peft_names import expected_tensors
from shared.store import Store

ADAPTER = "policy"
LORA = LoraConfig(rank=4, alpha=8)
BASE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 4,
    "num_experts": 6,
    "moe_intermediate_size": 12,
}
EXPECTED = expected_tensors(BASE, LORA.targets, LORA.rank)


def write_base(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """A base model directory: a config, and weights that nobody multiplies."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**BASE, **changes}))
    weights = bytes((seed + position) % 256 for position in range(64))
    (directory / "model.safetensors").write_bytes(header_bytes([TensorSpec("w", "F32", (16,))]) + weights)
    return directory


def factors(seed: int = 0, base: dict[str, Any] = BASE, rank: int = LORA.rank) -> list[MegatronLora]:
    """Every factor as a lone rank holds it; all values differ."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inter, head = base["hidden_size"], base["moe_intermediate_size"], base["head_dim"]
    q, kv = base["num_attention_heads"] * head, base["num_key_value_heads"] * head
    sizes = {
        "linear_qkv": (hidden, q + 2 * kv),
        "linear_proj": (q, hidden),
        "linear_fc1": (hidden, 2 * inter),
        "linear_fc2": (inter, hidden),
    }
    made = []
    for layer in range(base["num_hidden_layers"]):
        for target, (n_in, n_out) in sizes.items():
            for expert in range(base["num_experts"]) if "fc" in target else [None]:
                lora_A = torch.randn((rank, n_in), generator=generator)
                lora_B = torch.randn((n_out, rank), generator=generator)
                made.append(MegatronLora(target, layer, expert, lora_A, lora_B))
    return made


def rank_factors(whole: Iterable[MegatronLora], rank: int, world: int) -> list[MegatronLora]:
    """What one of `world` ranks holds: attention cut by tensor parallelism, experts dealt out whole."""
    held = []
    for lora in whole:
        if lora.expert is not None:
            if lora.expert % world == rank:
                held.append(lora)
        elif lora.target == "linear_qkv":
            part = lora.lora_B.chunk(world)[rank]
            held.append(replace(lora, lora_B=part, tp_rank=rank, tp_size=world, writes_A=rank == 0))
        else:
            part = lora.lora_A.chunk(world, 1)[rank]
            held.append(replace(lora, lora_A=part, tp_rank=rank, tp_size=world, writes_B=rank == 0))
    return held


def open_publisher(store: Store, base: Path, claim: Claim | None = None, **options: Any) -> Publisher:
    """A publisher of the tiny adapter, in a new epoch unless one is given."""
    layout = Layout(ADAPTER)
    claim = claim or claim_epoch(store, layout)
    options = {"lora": LORA, "parallel": {"tp": options.get("rank", Rank()).world}, **options}
    return Publisher(store, layout, claim, base_path=str(base), base=identify(base), **options)


def publish(store: Store, base: Path, count: int = 1, **options: Any) -> list[Manifest]:
    """Publish versions 0 .. count - 1 in a new epoch, each with other values."""
    publisher = open_publisher(store, base, **options)
    for number in range(count):
        publisher.submit(number, convert(BASE, factors(number)), training={"step": number})
    publisher.close()
    catalog = Catalog(store, ADAPTER)
    return [catalog.manifest(version) for version in catalog.versions()[-count:]]


def read_file(path: Path) -> dict[str, bytes]:
    """Every tensor's bytes, in the file's order."""
    return {spec.name: bytes(content) for spec, content in read_tensors(path.read_bytes(), key=str(path))}
