"""The commit protocol: shard, then record, then, once every rank's record is there, the manifest. No collective.

    rank r:  put data/{version}/{attempt}/rank-r.safetensors      durable before ...
             put data/{version}/{attempt}/rank-r.json             ... its record says so
             list the records; all of them there?  build the manifest from them, put it if absent
             (rank 0 at once, the others only if it has not done so within a grace)
             look at the fence once more, then overwrite LATEST

The manifest is a function of the records and of what every rank knows alike (rank 0's record carries the rest: training
metrics and canary), so several ranks may race to put it: they write the same bytes.
A death before the manifest leaves an attempt that no reader sees, and that the collector (`publisher.collect`) voids
in the end: who comes to commit it after that is told so. A death after it leaves a stale LATEST, which the readers'
listing makes good.
Who was succeeded between its look at the fence and its manifest is told so: the manifest stands, no reader takes it
after the successor's, and LATEST is the successor's.
"""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from publisher.epochs import Claim, demand_unfenced
from publisher.shard import EncodedShard
from shared import strict_json, tensor_table
from shared.base_model import BaseIdentity
from shared.catalog import Catalog
from shared.coverage import demand_complete
from shared.cycles import collection_paused
from shared.errors import Corrupt, Fenced, KeyMissing, StoreError, UsageError
from shared.layout import Layout
from shared.manifest import (
    MAX_MANIFEST_BYTES,
    VOID,
    Canary,
    LoraShape,
    Manifest,
    Parent,
    Shard,
    canary_from_json,
    shard_from_json,
)
from shared.parts import behind, digest, in_parts
from shared.peft_config import peft_config
from shared.signing import Seal
from shared.store import Store
from shared.tensor_table import Slice, Tensor
from shared.versions import Version

GRACE_S = 2.0  # that the other ranks give rank 0
GRACE_LOOKS = 8  # of theirs, whether it is done


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


def put_shard(store: Store, layout: Layout, claim: Claim, heading: Heading, rank: Rank, shard: EncodedShard) -> None:
    """Put this rank's shard and, when it is durable, its record. A lone rank without aliases puts a PEFT directory.

    The parts' digests and the record's table are made while the store takes the bytes: the shard is gone through once.
    """
    attempt = layout.attempt(heading.version, claim.nonce)
    plain = rank.world == 1 and not shard.aliases
    name = "adapter_model" if plain else f"rank-{rank.index:05d}-of-{rank.world:05d}"
    key = f"{attempt}/{name}.safetensors"
    parts = in_parts(shard.chunks())
    size = sum(len(chunk) for part in parts for chunk in part)
    with behind() as threads:
        table = threads.submit(_table, shard, rank.index)
        digests = [threads.submit(digest, part) for part in parts]
        store.put_stream(key, (chunk for part in parts for chunk in part), size)
        stored = Shard(key, size, tuple(made.result() for made in digests))
    if rank.index == 0:
        store.put(f"{attempt}/adapter_config.json", peft_config(heading.lora, heading.base_name))
    record = {
        "rank": rank.index,
        "world": rank.world,
        "shard": asdict(stored),
        "aliases": dict(shard.aliases),
    }
    if rank.index == 0:
        record["training"] = dict(heading.training)
        record["canary"] = asdict(heading.canary) if heading.canary else None
    fields = {name: strict_json.dumps(value) for name, value in record.items()}
    fields["tensors"] = table.result()
    store.put(_record(layout, claim, heading.version, rank.index), strict_json.join(fields))


@collection_paused()
def _table(shard: EncodedShard, number: int) -> bytes:
    """A rank's part of the manifest's table of tensors, as JSON."""
    tensors: dict[str, Tensor] = {}
    for piece in shard.slices:
        slice_ = Slice(number, piece.name, piece.offset, piece.shape)
        before = tensors[piece.tensor].slices if piece.tensor in tensors else ()
        tensors[piece.tensor] = Tensor(piece.dtype, piece.global_shape, (*before, slice_))
    return tensor_table.to_bytes(tensors)


def missing_ranks(store: Store, layout: Layout, claim: Claim, version: Version, world: int) -> list[int]:
    """The ranks whose record of an attempt is not there: one listing."""
    there = {entry.key for entry in store.list(layout.attempt(version, claim.nonce))}
    return [rank for rank in range(world) if _record(layout, claim, version, rank) not in there]


@collection_paused()
def read_records(
    store: Store, layout: Layout, claim: Claim, version: Version, world: int
) -> list[dict[str, Any]] | None:
    """The records of an attempt in rank order, or None while some are missing: until then it costs one listing."""
    if missing_ranks(store, layout, claim, version, world):
        return None
    keys = [_record(layout, claim, version, rank) for rank in range(world)]
    return [strict_json.load_object(store.get(key), key=key, max_bytes=MAX_MANIFEST_BYTES) for key in keys]


