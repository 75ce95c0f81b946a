"""Adapters of two tensors, whose bytes follow from who submits them: any two versions differ in every tensor."""

import hashlib
from collections.abc import Mapping

from publisher.commit import Heading
from publisher.shard import EncodedShard, EncodedSlice
from shared.adapter_files import read_tensors
from shared.base_model import BaseIdentity
from shared.errors import Corrupt
from shared.manifest import LoraShape, Manifest, Parent
from shared.peft_names import expected_tensors
from shared.tensor_table import Slice
from shared.versions import Version

ADAPTER = "policy"
BASE = BaseIdentity("qwen3_moe", "c" * 64, "d" * 64)
BASE_CONFIG = {
    "model_type": BASE.model_type,
    "hidden_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 2,
    "num_experts": 1,
    "moe_intermediate_size": 1,
}
RANK, TARGETS = 6, ("linear_proj",)
EXPECTED = expected_tensors(
    BASE_CONFIG, TARGETS, RANK
)  # two tensors, of 6 and 12 rows, which are dealt out to the ranks
ITEM_BYTES = 2
FINITE = 0x3F  # keeps a bf16's exponent from being all ones

Tensors = Mapping[str, bytes]


def tensors_of(author: str, version: Version) -> Tensors:
    """The adapter that `author` submits as `version`."""
    return {name: _noise(f"{author} {version} {name}", rows * columns) for name, (rows, columns) in EXPECTED.items()}


def _noise(text: str, count: int) -> bytes:
    noise = bytearray(hashlib.shake_128(text.encode()).digest(count * ITEM_BYTES))
    noise[1::ITEM_BYTES] = bytes(byte & FINITE for byte in noise[1::ITEM_BYTES])
    return bytes(noise)


def heading_of(version: Version, world: int, parent: Parent | None, submitted_at: float) -> Heading:
    """What all ranks know of a version."""
    return Heading(
        adapter=ADAPTER,
        version=version,
        parent=parent,
        base=BASE,
        base_name="tiny",
        lora=LoraShape(RANK, RANK, RANK, TARGETS),
        parallel={"tp": world},
        encoding="bf16",
        training={"step": version.number, "submitted_at": submitted_at},
        canary=None,
    )


def shard_of(tensors: Tensors, rank: int, world: int) -> EncodedShard:
    """One rank's rows of every tensor."""
    slices, content = [], b""
    for name, (rows, columns) in EXPECTED.items():
        height = rows // world
        row_bytes, first = columns * ITEM_BYTES, rank * height
        content += tensors[name][first * row_bytes : (first + height) * row_bytes]
        slices.append(EncodedSlice(name, "BF16", (height, columns), (rows, columns), (first, 0)))
    return EncodedShard(slices, memoryview(content), {})


def assembled(manifest: Manifest, shards: list[bytes]) -> Tensors:
    """The tensors that a manifest makes of its shards' bytes: what an engine would serve.

    Raises:
        Corrupt: a shard does not hold what the manifest says.
    """
    held = [
        {spec.name: content for spec, content in read_tensors(content, key=shard.key)}
        for shard, content in zip(manifest.shards, shards, strict=True)
    ]
    try:
        return {
            name: b"".join(bytes(held[piece.shard][piece.name]) for piece in sorted(tensor.slices, key=_row))
            for name, tensor in manifest.tensors.items()
        }
    except KeyError as error:
        raise Corrupt(f"no {error} in its shard", op="assemble", version=str(manifest.version)) from error


def _row(piece: Slice) -> int:
    return piece.offset[0]
