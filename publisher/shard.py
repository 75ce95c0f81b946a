"""A rank's slices as the bytes of its shard: scaled, encoded, in wire order, digested.

lora_B is multiplied by alpha/r where that is a power of two (exact in bf16 and fp32), so that lora_alpha == r on the
wire: one pass less in vLLM, and nothing left to apply twice. Elsewhere B stays as it is and alpha travels.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from publisher.convert import AdapterSlice
from shared.adapter_files import TensorSpec, demand_finite, header_bytes
from shared.errors import Corrupt
from shared.manifest import PART_BYTES, Shard

ENCODINGS = {"bf16": (torch.bfloat16, "BF16"), "fp32": (torch.float32, "F32")}


@dataclass(frozen=True)
class EncodedSlice:
    """A slice ready to be written. `content` is its bytes, row-major, in one or more runs."""

    tensor: str  # the global tensor's PEFT name
    dtype: str
    shape: tuple[int, int]
    global_shape: tuple[int, int]
    offset: tuple[int, int]
    content: tuple[memoryview, ...]

    @property
    def name(self) -> str:
        """Inside the shard: the tensor's own name if this is all of it."""
        whole = self.shape == self.global_shape
        return self.tensor if whole else f"{self.tensor}@{self.offset[0]},{self.offset[1]}"


def wire_scale(rank: int, alpha: int) -> tuple[float, int]:
    """(factor for lora_B, lora_alpha on the wire)."""
    mantissa, _ = math.frexp(alpha / rank)
    return (alpha / rank, rank) if mantissa == 0.5 else (1.0, alpha)


def encode(
    slices: Iterable[AdapterSlice], *, rank: int, alpha: int, encoding: str, aliases: bool
) -> tuple[list[EncodedSlice], dict[str, str]]:
    """Encode slices, in the order given.

    Args:
        slices: host tensors of any float dtype.
        rank, alpha: of the LoRA.
        encoding: "bf16" or "fp32".
        aliases: whether a tensor with several names travels once; otherwise each name gets its own copy.

    Returns:
        The encoded slices, and {alias: name}.

    Raises:
        Corrupt: NaN or infinity in a tensor; the training diverged, and nothing is published.
    """
    factor, _ = wire_scale(rank, alpha)
    dtype, dtype_name = ENCODINGS[encoding]
    encoded: list[EncodedSlice] = []
    alias_of: dict[str, str] = {}
    for piece in slices:
        scaled = piece.tensor.detach() * factor if ".lora_B." in piece.name and factor != 1.0 else piece.tensor.detach()
        tensor = scaled.to(dtype).contiguous()
        rows, columns = tensor.shape
        content = memoryview(tensor.view(torch.uint8).numpy().reshape(-1).data)
        demand_finite(TensorSpec(piece.name, dtype_name, (rows, columns)), content, key="lora")
        names = (piece.name,) if aliases else (piece.name, *piece.aliases)
        if aliases:
            alias_of.update(dict.fromkeys(piece.aliases, piece.name))
        encoded.extend(
            EncodedSlice(name, dtype_name, (rows, columns), piece.shape, piece.offset, (content,)) for name in names
        )
    return encoded, alias_of


def in_wire_order(encoded: Iterable[EncodedSlice], order: Mapping[str, int]) -> list[EncodedSlice]:
    """Sort by the position of each tensor's name in `order`, and join slices that lie directly below one another.

    Megatron interleaves q, k and v by query group, so one rank holds q_proj in as many row ranges as it has groups;
    joined, a lone rank's tensors are whole again.

    Raises:
        Corrupt: a name that the base model and the targets do not call for.
    """
    pieces = list(encoded)
    unknown = [piece.tensor for piece in pieces if piece.tensor not in order]
    if unknown:
        raise Corrupt(f"{len(unknown)} unexpected tensors ({unknown[0]}, ...)", op="publish")
    pieces.sort(key=lambda piece: (order[piece.tensor], piece.offset[1], piece.offset[0]))
    joined: list[EncodedSlice] = []
    for piece in pieces:
        if joined and _continues(joined[-1], piece):
            above = joined.pop()
            shape = (above.shape[0] + piece.shape[0], piece.shape[1])
            piece = replace(above, shape=shape, content=above.content + piece.content)
        joined.append(piece)
    return joined


def _continues(above: EncodedSlice, below: EncodedSlice) -> bool:
    same_columns = (above.offset[1], above.shape[1]) == (below.offset[1], below.shape[1])
    return above.tensor == below.tensor and same_columns and above.offset[0] + above.shape[0] == below.offset[0]


def shard_chunks(pieces: Sequence[EncodedSlice]) -> Iterator[bytes | memoryview]:
    """The file's bytes, header first, without joining them."""
    yield header_bytes([TensorSpec(piece.name, piece.dtype, piece.shape) for piece in pieces])
    for piece in pieces:
        yield from piece.content


def shard_bytes(pieces: Sequence[EncodedSlice]) -> int:
    """The file's size."""
    return sum(len(chunk) for chunk in shard_chunks(pieces))


def digest(key: str, chunks: Iterable[bytes | memoryview]) -> Shard:
    """Size, sha256 of the whole and of every PART_BYTES part, in one pass."""
    whole, part = hashlib.sha256(), hashlib.sha256()
    size, filled, parts = 0, 0, []
    for chunk in chunks:
        view = memoryview(chunk)
        whole.update(view)
        size += len(view)
        while len(view):
            taken = view[: PART_BYTES - filled]
            part.update(taken)
            filled += len(taken)
            view = view[len(taken) :]
            if filled == PART_BYTES:
                parts.append(part.hexdigest())
                part, filled = hashlib.sha256(), 0
    if filled:
        parts.append(part.hexdigest())
    return Shard(key, size, whole.hexdigest(), tuple(parts))
