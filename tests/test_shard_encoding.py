"""Encoding joins hundreds of slices in one call of torch: the bytes are those of encoding them one by one."""

import random
from operator import attrgetter

import pytest
import torch

from publisher import shard
from publisher.convert import AdapterSlice
from publisher.shard import ENCODINGS, encode

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXTREMES = (2.0**-140, 2.0**-126, 1.0, 1.0, 2.0**100)


@pytest.mark.parametrize("at_once", [1, 7, 1000])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("alpha", [2, 3, 4, 8])
def test_the_bytes_are_those_of_every_slice_scaled_and_converted_alone(monkeypatch, at_once, encoding, alpha):
    monkeypatch.setattr(shard, "SLICES_AT_ONCE", at_once)
    slices = _slices(random.Random(1), torch.Generator().manual_seed(1))
    factor = alpha / 4 if alpha != 3 else 1.0
    alone = [_alone(piece, factor, ENCODINGS[encoding][0]) for piece in sorted(slices, key=attrgetter("name"))]
    shuffled = random.Random(2).sample(slices, len(slices))
    order = {name: position for position, name in enumerate(sorted(piece.name for piece in slices))}
    found = encode(shuffled, order, rank=4, alpha=alpha, encoding=encoding, aliases=False)
    assert bytes(found.content) == b"".join(alone)
    assert [piece.tensor for piece in found.slices] == list(order)


def _slices(chance: random.Random, generator: torch.Generator) -> list[AdapterSlice]:
    """Of every dtype and stride, some of them parameters, with values at the edges of the exponent."""
    slices = []
    for number in range(60):
        height, width = chance.randint(1, 9), chance.randint(1, 9)
        values = torch.randn(height + 1, width + 1, generator=generator) * chance.choice(EXTREMES)
        values = values.clamp(-30_000, 30_000).to(chance.choice(DTYPES)).requires_grad_(chance.random() < 0.5)
        tensor = values[1:, 1:] if chance.random() < 0.5 else values[1:, 1:].contiguous()
        if chance.random() < 0.3:
            tensor = tensor.t()
        slices.append(
            AdapterSlice(f"{number:02d}.lora_{chance.choice('AB')}.weight", tensor, tuple(tensor.shape), (0, 0))
        )
    return slices


def _alone(piece: AdapterSlice, factor: float, dtype: torch.dtype) -> bytes:
    place = torch.empty(piece.shape, dtype=dtype)
    torch.mul(piece.tensor.detach(), factor if ".lora_B." in piece.name else 1.0, out=place)
    return place.view(torch.uint8).numpy().tobytes()