@collection_paused()
def build_manifest(heading: Heading, records: Sequence[Mapping[str, Any]]) -> Manifest:
    """The manifest that these records, in rank order, make: a pure function.

    Raises:
        Corrupt: two records disagree about a tensor, or one is malformed.
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    shards = []
    try:
        for record in records:
            aliases.update(record["aliases"])
            shards.append(shard_from_json(record["shard"]))
            for name, tensor in tensor_table.from_json(record["tensors"], len(records)).items():
                known = tensors.setdefault(name, tensor)
                if known[:2] != tensor[:2]:
                    raise Corrupt(f"ranks disagree about {name}", op="commit", version=str(heading.version))
                if known is not tensor:
                    tensors[name] = known._replace(slices=known.slices + tensor.slices)
        training, canary = records[0]["training"], canary_from_json(records[0]["canary"])
    except (LookupError, TypeError, ValueError, AttributeError, UsageError) as error:
        raise Corrupt(f"malformed record: {error!r}", op="commit", version=str(heading.version)) from error
    return Manifest(
        adapter=heading.adapter,
        version=heading.version,
        parent=heading.parent,
        base=heading.base,
        lora=heading.lora,
        parallel=heading.parallel,
        encoding=heading.encoding,
        shards=tuple(shards),
        tensors=tensors,
        aliases=aliases,
        training=training,
        canary=canary,
    )


def commit(
    store: Store,
    layout: Layout,
    claim: Claim,
    heading: Heading,
    world: int,
    expected: Mapping[str, tuple[int, int]],
    *,
    rank: int = 0,
    grace_s: float = GRACE_S,
    wait: Callable[[float], object] = time.sleep,
    seal: Seal = Manifest.sealed,
) -> Manifest | None:
    """Commit a version if every rank's record is there.

    Args:
        rank: ours. Rank 0 goes at once; the others give it a grace, and go only if it has not gone by then.
        grace_s: how long they wait, in seconds.
        wait: waits that long, or less where it is interrupted.
        seal: gives the manifest its digest and signature; by the same key on every rank, for they write the same bytes.

    Returns:
        The committed manifest, or None while records are missing.

    Raises:
        Fenced: a later epoch was claimed, be it while we committed, or this version's name holds another life's
            manifest.
        Corrupt: the version is not whole; nothing is committed.
        StoreError: the store failed, or the attempt was collected as an orphan.
    """
    records = read_records(store, layout, claim, heading.version, world)
    if records is None:
        return None
    manifest = seal(build_manifest(heading, records))
    demand_complete(manifest, expected)
    demand_unfenced(store, layout, claim.epoch, op="commit")
    if rank == 0 or not _committed_by_another(store, layout, manifest, grace_s, wait):
        put_manifest(store, layout, manifest)
    demand_unfenced(store, layout, claim.epoch, op="commit")
    put_hint(store, layout, manifest)
    return manifest


def put_manifest(store: Store, layout: Layout, manifest: Manifest) -> None:
    """Put a manifest under its version's name: the commit itself.

    Raises:
        Fenced: the name holds another life's manifest.
        StoreError: the store failed, or the name holds a collector's void.
    """
    key, version = layout.manifest(manifest.version), str(manifest.version)
    if store.put_if_absent(key, manifest.to_bytes()):
        return
    if store.get(key, MAX_MANIFEST_BYTES) == VOID:
        problem = "the attempt was collected before it was committed"
        hint = "It stood still for longer than retention.orphan_after_s; start the trainer again, in a new epoch"
        raise StoreError(problem, op="commit", key=key, version=version, hint=hint)
    raise Fenced(f"{version} is committed with other bytes", op="commit", key=key)


def put_hint(store: Store, layout: Layout, manifest: Manifest) -> None:
    """Say in LATEST that this version is there."""
    epoch, number = manifest.version
    store.put(layout.latest, strict_json.dumps({"epoch": epoch, "version": number, "digest": manifest.digest}))


def mend_hint(store: Store, layout: Layout) -> None:
    """Point LATEST at the newest version where a publisher that died before it wrote it left it behind.

    Whoever begins to publish does so once: readers that keep to the hint would else wait for their next listing. A
    newest version that cannot be read is left to them.
    """
    catalog = Catalog(store, layout.adapter)
    newest, hint = catalog.newest(), catalog.hint()
    if newest is not None and hint is not None and hint[0] != newest:
        with contextlib.suppress(Corrupt, KeyMissing):
            put_hint(store, layout, catalog.manifest(newest))


def _committed_by_another(
    store: Store, layout: Layout, manifest: Manifest, grace_s: float, wait: Callable[[float], object]
) -> bool:
    """Whether another rank puts these very bytes within the grace."""
    content = manifest.to_bytes()
    for _ in range(GRACE_LOOKS):
        wait(grace_s / GRACE_LOOKS)
        with contextlib.suppress(KeyMissing):
            return store.get(layout.manifest(manifest.version), MAX_MANIFEST_BYTES) == content
    return False


def _record(layout: Layout, claim: Claim, version: Version, rank: int) -> str:
    return f"{layout.attempt(version, claim.nonce)}/rank-{rank:05d}.json"
