"""Adapters to measure with: Qwen3-30B-A3B's shapes at some rank and depth, and values of noise, ready to be put."""

from dataclasses import dataclass

import numpy as np

from publisher.shard import EncodedShard, EncodedSlice
from shared.adapter_files import TensorSpec
from shared.cycles import collection_paused
from shared.peft_names import expected_tensors

BASE = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "moe_intermediate_size": 768,
}
TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
NOISE_BYTES = 32 << 20  # repeated: neither sha256 nor a disk runs faster for it
FINITE = 0xBFFF  # clears one bit of bf16's exponent, so that no value is NaN or infinite


@dataclass(frozen=True)
class Size:
    """An adapter by what it weighs."""

    name: str
    layers: int
    rank: int
    repeats: int
    s3_repeats: int = 1
    targets: tuple[str, ...] = TARGETS

    def expected(self) -> dict[str, tuple[int, int]]:
        """Every tensor's shape, in wire order."""
        return expected_tensors({**BASE, "num_hidden_layers": self.layers}, self.targets, self.rank)


SIZES = {
    size.name: size
    for size in (
        Size("16MB", layers=1, rank=8, repeats=9, s3_repeats=5),
        Size("200MB", layers=3, rank=32, repeats=9, s3_repeats=3),
        Size("1700MB", layers=48, rank=16, repeats=5),
        Size("3400MB", layers=48, rank=32, repeats=3),
    )
}
MANY_TENSORS = Size("36,864 tensors", layers=48, rank=2, repeats=5, targets=("linear_fc1", "linear_fc2"))


def encoded(expected: dict[str, tuple[int, int]]) -> EncodedShard:
    """A lone rank's shard in bf16, without aliases: each name has bytes of its own."""
    count = sum(rows * columns for rows, columns in expected.values())
    noise = np.random.default_rng(0).integers(0, 1 << 16, min(count, NOISE_BYTES // 2), dtype=np.uint16) & FINITE
    content = np.resize(noise, count)
    slices = [EncodedSlice(name, "BF16", shape, shape, (0, 0)) for name, shape in expected.items()]
    return EncodedShard(slices, content.view(np.uint8).data, {})


@collection_paused()
def specs(expected: dict[str, tuple[int, int]]) -> list[TensorSpec]:
    """The same as a file's tensors."""
    return [TensorSpec(name, "BF16", shape) for name, shape in expected.items()]
