"""Safetensors files in our tensor order, and their strict reading.

The format (8-byte little-endian header length, JSON header, gapless bytes) is safetensors' own, so every stock reader
opens our files; the writer is ours because `safetensors.save_file` sorts by name and so tears experts apart
("experts.10" before "experts.2"). The reader is ours because safetensors is no integrity layer: 0.8 accepts flipped
bits, duplicate keys, path-like names and 13 MB headers. Nothing here allocates before it has checked a limit.

Format: https://github.com/huggingface/safetensors#format
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from json.encoder import encode_basestring_ascii as quoted
from typing import Any, NamedTuple

import numpy as np

from shared import strict_json
from shared.cycles import collection_paused
from shared.errors import Corrupt

MAX_HEADER_BYTES = 100_000_000  # safetensors' own bound
MAX_TENSORS = 200_000
MAX_FILE_BYTES = 1 << 50
MAX_DIMENSIONS = 8
MAX_NAME_LENGTH = 512  # characters
ALIGN_BYTES = 8

ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
_NAME = re.compile(r"\w+([.@,\-]\w+)*", re.ASCII)  # "layers.0.lora_B.weight@0,64"; never a path
# Their exponent is all ones: (unsigned word, the least -inf or NaN), (signed word, the least inf or NaN).
_NOT_FINITE = {
    "BF16": ((np.uint16, 0xFF80), (np.int16, 0x7F80)),
    "F16": ((np.uint16, 0xFC00), (np.int16, 0x7C00)),
    "F32": ((np.uint32, 0xFF800000), (np.int32, 0x7F800000)),
}
_CACHED_BYTES = 1 << 18  # of a range that two passes over it find in the processor's cache


class TensorSpec(NamedTuple):
    """One tensor of a file. `dtype` as safetensors spells it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return ITEM_BYTES[self.dtype] * math.prod(self.shape)


class Placed(NamedTuple):
    """A tensor and where its bytes lie, counted from the start of the data section."""

    spec: TensorSpec
    start: int
    end: int


def header_bytes(specs: Sequence[TensorSpec]) -> bytes:
    """The length prefix and header of a file that holds these tensors back to back, in this order."""
    entries = ['"__metadata__":{"format":"pt"}']
    start = 0
    shapes = {shape: ",".join(map(str, shape)) for shape in {spec.shape for spec in specs}}
    for (name, dtype, shape), nbytes in zip(specs, _sizes(specs), strict=True):
        end = start + nbytes
        fields = f'{{"dtype":"{dtype}","shape":[{shapes[shape]}],"data_offsets":[{start},{end}]}}'
        entries.append(f"{quoted(name)}:{fields}")
        start = end
    header = f"{{{','.join(entries)}}}".encode()
    header += b" " * (-len(header) % ALIGN_BYTES)
    return len(header).to_bytes(8, "little") + header


def place(specs: Sequence[TensorSpec]) -> list[Placed]:
    """Where these tensors lie, back to back in this order."""
    placed, start = [], 0
    for spec, nbytes in zip(specs, _sizes(specs), strict=True):
        placed.append(Placed(spec, start, start + nbytes))
        start += nbytes
    return placed


def _sizes(specs: Iterable[TensorSpec]) -> list[int]:
    """Each tensor's size in bytes: of tens of thousands of tensors, and a handful of shapes."""
    known = {kind: TensorSpec("", *kind).nbytes for kind in {spec[1:] for spec in specs}}
    return [known[spec[1:]] for spec in specs]


def parse_header(head: bytes, file_bytes: int, *, key: str) -> tuple[list[Placed], int]:
    """Read a file's header.

    Args:
        head: the file's first bytes, at least the length prefix and the header.
        file_bytes: the whole file's size; the data must fill it exactly.

    Returns:
        The tensors in data order, and where the data section starts.

    Raises:
        Corrupt: anything that the format forbids, plus duplicate names, names that could be paths, gaps and overlaps.
    """

    def demand(holds: bool, problem: str) -> None:
        if not holds:
            raise Corrupt(problem, op="read safetensors header", key=key)

    demand(len(head) >= 8, "truncated before the header's length")
    length = int.from_bytes(head[:8], "little")
    demand(length <= MAX_HEADER_BYTES, f"header of {length} bytes, more than {MAX_HEADER_BYTES}")
    demand(len(head) >= 8 + length, "truncated inside the header")
    header = strict_json.load_object(head[8 : 8 + length], key=key, max_bytes=MAX_HEADER_BYTES)
    metadata = header.pop("__metadata__", {})
    holds_text = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    demand(holds_text, "__metadata__ is not a table of strings")
    demand(len(header) <= MAX_TENSORS, f"{len(header)} tensors, more than {MAX_TENSORS}")
    placed = [_place(name, entry, key) for name, entry in header.items()]
    placed.sort(key=lambda tensor: (tensor.start, tensor.end))
    end = 0
    for tensor in placed:
        demand(tensor.start == end, f"gap or overlap before tensor {tensor.spec.name[:80]!r}")
        end = tensor.end
    demand(8 + length + end == file_bytes, f"{file_bytes} bytes, but header and data make {8 + length + end}")
    return placed, 8 + length


