"""The collector: what the retention rule lets go, goes, in steps of which each may be the last.

    choose     read the store, decide (publisher.retention)          nothing written but the clock's probe
    mark       fates/: `collected`. From here on it is final: a pin that comes later is refused
    void       a void over the manifest. From here on no reader begins to use the version
    (wait)     for who reads without a lease
    sweep      list voids, then leases and rollbacks, then delete the data of voids that nobody uses

Promises: what is pinned, leased, used by a rollback, or among the newest is never deleted. A reader takes its lease
before it reads the manifest, and leases are read after the void was listed: so either the reader found the void, or
the collector finds the lease. A collector that is killed anywhere is finished by the next one; two at once do each
other's work and no harm; nothing is written for what is done already.
Attempts that died before their manifest get their void by put-if-absent: their late committer loses to it, or wins.
Does not: touch receipts, evaluations, trajectories and fates, which are small and tell the history, nor checkpoints,
which the trainer keeps itself. Voids stay for ever: 24 bytes each.
"""

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from publisher.retention import Decision, Rollback, Rule, Seen, Stored, decide, unneeded
from shared import strict_json
from shared.catalog import Catalog
from shared.errors import Corrupt, KeyMissing
from shared.fates import Fate, Fates
from shared.layout import rollback_of, version_of
from shared.leases import FORGET_AFTER_S, read_leases, store_now
from shared.manifest import MAX_MANIFEST_BYTES, VOID
from shared.store import is_key
from shared.versions import Version

log = logging.getLogger(__name__)

GRACE_S = 10.0
LEFTOVER_AFTER_S = 86400.0  # of unfinished writes: a large upload may take hours, and S3 tells when it began


@dataclass(frozen=True)
class Plan:
    """What `choose` saw and decided."""

    seen: Seen
    decision: Decision

    @property
    def leftover(self) -> tuple[Version, ...]:
        """Void versions whose data is still there and used by nobody: a killed collector's."""
        seen = self.seen
        return tuple(unneeded(seen.void, seen.leased, seen.rollbacks, seen.stored))

    def bytes(self, versions: Collection[Version]) -> int:
        """What lies on the store for these versions."""
        return sum(self.seen.stored[version].bytes for version in versions if version in self.seen.stored)


