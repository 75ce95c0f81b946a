"""Shards of a version into one plain safetensors file, in wire order, checking every header, shape and value.

Promises: what is written holds exactly the expected names; a slice that the manifest does not call for, or calls for
otherwise, is an error; so is NaN or infinity. Memory: one tensor at a time; shards are mapped, not read.
"""

import contextlib
import hashlib
import mmap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from shared.adapter_files import ITEM_BYTES, TensorSpec, demand_finite, header_bytes, read_tensors
from shared.errors import Corrupt
from shared.manifest import Manifest
from shared.tensor_table import Tensor

Shape = tuple[int, int]
Pieces = dict[tuple[int, str], tuple[TensorSpec, memoryview]]  # by (shard number, name inside)


def assemble(manifest: Manifest, shards: Sequence[Path], expected: Mapping[str, Shape], out: BinaryIO) -> str:
    """Write the plain file.

    Args:
        manifest: already checked for completeness (`shared.coverage`).
        shards: local copies, in the manifest's order.
        expected: names in wire order.
        out: an empty file.

    Returns:
        sha256 (hex) of what was written.

    Raises:
        Corrupt: a shard's header or values are not what the manifest says.
    """
    digest = hashlib.sha256()
    specs = [_spec(name, _tensor(manifest, name)) for name in expected]
    with contextlib.ExitStack() as stack:
        pieces = _open(stack, manifest, shards)
        for chunk in (header_bytes(specs), *_contents(manifest, pieces, specs)):
            digest.update(chunk)
            out.write(chunk)
    return digest.hexdigest()


def _contents(manifest: Manifest, pieces: Pieces, specs: Sequence[TensorSpec]) -> Iterator[memoryview | bytes]:
    key = f"version {manifest.version}"
    for spec in specs:
        content = _join(_tensor(manifest, spec.name), pieces)
        demand_finite(spec, content, key=key)
        yield content


def _open(stack: contextlib.ExitStack, manifest: Manifest, shards: Sequence[Path]) -> Pieces:
    """Map every shard and check that it holds exactly the slices that the manifest names."""
    pieces: Pieces = {}
    for number, (shard, path) in enumerate(zip(manifest.shards, shards, strict=True)):
        file = stack.enter_context(path.open("rb"))
        if shard.size == 0:
            raise Corrupt("an empty shard", op="assemble", key=shard.key, version=str(manifest.version))
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        for spec, content in read_tensors(memoryview(mapped), key=shard.key):
            pieces[number, spec.name] = spec, content
    promised = {
        (slice_.shard, slice_.name): TensorSpec(slice_.name, tensor.dtype, slice_.shape)
        for tensor in manifest.tensors.values()
        for slice_ in tensor.slices
    }
    for place in promised.keys() | pieces.keys():
        found = pieces[place][0] if place in pieces else None
        if promised.get(place) != found:
            problem = f"manifest says {promised.get(place)}, the shard holds {found}"
            key = manifest.shards[place[0]].key
            raise Corrupt(problem, op="assemble", key=key, version=str(manifest.version))
    return pieces


def _join(tensor: Tensor, pieces: Pieces) -> memoryview | bytes:
    """One tensor's bytes, row-major."""
    if len(tensor.slices) == 1:
        return pieces[tensor.slices[0].shard, tensor.slices[0].name][1]
    word = {2: np.uint16, 4: np.uint32}[ITEM_BYTES[tensor.dtype]]
    whole = np.empty(tensor.shape, dtype=word)
    for slice_ in tensor.slices:
        (row, column), (height, width) = slice_.offset, slice_.shape
        content = pieces[slice_.shard, slice_.name][1]
        whole[row : row + height, column : column + width] = np.frombuffer(content, dtype=word).reshape(height, width)
    return whole.tobytes()


def _tensor(manifest: Manifest, name: str) -> Tensor:
    return manifest.tensors[manifest.aliases.get(name, name)]


def _spec(name: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(name, tensor.dtype, tensor.shape)
