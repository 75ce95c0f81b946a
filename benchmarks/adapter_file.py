"""Our writer and reader of many tensors beside safetensors' save_file and load_file, on the same tensors.

save_file   safetensors: from separate tensors to a new file, not synced
encode      ours, from the same separate tensors: scaled, converted and joined in wire order, every value looked at
write       ours, from a ready shard, which is what a publisher's background thread has: header and bytes to a new
            file, not synced either; `encode` and `write` together begin where save_file does
load_file   safetensors: the file to a dict of tensors
map         ours: the file mapped, its header checked strictly against what a manifest promises, every tensor a view
"""

import gc
import mmap
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.adapters import Size, specs
from benchmarks.timing import Stopwatch
from publisher.convert import AdapterSlice
from publisher.shard import EncodedShard, encode
from shared.adapter_files import TensorSpec, all_tensors
from shared.parts import in_parts


def compare(directory: Path, size: Size, repeats: int) -> Stopwatch:
    """Time both, interleaved, after checking that they read the same values."""
    expected = size.expected()
    order = {name: position for position, name in enumerate(expected)}
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in expected.items()}
    slices = [AdapterSlice(name, tensor, expected[name], (0, 0)) for name, tensor in tensors.items()]
    theirs, ours, watch = directory / "theirs.safetensors", directory / "ours.safetensors", Stopwatch()
    loaded: dict[str, torch.Tensor] = {}
    mapped: list[tuple[TensorSpec, memoryview]] = []
    for _ in range(repeats):
        loaded, mapped = {}, []
        for path in (theirs, ours):
            path.unlink(missing_ok=True)
        os.sync()  # or the last round's pages go to the disk in the midst of this one
        gc.collect()
        with watch("save_file"):
            save_file(tensors, theirs)
        with watch("encode"):
            shard = encode(slices, order, rank=size.rank, alpha=size.rank, encoding="bf16", aliases=False)
        gc.collect()
        with watch("write"):
            write(ours, shard)
        gc.collect()
        with watch("load_file"):
            loaded = load_file(theirs)
        gc.collect()
        with watch("map"):
            mapped = map_tensors(ours, specs(expected))
    for spec, content in mapped:
        found = torch.frombuffer(bytearray(content), dtype=torch.bfloat16).view(spec.shape)
        assert torch.equal(found.view(torch.int16), loaded[spec.name].view(torch.int16)), spec.name
    return watch


def write(path: Path, shard: EncodedShard) -> None:
    """What a publisher hands to a store, to a file."""
    with path.open("xb", buffering=0) as file:
        for part in in_parts(shard.chunks()):
            for chunk in part:
                rest = chunk
                while len(rest):
                    rest = rest[file.write(rest) :]


def map_tensors(path: Path, promised: list[TensorSpec]) -> list[tuple[TensorSpec, memoryview]]:
    """Every tensor as a view of the mapped file."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return all_tensors(memoryview(mapped), key=str(path), promised=promised)
