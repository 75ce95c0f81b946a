"""A rank's slices as the bytes of its shard: scaled, encoded, in wire order, back to back in one piece of memory.

lora_B is multiplied by alpha/r where that is a power of two (exact in bf16 and fp32), so that lora_alpha == r on the
wire: one pass less in vLLM, and nothing left to apply twice. Elsewhere B stays as it is and alpha travels.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

import torch

from publisher.convert import AdapterSlice
from shared.adapter_files import TensorSpec, demand_finite, header_bytes, not_finite_at
from shared.cycles import collection_paused
from shared.errors import Corrupt

ENCODINGS = {"bf16": (torch.bfloat16, "BF16"), "fp32": (torch.float32, "F32")}
SLICES_AT_ONCE = 256  # handed to torch

Pair = tuple[int, int]


class EncodedSlice(NamedTuple):
    """What a run of the shard's bytes is: a rectangle of a tensor, row-major."""

    tensor: str  # the global tensor's PEFT name
    dtype: str
    shape: Pair
    global_shape: Pair
    offset: Pair

    @property
    def name(self) -> str:
        """Inside the shard: the tensor's own name if this is all of it."""
        whole = self.shape == self.global_shape
        return self.tensor if whole else f"{self.tensor}@{self.offset[0]},{self.offset[1]}"


@dataclass(frozen=True)
class EncodedShard:
    """Slices in wire order, and their bytes back to back in `content`; `aliases` is {alias: name}."""

    slices: Sequence[EncodedSlice]
    content: memoryview
    aliases: Mapping[str, str]

    @collection_paused()
    def chunks(self) -> tuple[memoryview, memoryview]:
        """The file: header and data."""
        return memoryview(header_bytes(self.specs())), self.content

    def specs(self) -> list[TensorSpec]:
        """The file's tensors, in order."""
        return [TensorSpec(piece.name, piece.dtype, piece.shape) for piece in self.slices]


_Placed = tuple[int, int, int, str, AdapterSlice]  # position on the wire, column, row, one of the slice's names
_WIRE_ORDER = itemgetter(0, 1, 2)


def wire_scale(rank: int, alpha: int) -> tuple[float, int]:
    """(factor for lora_B, lora_alpha on the wire)."""
    mantissa, _ = math.frexp(alpha / rank)
    return (alpha / rank, rank) if mantissa == 0.5 else (1.0, alpha)


@collection_paused()
def encode(
    slices: Iterable[AdapterSlice], order: Mapping[str, int], *, rank: int, alpha: int, encoding: str, aliases: bool
) -> EncodedShard:
    """Encode slices in wire order, and join those that lie directly below one another.

    Megatron interleaves q, k and v by query group, so one rank holds q_proj in as many row ranges as it has groups;
    joined, a lone rank's tensors are whole again.

    Args:
        slices: host tensors of any float dtype.
        order: the position of each tensor's name on the wire.
        rank, alpha: of the LoRA.
        encoding: "bf16" or "fp32".
        aliases: whether a tensor with several names travels once; otherwise each name gets its own copy.

    Raises:
        Corrupt: a name that `order` does not have; NaN or infinity in a tensor: the training diverged, and nothing is
            published.
    """
    factor, _ = wire_scale(rank, alpha)
    dtype, dtype_name = ENCODINGS[encoding]
    placed, alias_of = _in_wire_order(slices, order, aliases)
    encoded: list[EncodedSlice] = []
    above = None
    for _, column, row, name, source in placed:
        height, width = source.tensor.shape
        piece = EncodedSlice(name, dtype_name, (height, width), source.shape, (row, column))
        if above is not None and above.tensor == name and _continues(above, piece):
            encoded.pop()
            piece = _joined(above, piece)
        encoded.append(piece)
        above = piece
    shard = EncodedShard(encoded, _values(placed, factor, dtype).view(torch.uint8).numpy().data, alias_of)
    _demand_finite(shard, dtype_name)
    return shard


@torch.no_grad()
def _values(placed: Sequence[_Placed], factor: float, dtype: torch.dtype) -> torch.Tensor:
    """All values back to back: some hundred slices a call, for a call costs more than a small slice's bytes."""
    content = torch.empty(sum(source.tensor.numel() for *_, source in placed), dtype=dtype)
    start = 0
    for first in range(0, len(placed), SLICES_AT_ONCE):
        flat = []
        for *_, name, source in placed[first : first + SLICES_AT_ONCE]:
            scaled = source.tensor * factor if factor != 1.0 and ".lora_B." in name else source.tensor
            flat.append(scaled.reshape(-1))
        end = start + sum(map(torch.numel, flat))
        torch.cat(flat, out=content[start:end])
        start = end
    return content


def _in_wire_order(
    slices: Iterable[AdapterSlice], order: Mapping[str, int], aliases: bool
) -> tuple[list[_Placed], dict[str, str]]:
    placed: list[_Placed] = []
    alias_of: dict[str, str] = {}
    for piece in slices:
        names = (piece.name,) if aliases else (piece.name, *piece.aliases)
        if aliases:
            alias_of.update(dict.fromkeys(piece.aliases, piece.name))
        row, column = piece.offset
        for name in names:
            placed.append((order.get(name, -1), column, row, name, piece))
    placed.sort(key=_WIRE_ORDER)
    unknown = [name for position, _, _, name, _ in placed if position < 0]
    if unknown:
        raise Corrupt(f"{len(unknown)} unexpected tensors ({unknown[0]}, ...)", op="publish")
    return placed, alias_of


def _continues(above: EncodedSlice, below: EncodedSlice) -> bool:
    """Whether a slice of the same tensor lies directly below."""
    same_columns = (above.offset[1], above.shape[1]) == (below.offset[1], below.shape[1])
    return same_columns and above.offset[0] + above.shape[0] == below.offset[0]


def _joined(above: EncodedSlice, below: EncodedSlice) -> EncodedSlice:
    return above._replace(shape=(above.shape[0] + below.shape[0], above.shape[1]))


def _demand_finite(shard: EncodedShard, dtype: str) -> None:
    if not_finite_at(dtype, shard.content) is None:
        return
    start = 0
    for spec in shard.specs():
        demand_finite(spec, shard.content[start : start + spec.nbytes], key="lora")
        start += spec.nbytes
