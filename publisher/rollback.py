"""Going back to an earlier version: a new version of a new epoch that points at the old one's data.

    claim epoch E + 1                              fences the trainer, which would go on from the weights that were bad
    put rollbacks/{origin}/{E + 1, number}.json    from here on no collector deletes the origin's data ...
    read the manifest of the version once more     ... unless its void was there before
    put manifests/{E + 1, number}.json             the rollback itself: every reader takes it, it is the highest
    overwrite LATEST

Promises: history is not rewritten, no data is copied; the new manifest has the old one's bytes, canary and training
metadata, with `rolled_back_to` and a `submitted_at` of its own, and the old version as its parent. A trainer that
starts afterwards goes on from a checkpoint of that version's past (`trainer.life`).
A death in between leaves a trainer that is fenced and a marker that the collector voids in the end; the same command
again goes back after all. A rollback of a rollback uses the data of its origin, whose marker it is.

    rollbacks/{origin}/{new}.json    {"rolled_back_to": "0001-000007", "training": the origin's, "by": ..., "at": ...}
"""

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from publisher.commit import put_hint, put_manifest
from publisher.epochs import claim_epoch, demand_unfenced
from shared import strict_json
from shared.catalog import Catalog
from shared.errors import Corrupt, Fenced, KeyMissing, StoreError, UsageError
from shared.fates import Fate, Fates
from shared.layout import rollback_of, version_of
from shared.manifest import Manifest, Parent
from shared.signing import Seal
from shared.versions import Version

MAX_MARKER_BYTES = 10_000_000


@dataclass(frozen=True)
class RolledBack:
    """A committed rollback, as a trainer needs it.

    Attributes:
        version: of the rollback.
        origin: the version whose weights it has.
        training: the metadata that the origin was published with.
    """

    version: Version
    origin: Version
    training: dict[str, Any]


def demand_target(catalog: Catalog, version: Version) -> Manifest:
    """Check that one can go back to a version; writes nothing.

    Raises:
        UsageError: it is the latest already, was collected, or never was.
        Corrupt: its manifest is damaged.
    """
    newest = catalog.newest()
    if newest is None or version >= newest:
        problem = f"{version} is the latest already" if version == newest else f"no version {version}"
        raise UsageError(problem, op="rollback", hint="lorasync versions shows what is there")
    try:
        return catalog.manifest(version)
    except KeyMissing as error:
        hint = "lorasync versions shows what is there"
        raise UsageError(f"{version} was collected or never published", op="rollback", hint=hint) from error


def origin_of(target: Manifest) -> Version:
    """The version under whose name the data lies: that of the keys, for those are what a collector would delete."""
    return next(filter(None, (version_of(shard.key) for shard in target.shards)), target.version)


def roll_back(
    catalog: Catalog,
    version: Version,
    *,
    by: str = "",
    seal: Seal = Manifest.sealed,
    clock: Callable[[], float] = time.time,
) -> Manifest:
    """Go back to a version. The trainer that runs is fenced, whatever comes of it.

    Args:
        by: who asks, for people; empty: the host.
        seal: gives the manifest its digest, and its signature where the run signs.

    Returns:
        The manifest of the new version.

    Raises:
        UsageError: see `demand_target`; nobody is fenced.
        Fenced: a trainer started meanwhile, and its versions are newer.
        StoreError: the store failed, or the version was collected meanwhile.
    """
    store, layout = catalog.store, catalog.layout
    target = demand_target(catalog, version)
    origin = origin_of(target)
    claim = claim_epoch(store, layout, clock)
    new = Version(claim.epoch, version.number)
    marker = {
        "rolled_back_to": str(version),
        "training": dict(target.training),
        "by": by or socket.gethostname(),
        "at": clock(),
    }
    if not store.put_if_absent(layout.rollback(origin, new), strict_json.dumps(marker)):
        raise Fenced(f"another rollback is called {new}", op="rollback", key=layout.rollback(origin, new))
    try:
        catalog.manifest(version)
    except KeyMissing as error:
        problem = f"{version} was collected just now; the trainer is fenced all the same"
        hint = "Go back to another version, or start the trainer again"
        raise StoreError(problem, op="rollback", version=str(version), hint=hint) from error
    manifest = seal(
        replace(
            target,
            version=new,
            parent=Parent(target.version, target.digest),
            training={**target.training, "rolled_back_to": str(origin), "submitted_at": clock()},
            signature=None,
        )
    )
    demand_unfenced(store, layout, claim.epoch, op="rollback")
    put_manifest(store, layout, manifest)
    demand_unfenced(store, layout, claim.epoch, op="rollback")
    put_hint(store, layout, manifest)
    return manifest


def last_rollback(catalog: Catalog) -> RolledBack | None:
    """The newest rollback that was committed, be it collected since: one listing, and none of more where there is none.

    Raises:
        Corrupt: its marker is damaged.
    """
    markers = []
    for entry in catalog.store.list(catalog.layout.rollbacks):
        if pair := rollback_of(entry.key):
            markers.append((pair[1], pair[0], entry.key))
    for version, origin, key in sorted(markers, reverse=True):
        if _was_committed(catalog, version):
            body = strict_json.load_object(catalog.store.get(key), key=key, max_bytes=MAX_MARKER_BYTES)
            training = body.get("training")
            if not isinstance(training, dict):
                raise Corrupt("malformed marker", op="read rollback", key=key, version=str(version))
            return RolledBack(version, origin, training)
    return None


def _was_committed(catalog: Catalog, version: Version) -> bool:
    """Whether a version is there, or was until it was collected; an orphan's void has no fate."""
    try:
        catalog.manifest(version)
    except KeyMissing:
        last = Fates(catalog.store, catalog.layout).last(version)
        return last is not None and last.fate is Fate.COLLECTED
    except Corrupt:  # it is there, and damaged
        return True
    return True
