"""One version's way over a store, beside a raw copy of the same bytes.

    published   put_shard and commit: the shard and its record are durable, the manifest and LATEST stand
    visible     a reader has read LATEST and got, parsed and checked the manifest
    verified    names, shapes, every part's sha256, the header and every value's finiteness

Without digests is the same with sha256 taken out of it, which only this file can do.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from benchmarks.timing import Stopwatch
from publisher.commit import Heading, Rank, commit, put_shard
from publisher.epochs import Claim, claim_epoch
from publisher.shard import EncodedShard
from shared.base_model import BaseIdentity
from shared.catalog import Catalog
from shared.fetch import verify
from shared.layout import Layout
from shared.manifest import PART_BYTES, LoraShape
from shared.parts import in_parts
from shared.store import Store
from shared.versions import Version

ADAPTER = "policy"
READ_BYTES = 1 << 20


def raw_copy(directory: Path, shard: EncodedShard, watch: Stopwatch) -> None:
    """Write the bytes to a new file in slices of 16 MiB, fsync it, and read it back once with one thread."""
    path = directory / "raw-copy"
    os.sync()
    with watch("raw write"), path.open("xb", buffering=0) as file:
        for part in in_parts(shard.chunks()):
            for chunk in part:
                file.write(chunk)
        os.fsync(file.fileno())
    buffer = bytearray(READ_BYTES)
    with watch("raw read"), path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    path.unlink()


class Publications:
    """Publishes one adapter again and again to one store, in an epoch of its own."""

    def __init__(self, store: Store, rank: int, expected: dict[str, tuple[int, int]]) -> None:
        self._store, self._expected, self._number = store, expected, 0
        self._layout = Layout(ADAPTER)
        self._claim: Claim = claim_epoch(store, self._layout)
        self._lora = LoraShape(rank, rank, rank, ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"))

    def run(self, shard: EncodedShard, watch: Stopwatch, *, digests: bool = True) -> None:
        """One version, and its removal."""
        heading, label = self._heading(), "" if digests else " without digests"
        catalog = Catalog(self._store, ADAPTER)
        os.sync()
        with contextlib.nullcontext() if digests else no_digests():
            with watch(f"published{label}"):
                put_shard(self._store, self._layout, self._claim, heading, Rank(), shard)
                commit(self._store, self._layout, self._claim, heading, 1, self._expected)
            with watch(f"visible{label}"):
                hint = catalog.hint()
                assert hint is not None and hint[0] == heading.version
                manifest = catalog.manifest(heading.version)
            with watch(f"verified{label}"):
                verify(self._store, manifest, self._expected)
        for entry in self._store.list(self._layout.attempt(heading.version, self._claim.nonce)):
            self._store.delete(entry.key)

    def _heading(self) -> Heading:
        self._number += 1
        return Heading(
            adapter=ADAPTER,
            version=Version(self._claim.epoch, self._number),
            parent=None,
            base=BaseIdentity("qwen3_moe", "0" * 64, "0" * 64),
            base_name="base",
            lora=self._lora,
            parallel={"tp": 1},
            encoding="bf16",
            training={"step": self._number},
            canary=None,
        )


class _NoDigest:
    """Takes bytes as `hashlib.sha256` does, and does nothing with them."""

    def __init__(self, _content: Any = b"") -> None:
        return

    def update(self, _content: Any) -> None:
        return

    def hexdigest(self) -> str:
        return "0" * 64


@contextlib.contextmanager
def no_digests() -> Iterator[None]:
    """While it lasts, shards are neither digested nor checked."""
    without = SimpleNamespace(sha256=_NoDigest)
    with mock.patch("shared.parts.hashlib", without), mock.patch("shared.transfer.hashlib", without):
        yield


def parts_of(size: int) -> list[tuple[int, int]]:
    """(start, end) of every part of a shard of this size."""
    return [(start, min(start + PART_BYTES, size)) for start in range(0, size, PART_BYTES)]
