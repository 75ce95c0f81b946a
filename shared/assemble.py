"""Shards of a version into one plain safetensors file, in wire order, checking every header, shape and value.

Promises: what is written holds exactly the expected names; a slice that the manifest does not call for, or calls for
otherwise, is an error; so is NaN or infinity. Memory: one tensor at a time; shards are mapped, not read.
"""

import contextlib
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from shared.adapter_files import ITEM_BYTES, TensorSpec, all_tensors, demand_finite, header_bytes
from shared.manifest import Manifest
from shared.shard_contents import demand_same, promised_tensors
from shared.tensor_table import Tensor

Shape = tuple[int, int]
Pieces = dict[tuple[int, str], memoryview]  # by (shard number, name inside)


def assemble(manifest: Manifest, shards: Sequence[Path], expected: Mapping[str, Shape], out: BinaryIO) -> None:
    """Write the plain file.

    Args:
        manifest: already checked for completeness (`shared.coverage`).
        shards: local copies, in the manifest's order.
        expected: names in wire order.
        out: an empty file.

    Raises:
        Corrupt: a shard's header or values are not what the manifest says.
    """
    specs = assembled_tensors(manifest, expected)
    key = f"version {manifest.version}"
    with contextlib.ExitStack() as stack:
        pieces = _open(stack, manifest, shards, expected)
        out.write(header_bytes(specs))
        for spec in specs:
            content = _join(_tensor(manifest, spec.name), pieces)
            demand_finite(spec, content, key=key)
            out.write(content)


def assembled_tensors(manifest: Manifest, expected: Mapping[str, Shape]) -> list[TensorSpec]:
    """What the plain file of a version holds, in order."""
    return [TensorSpec(name, _tensor(manifest, name).dtype, shape) for name, shape in expected.items()]


def _open(
    stack: contextlib.ExitStack, manifest: Manifest, shards: Sequence[Path], expected: Mapping[str, Shape]
) -> Pieces:
    """Map every shard and check that it holds exactly the slices that the manifest names."""
    pieces: Pieces = {}
    for number, (path, promised) in enumerate(zip(shards, promised_tensors(manifest, expected), strict=True)):
        file = stack.enter_context(path.open("rb"))
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        tensors = all_tensors(memoryview(mapped), key=manifest.shards[number].key, promised=promised)
        found = [spec for spec, _ in tensors]
        if found != promised:
            demand_same(manifest, number, promised, found)
        pieces.update(((number, spec.name), content) for spec, content in tensors)
    return pieces


def _join(tensor: Tensor, pieces: Pieces) -> memoryview | bytes:
    """One tensor's bytes, row-major."""
    if len(tensor.slices) == 1:
        return pieces[tensor.slices[0].shard, tensor.slices[0].name]
    word = {2: np.uint16, 4: np.uint32}[ITEM_BYTES[tensor.dtype]]
    whole = np.empty(tensor.shape, dtype=word)
    for slice_ in tensor.slices:
        (row, column), (height, width) = slice_.offset, slice_.shape
        content = pieces[slice_.shard, slice_.name]
        whole[row : row + height, column : column + width] = np.frombuffer(content, dtype=word).reshape(height, width)
    return whole.tobytes()


def _tensor(manifest: Manifest, name: str) -> Tensor:
    return manifest.tensors[manifest.aliases.get(name, name)]
