"""The commit protocol: shard, then record, then, once every rank's record is there, the manifest. No collective.

    rank r:  put data/{version}/{attempt}/rank-r.safetensors      durable before ...
             put data/{version}/{attempt}/rank-r.json             ... its record says so
             list the records; all of them there?  build the manifest from them, put it if absent
             overwrite LATEST

The manifest is a function of the records and of what every rank knows alike (rank 0's record carries the rest: training
metrics and canary), so several ranks may race to put it: they write the same bytes.
A death before the manifest leaves an attempt that no reader sees. A death after it leaves a stale LATEST, which the
readers' listing makes good.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from publisher.epochs import Claim, demand_unfenced
from publisher.shard import EncodedSlice, digest, shard_bytes, shard_chunks
from shared import strict_json
from shared.base_model import BaseIdentity
from shared.coverage import demand_complete
from shared.errors import Corrupt, Fenced
from shared.layout import Layout
from shared.manifest import (
    MAX_MANIFEST_BYTES,
    Canary,
    LoraShape,
    Manifest,
    Parent,
    Shard,
    Slice,
    Tensor,
    canary_from_json,
)
from shared.peft_config import peft_config
from shared.store import Store
from shared.versions import Version


@dataclass(frozen=True)
class Heading:
    """What a version is, apart from its bytes. Ranks agree on all but `training` and `canary`, where rank 0's count."""

    adapter: str
    version: Version
    parent: Parent | None
    base: BaseIdentity
    base_name: str
    lora: LoraShape
    parallel: Mapping[str, int]
    encoding: str
    training: Mapping[str, Any]
    canary: Canary | None


@dataclass(frozen=True)
class Rank:
    """This process among those that hold the adapter."""

    index: int = 0
    world: int = 1


def put_shard(
    store: Store,
    layout: Layout,
    claim: Claim,
    heading: Heading,
    rank: Rank,
    pieces: Sequence[EncodedSlice],
    aliases: Mapping[str, str],
) -> None:
    """Put this rank's shard and, when it is durable, its record. A lone rank without aliases puts a PEFT directory."""
    attempt = layout.attempt(heading.version, claim.nonce)
    plain = rank.world == 1 and not aliases
    name = "adapter_model" if plain else f"rank-{rank.index:05d}-of-{rank.world:05d}"
    key = f"{attempt}/{name}.safetensors"
    store.put_stream(key, shard_chunks(pieces), shard_bytes(pieces))
    if rank.index == 0:
        store.put(f"{attempt}/adapter_config.json", peft_config(heading.lora, heading.base_name))
    record = {
        "rank": rank.index,
        "world": rank.world,
        "shard": asdict(digest(key, shard_chunks(pieces))),
        "slices": [
            {
                "tensor": piece.tensor,
                "name": piece.name,
                "dtype": piece.dtype,
                "shape": piece.shape,
                "global_shape": piece.global_shape,
                "offset": piece.offset,
            }
            for piece in pieces
        ],
        "aliases": dict(aliases),
    }
    if rank.index == 0:
        record["training"] = dict(heading.training)
        record["canary"] = asdict(heading.canary) if heading.canary else None
    store.put(_record(layout, claim, heading.version, rank.index), strict_json.dumps(record))


def missing_ranks(store: Store, layout: Layout, claim: Claim, version: Version, world: int) -> list[int]:
    """The ranks whose record of an attempt is not there: one listing."""
    there = {entry.key for entry in store.list(layout.attempt(version, claim.nonce))}
    return [rank for rank in range(world) if _record(layout, claim, version, rank) not in there]


def read_records(
    store: Store, layout: Layout, claim: Claim, version: Version, world: int
) -> list[dict[str, Any]] | None:
    """The records of an attempt in rank order, or None while some are missing: until then it costs one listing."""
    if missing_ranks(store, layout, claim, version, world):
        return None
    keys = [_record(layout, claim, version, rank) for rank in range(world)]
    return [strict_json.load_object(store.get(key), key=key, max_bytes=MAX_MANIFEST_BYTES) for key in keys]


def build_manifest(heading: Heading, records: Sequence[Mapping[str, Any]]) -> Manifest:
    """The manifest that these records, in rank order, make: a pure function.

    Raises:
        Corrupt: two records disagree about a tensor.
    """
    kinds: dict[str, tuple[str, tuple[int, int]]] = {}
    slices: dict[str, list[Slice]] = {}
    aliases: dict[str, str] = {}
    shards = []
    for number, record in enumerate(records):
        aliases.update(record["aliases"])
        shards.append(Shard(**{**record["shard"], "parts": tuple(record["shard"]["parts"])}))
        for piece in record["slices"]:
            name, kind = piece["tensor"], (piece["dtype"], _pair(piece["global_shape"]))
            if kinds.setdefault(name, kind) != kind:
                raise Corrupt(f"ranks disagree about {name}", op="commit", version=str(heading.version))
            where = Slice(number, piece["name"], _pair(piece["offset"]), _pair(piece["shape"]))
            slices.setdefault(name, []).append(where)
    return Manifest(
        adapter=heading.adapter,
        version=heading.version,
        parent=heading.parent,
        base=heading.base,
        lora=heading.lora,
        parallel=heading.parallel,
        encoding=heading.encoding,
        shards=tuple(shards),
        tensors={name: Tensor(*kinds[name], tuple(pieces)) for name, pieces in slices.items()},
        aliases=aliases,
        training=records[0]["training"],
        canary=canary_from_json(records[0]["canary"]),
    )


def commit(
    store: Store,
    layout: Layout,
    claim: Claim,
    heading: Heading,
    world: int,
    expected: Mapping[str, tuple[int, int]],
) -> Manifest | None:
    """Commit a version if every rank's record is there.

    Returns:
        The committed manifest, or None while records are missing.

    Raises:
        Fenced: a later epoch was claimed, or this version's name holds another life's manifest.
        Corrupt: the version is not whole; nothing is committed.
    """
    records = read_records(store, layout, claim, heading.version, world)
    if records is None:
        return None
    manifest = build_manifest(heading, records).sealed()
    demand_complete(manifest, expected)
    demand_unfenced(store, layout, claim.epoch, op="commit")
    if not store.put_if_absent(layout.manifest(heading.version), manifest.to_bytes()):
        raise Fenced(
            f"{heading.version} is committed with other bytes", op="commit", key=layout.manifest(heading.version)
        )
    hint = {"epoch": heading.version.epoch, "version": heading.version.number, "digest": manifest.digest}
    store.put(layout.latest, strict_json.dumps(hint))
    return manifest


def _record(layout: Layout, claim: Claim, version: Version, rank: int) -> str:
    return f"{layout.attempt(version, claim.nonce)}/rank-{rank:05d}.json"


def _pair(value: Sequence[int]) -> tuple[int, int]:
    rows, columns = value
    return rows, columns