def _place(name: str, entry: Any, key: str) -> Placed:
    """Check one header entry."""
    if len(name) > MAX_NAME_LENGTH or not _NAME.fullmatch(name):
        raise Corrupt(f"not the name of a tensor: {name[:80]!r}", op="read safetensors header", key=key)
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if dtype not in ITEM_BYTES or not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
            raise ValueError("an unknown dtype, or a shape that is none")
        if any(type(number) is not int or not 0 <= number <= MAX_FILE_BYTES for number in (*shape, start, end)):
            raise ValueError("a size or offset out of range")
    except (KeyError, TypeError, ValueError) as error:
        raise Corrupt(f"bad entry for tensor {name[:80]!r}: {error}", op="read safetensors header", key=key) from error
    spec = TensorSpec(name, dtype, tuple(shape))
    if end - start != spec.nbytes:
        raise Corrupt(
            f"tensor {name[:80]!r} spans {end - start} bytes, its shape needs {spec.nbytes}",
            op="read safetensors header",
            key=key,
        )
    return Placed(spec, start, end)


def read_tensors(
    content: bytes | memoryview, *, key: str, promised: Sequence[TensorSpec] | None = None
) -> Iterator[tuple[TensorSpec, memoryview]]:
    """The tensors of a whole file in memory, as views of its bytes, in data order.

    Args:
        promised: what the file should hold. One whose header is exactly theirs is not parsed: it is known already.
            Another is still read: the caller compares.

    Raises:
        Corrupt: see `parse_header`.
    """
    view = memoryview(content)
    header = header_bytes(promised) if promised else b""
    if promised and view[: len(header)].tobytes() == header:
        sizes = _sizes(promised)
        if len(view) == len(header) + sum(sizes):
            start = len(header)
            for spec, nbytes in zip(promised, sizes, strict=True):
                yield spec, view[start : start + nbytes]
                start += nbytes
            return
    length = int.from_bytes(view[:8], "little") if len(view) >= 8 else 0
    head = bytes(view[: 8 + min(length, MAX_HEADER_BYTES + 1)])
    placed, data_start = parse_header(head, len(view), key=key)
    data = view[data_start:]
    for spec, start, end in placed:
        yield spec, data[start:end]


@collection_paused()
def all_tensors(
    content: bytes | memoryview, *, key: str, promised: Sequence[TensorSpec] | None = None
) -> list[tuple[TensorSpec, memoryview]]:
    """What `read_tensors` yields, at once."""
    return list(read_tensors(content, key=key, promised=promised))


def not_finite_at(dtype: str, content: bytes | memoryview) -> int | None:
    """Where, in bytes, the first NaN or infinity stands among values that lie back to back; None if there is none."""
    (unsigned, least_negative), (signed, least_positive) = _NOT_FINITE[dtype]
    words = np.frombuffer(content, dtype=unsigned)
    step = _CACHED_BYTES // words.itemsize
    for start in range(0, len(words), step):
        some = words[start : start + step]
        if some.max() >= least_negative or some.view(signed).max() >= least_positive:
            bad = (some >= least_negative) | (some.view(signed) >= least_positive)
            return (start + int(bad.argmax())) * words.itemsize
    return None


def demand_finite(spec: TensorSpec, content: bytes | memoryview, *, key: str) -> None:
    """Check that a tensor has neither NaN nor infinity.

    Raises:
        Corrupt: names the tensor.
    """
    if not_finite_at(spec.dtype, content) is not None:
        raise Corrupt(f"NaN or infinity in tensor {spec.name}", op="check values", key=key)