@dataclass(frozen=True)
class Swept:
    """What `sweep` deleted, and what it left because somebody uses it."""

    versions: tuple[Version, ...] = ()
    bytes: int = 0
    objects: int = 0
    in_use: tuple[Version, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What one collection did.

    Attributes:
        collected: versions that got their void now.
        orphans: attempts that did.
        leftovers: unfinished writes that were removed.
    """

    plan: Plan
    collected: tuple[Version, ...] = ()
    orphans: tuple[Version, ...] = ()
    swept: Swept = field(default_factory=Swept)
    leftovers: int = 0


def collect(
    catalog: Catalog,
    fates: Fates,
    rule: Rule,
    *,
    grace_s: float = GRACE_S,
    sleep: Callable[[float], None] = time.sleep,
    leftovers: bool = True,
) -> Outcome:
    """All steps, one after another.

    Args:
        leftovers: look for what killed processes left, too. On a directory that is a walk through everything.

    Raises:
        StoreError: the store failed. Nothing is lost by it: the next collection goes on.
    """
    plan = choose(catalog, fates, rule)
    marked = mark(catalog, fates, plan.decision.collect)
    orphans = void(catalog, marked, plan.decision.orphans)
    if marked or orphans or plan.leftover:
        sleep(grace_s)
        swept = sweep(catalog)
    else:
        swept = Swept()
    removed = _remove_leftovers(catalog, plan.seen) if leftovers else 0
    return Outcome(plan, marked, orphans, swept, removed)


def choose(catalog: Catalog, fates: Fates, rule: Rule) -> Plan:
    """Read the store and decide. Writes nothing but the clock's probe.

    Five listings, a read per live lease, and one per committed version that was ever pinned.
    """
    now = store_now(catalog.store, catalog.layout)
    committed, voids = _named(catalog)
    logged = fates.logged()
    seen = Seen(
        now=now,
        committed=committed,
        void=voids,
        fates={version: _fate(fates, version, logged[version]) for version in sorted(committed.keys() & logged.keys())},
        leased=read_leases(catalog.store, catalog.layout, now),
        rollbacks=_rollbacks(catalog),
        stored=_stored(catalog),
    )
    return Plan(seen, decide(seen, rule))


def mark(catalog: Catalog, fates: Fates, versions: Collection[Version]) -> tuple[Version, ...]:
    """Write the fate `collected` of each, unless it has it; those that were pinned meanwhile are left.

    Returns:
        The versions whose fate it is.
    """
    return tuple(v for v in versions if fates.collect(v, "retention", _digest(catalog, v)))


def void(catalog: Catalog, marked: Collection[Version], orphans: Collection[Version] = ()) -> tuple[Version, ...]:
    """Put a void over the manifests of marked versions, and at the names of orphans that still have none.

    Returns:
        The orphans that got one. The others were committed meanwhile.
    """
    for version in marked:
        catalog.store.put(catalog.layout.manifest(version), VOID)
    return tuple(v for v in orphans if catalog.store.put_if_absent(catalog.layout.manifest(v), VOID))


def sweep(catalog: Catalog) -> Swept:
    """Delete the data of every void that nobody uses. The order of the reads is what makes it safe: see the module."""
    now = store_now(catalog.store, catalog.layout)
    _, voids = _named(catalog)
    leased, rollbacks = read_leases(catalog.store, catalog.layout, now), _rollbacks(catalog)
    stored = _stored(catalog)
    gone = unneeded(voids, leased, rollbacks, stored)
    for version in gone:
        for key in stored[version].keys:
            catalog.store.delete(key)
        log.info("collected data version=%s bytes=%d", version, stored[version].bytes)
    return Swept(
        versions=tuple(gone),
        bytes=sum(stored[version].bytes for version in gone),
        objects=sum(len(stored[version].keys) for version in gone),
        in_use=tuple(sorted(voids & (stored.keys() - set(gone)))),
    )


def _remove_leftovers(catalog: Catalog, seen: Seen) -> int:
    """Remove what killed processes left, and say how many unfinished writes that were."""
    removed = catalog.store.sweep(catalog.layout.adapter, LEFTOVER_AFTER_S)
    forget_leases(catalog, seen)
    forget_probes(catalog, seen.now)
    return removed


def forget_leases(catalog: Catalog, seen: Seen) -> None:
    """Delete leases that lapsed long ago. Their holders never write under these names again."""
    for entry in seen.leased.lapsed:
        if seen.now - entry.modified > FORGET_AFTER_S and is_key(entry.key):
            catalog.store.delete(entry.key)


def forget_probes(catalog: Catalog, now: float) -> None:
    """Delete what killed processes left of their tests of the store and of its clock."""
    for entry in catalog.store.list(catalog.layout.probes):
        if now - entry.modified > LEFTOVER_AFTER_S and is_key(entry.key):
            catalog.store.delete(entry.key)


def _named(catalog: Catalog) -> tuple[dict[Version, float], frozenset[Version]]:
    """Committed versions and when, and voids: one listing."""
    committed, voids = {}, set()
    for entry in catalog.store.list(catalog.layout.manifests):
        version = version_of(entry.key)
        if version and entry.size == len(VOID):
            voids.add(version)
        elif version:
            committed[version] = entry.modified
    return committed, frozenset(voids)


def _stored(catalog: Catalog) -> dict[Version, Stored]:
    """What lies under data/: one listing. What somebody else put there under a name that is no key of ours stays."""
    found: dict[Version, Stored] = {}
    nothing = Stored((), 0, 0.0)
    for entry in catalog.store.list(catalog.layout.data):
        if (version := version_of(entry.key)) and is_key(entry.key):
            had = found.get(version, nothing)
            newest = max(had.newest_at, entry.modified)
            found[version] = Stored((*had.keys, entry.key), had.bytes + entry.size, newest)
    return found


def _rollbacks(catalog: Catalog) -> tuple[Rollback, ...]:
    """Every marker: one listing."""
    entries = catalog.store.list(catalog.layout.rollbacks)
    found = ((rollback_of(entry.key), entry.modified) for entry in entries)
    return tuple(Rollback(*pair, marked_at) for pair, marked_at in found if pair)


def _fate(fates: Fates, version: Version, n: int) -> Fate | None:
    """The last fate; None if it can't be read, and then nobody touches the version."""
    try:
        return fates.entry(version, n).fate
    except Corrupt as error:
        log.warning("version=%s is kept: %s", version, error)
        return None


def _digest(catalog: Catalog, version: Version) -> str:
    """What a manifest calls its own digest, unchecked: for the fate's entry. A damaged one may go like any other."""
    key = catalog.layout.manifest(version)
    try:
        content = catalog.store.get(key, MAX_MANIFEST_BYTES)
        return str(strict_json.load_object(content, key=key, max_bytes=MAX_MANIFEST_BYTES).get("digest", ""))
    except (Corrupt, KeyMissing):
        return ""
