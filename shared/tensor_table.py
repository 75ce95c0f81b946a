"""The manifest's table of tensors: which slice of which shard holds what, and its JSON, fast.

A tensor that is one whole slice of its own name is written short, {"dtype", "shape", "shard"}; any other names its
slices. Each tensor has one form only, so equal tables are equal bytes. A model of 30B parameters has 37,248 tensors:
the text is put together by hand, to the same bytes as `shared.strict_json.dumps` would give.
"""

from collections.abc import Mapping
from json.encoder import encode_basestring as quoted
from typing import Any, NamedTuple

from shared import strict_json
from shared.adapter_files import ITEM_BYTES

MAX_COUNT = 1 << 50
_WHOLE = (0, 0)


class Slice(NamedTuple):
    """A rectangle of a tensor: where it lies (shard number, name inside) and where it belongs (offset)."""

    shard: int
    name: str
    offset: tuple[int, int]
    shape: tuple[int, int]


class Tensor(NamedTuple):
    """A global tensor and the slices that cover it exactly."""

    dtype: str
    shape: tuple[int, int]
    slices: tuple[Slice, ...]


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Canonical JSON."""
    entries = []
    for name in sorted(tensors):
        dtype, shape, slices = tensors[name]
        if len(slices) == 1 and slices[0] == (slices[0].shard, name, _WHOLE, shape):
            rows, columns = shape
            fields = f'{{"dtype":"{dtype}","shape":[{rows},{columns}],"shard":{slices[0].shard}}}'
        else:
            listed = [slice_._asdict() for slice_ in slices]
            fields = strict_json.dumps({"dtype": dtype, "shape": shape, "slices": listed}).decode()
        entries.append(f"{quoted(name)}:{fields}")
    return f"{{{','.join(entries)}}}".encode()


def from_json(body: Mapping[str, Any], shards: int) -> dict[str, Tensor]:
    """The inverse of `to_bytes`, after JSON.

    Args:
        shards: how many there are.

    Raises:
        LookupError, TypeError, ValueError: not of that form.
    """
    tensors: dict[str, Tensor] = {}
    shapes: dict[tuple[int, int], tuple[int, int]] = {}  # a handful, each made once
    for name, entry in body.items():
        dtype, (rows, columns) = entry["dtype"], entry["shape"]
        if dtype not in ITEM_BYTES:
            raise ValueError(f"dtype {dtype!r} of {name}")
        shape = count(rows), count(columns)
        shape = shapes.setdefault(shape, shape)
        if "slices" in entry:
            slices = tuple(
                Slice(count(s["shard"]), text(s["name"]), _pair(s["offset"]), _pair(s["shape"]))
                for s in entry["slices"]
            )
            last = max((slice_.shard for slice_ in slices), default=0)
        else:
            last = count(entry["shard"])
            slices = (Slice(last, name, _WHOLE, shape),)
        if last >= shards:
            raise ValueError(f"{name} lies in a shard that is not listed")
        tensors[name] = Tensor(dtype, shape, slices)
    return tensors


def count(value: Any) -> int:
    """A JSON value that must be a count.

    Raises:
        ValueError: it is none.
    """
    if type(value) is not int or not 0 <= value <= MAX_COUNT:
        raise ValueError("a count that is none")
    return value


def text(value: Any) -> str:
    """A JSON value that must be a text.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, str):
        raise ValueError("a text that is none")
    return value


def _pair(value: Any) -> tuple[int, int]:
    rows, columns = value
    return count(rows), count(columns)
