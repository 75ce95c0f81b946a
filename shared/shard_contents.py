"""What a shard's bytes say beyond their digests, looked at as they pass: header as promised? every value finite?

The header of a shard as we write it follows from the manifest: equal bytes are a header strictly checked, with nothing
parsed. Another header may be as good (another writer, another order); such a shard is parsed, and looked at again.
"""

import bisect
from collections.abc import Mapping, Sequence

from shared import transfer
from shared.adapter_files import (
    ITEM_BYTES,
    MAX_HEADER_BYTES,
    Placed,
    TensorSpec,
    header_bytes,
    not_finite_at,
    parse_header,
    place,
)
from shared.cycles import collection_paused
from shared.errors import Corrupt
from shared.manifest import Manifest, Shard
from shared.store import Store
from shared.tensor_table import Slice

Shape = tuple[int, int]


class ShardContents:
    """Looks at a shard's bytes in any order, from any thread. Pieces begin and end at multiples of 8, or at its end.

    Args:
        placed: its tensors.
        header: the file's first bytes, if they are not known to be right already.
        data_start: where the data section starts.

    Raises:
        Corrupt: a tensor does not start at a multiple of its values' size.
    """

    def __init__(self, shard: Shard, placed: Sequence[Placed], data_start: int, header: bytes = b"") -> None:
        self._shard, self._placed, self._data_start, self._header = shard, placed, data_start, header
        self._runs: list[tuple[int, int, str]] = []  # of one dtype each
        for (name, dtype, _), start, end in placed:
            if (data_start + start) % ITEM_BYTES[dtype]:
                raise Corrupt(f"tensor {name} is not aligned", op="check values", key=shard.key)
            if self._runs and self._runs[-1][2] == dtype:
                start = self._runs.pop()[0] - data_start
            self._runs.append((data_start + start, data_start + end, dtype))
        self._not_finite: list[int] = []
        data_end = data_start + (placed[-1].end if placed else 0)
        self.as_promised = shard.size == data_end  # and the header is the one that was given, once all was seen

    @classmethod
    @collection_paused()
    def promised(cls, shard: Shard, specs: Sequence[TensorSpec]) -> "ShardContents":
        """Of a shard that should hold these tensors in this order."""
        header = header_bytes(specs)
        return cls(shard, place(specs), len(header), header)

    def look(self, start: int, content: memoryview) -> None:
        """Take note of the bytes at `start`: never of some that are fetched anew, for notes stay."""
        header = self._header[start : start + len(content)]
        if header and header != bytes(content[: len(header)]):
            self.as_promised = False
        for run_start, run_end, dtype in self._runs:
            low, high = max(run_start, start), min(run_end, start + len(content))
            high -= (high - low) % ITEM_BYTES[dtype]  # of an object that was cut short, which its digest will tell
            if low < high:
                at = not_finite_at(dtype, content[low - start : high - start])
                if at is not None:
                    self._not_finite.append(low + at)

    def demand_finite(self) -> None:
        """Check that no NaN or infinity was seen.

        Raises:
            Corrupt: names the tensor.
        """
        if self._not_finite:
            at = min(self._not_finite) - self._data_start
            name = self._placed[bisect.bisect_right(self._placed, at, key=_start) - 1].spec.name
            raise Corrupt(f"NaN or infinity in tensor {name}", op="check values", key=self._shard.key)


@collection_paused()
def promised_tensors(manifest: Manifest, expected: Mapping[str, Shape]) -> list[list[TensorSpec]]:
    """What every shard of a complete version should hold, in wire order.

    Args:
        expected: names in wire order.
    """
    promised: list[list[TensorSpec]] = [[] for _ in manifest.shards]
    for name in expected:
        if name in manifest.tensors:
            dtype, _, slices = manifest.tensors[name]
            for slice_ in sorted(slices, key=_column_and_row) if len(slices) > 1 else slices:
                promised[slice_.shard].append(TensorSpec(slice_.name, dtype, slice_.shape))
    return promised


def demand_same(manifest: Manifest, number: int, promised: Sequence[TensorSpec], found: Sequence[TensorSpec]) -> None:
    """Check that a shard's header tells exactly the promised tensors, in whatever order.

    Raises:
        Corrupt: names the first that differs.
    """
    theirs, ours = ({spec.name: spec for spec in specs} for specs in (promised, found))
    for name in (*theirs, *ours):
        if theirs.get(name) != ours.get(name):
            problem = f"manifest says {theirs.get(name)}, the shard holds {ours.get(name)}"
            key, version = manifest.shards[number].key, str(manifest.version)
            raise Corrupt(problem, op="check shard", key=key, version=version)


def verify_shard(store: Store, manifest: Manifest, number: int, promised: Sequence[TensorSpec]) -> None:
    """Check digests, header and values of a shard where it is stored.

    Raises:
        Corrupt, KeyMissing, StoreError: see `shared.fetch.verify`.
    """
    shard = manifest.shards[number]
    contents = ShardContents.promised(shard, promised)
    transfer.verify(store, shard, look=contents.look)
    if not contents.as_promised:
        length = int.from_bytes(store.get_range(shard.key, 0, 8), "little")
        head = store.get_range(shard.key, 0, 8 + min(length, MAX_HEADER_BYTES + 1))
        placed, data_start = parse_header(head, shard.size, key=shard.key)
        demand_same(manifest, number, promised, [tensor.spec for tensor in placed])
        contents = ShardContents(shard, placed, data_start)
        transfer.verify(store, shard, look=contents.look)
    contents.demand_finite()


def _start(tensor: Placed) -> int:
    return tensor.start


def _column_and_row(slice_: Slice) -> tuple[int, int]:
    row, column = slice_.offset
    return column, row
