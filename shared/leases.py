"""A reader says which versions it is using, so that no collector deletes them under it.

    with lease.holding({version}):              # first ...
        manifest = catalog.manifest(version)    # ... then this; a void there means that it expired
        fetch(...)

Promises: what was taken before the manifest was read stays until the lease is released, or has not been renewed for
`ttl_s` (its reader is dead or cut off). Ages are counted on the store's own clock, against a probe written just now, so
no host's clock matters; the reader itself only counts seconds since its last write.
Does not: protect who takes no lease; a version that is gone in mid-download is looked for again. Who may only read does
without, is told once, and tries again every `ttl_s`.

Every set of versions is a new object, `leases/{holder}-{n}.json`; renewals write the same bytes over the same one. A
write that timed out may still be carried out later. Under one name it would then stand over its successor, and the
versions that were added since would look unused; under names that are never reused it is a lease too many, and lapses.
"""

import contextlib
import functools
import logging
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from shared import strict_json
from shared.catalog import at_once
from shared.errors import Corrupt, KeyMissing, StoreError, UsageError
from shared.layout import Layout
from shared.store import Entry, Store
from shared.versions import Version

log = logging.getLogger(__name__)

TTL_S = 300.0
MAX_TTL_S = 3600.0  # an older lease has lapsed, whatever it says
FORGET_AFTER_S = 86400.0  # its reader is long dead: its object may go
RENEWALS = 3  # in ttl_s
GRAIN_S = 5.0  # of a store's times: S3 tells whole seconds, and its servers' clocks differ a little
MAX_LEASE_BYTES = 100_000
MAX_LOOKS = 10  # for leases that moved before they were read; each reads only what the ones before had not listed


class Lease:
    """One reader's lease. Costs one PUT in ttl_s / RENEWALS while nothing changes; any thread may call.

    Args:
        holder: names the reader in reports. A life of it adds its own letters, so two of one name don't disturb.
        ttl_s: for how long it holds without being renewed.
        clock: seconds that never step back.
    """

    def __init__(
        self,
        store: Store,
        layout: Layout,
        holder: str,
        ttl_s: float = TTL_S,
        *,
        life: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0 < ttl_s <= MAX_TTL_S:
            raise UsageError(f"a lease of {ttl_s} s; at most {MAX_TTL_S:.0f}", op="take lease")
        self._store, self._layout, self._ttl_s, self._clock = store, layout, ttl_s, clock
        self._holder = f"{holder}-{life or uuid.uuid4().hex[:8]}"
        self._lock = threading.Lock()
        self._versions: frozenset[Version] = frozenset()  # what the object says
        self._n = self._used = 0  # the object's number, and the last one that was ever tried
        self._written_at = 0.0
        self._refused_at: float | None = None  # by a store that takes no leases from us, last

    @property
    def versions(self) -> frozenset[Version]:
        """What is held."""
        return self._versions

    def take(self, versions: Collection[Version]) -> None:
        """Hold these versions and no others. Nothing is written while they are held already and fresh.

        Versions that are no longer wanted are let go at the next renewal: that is early enough.

        Raises:
            StoreError: the store failed; what was held before is still held.
        """
        with self._lock:
            wanted = frozenset(versions)
            if self._barred():
                return
            if not wanted:
                self._release()
            elif not wanted <= self._versions or (self._due() and wanted != self._versions):
                self._write_anew(wanted)
            else:
                self._renew()

    def renew(self) -> None:
        """Hold what is held for longer, if it is time.

        Raises:
            StoreError: the store failed; call again.
        """
        with self._lock:
            self._renew()

    def release(self) -> None:
        """Hold nothing.

        Raises:
            StoreError: the store failed; the lease will lapse by itself.
        """
        with self._lock:
            self._release()

    @contextlib.contextmanager
    def holding(self, versions: Collection[Version]) -> Iterator[None]:
        """Hold these versions while the block runs, however long it takes.

        Raises:
            StoreError: the store failed; nothing is held.
        """
        self.take(versions)
        try:
            with self.kept():
                yield
        finally:
            with contextlib.suppress(StoreError):  # it lapses
                self.release()

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Renew from a thread as long as the block runs, for whoever has no loop to do it in."""
        ended = threading.Event()

        def keep() -> None:
            while not ended.wait(self._ttl_s / RENEWALS / 2):
                try:
                    self.renew()
                except StoreError as error:
                    log.warning("lease %s not renewed: %s", self._holder, error)

        thread = threading.Thread(target=keep, name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _barred(self) -> bool:
        """Whether we were refused a moment ago. A refusal may pass (credentials are renewed), so it is asked again."""
        return self._refused_at is not None and self._clock() - self._refused_at < self._ttl_s

    def _due(self) -> bool:
        return self._clock() - self._written_at >= self._ttl_s / RENEWALS

    def _renew(self) -> None:
        if self._versions and self._due() and not self._barred():
            self._put(self._n, self._versions)

    def _write_anew(self, versions: frozenset[Version]) -> None:
        """Another object, then away with the one before: in between, both count."""
        before, held = self._n, bool(self._versions)
        self._used += 1
        self._put(self._used, versions)
        if held and self._refused_at is None:
            try:
                self._store.delete(self._layout.lease(self._holder, before))
            except StoreError as error:
                log.info("lease %s-%d left to lapse: %s", self._holder, before, error)

    def _put(self, n: int, versions: frozenset[Version]) -> None:
        began = self._clock()
        body = {"holder": self._holder, "versions": sorted(map(str, versions)), "ttl_s": self._ttl_s}
        try:
            self._store.put(self._layout.lease(self._holder, n), strict_json.dumps(body))
        except StoreError as error:
            if error.retryable:
                raise
            if self._refused_at is None:
                log.warning("the store takes no lease from us, reading without: %s", error)
            self._refused_at = began
            return
        if self._refused_at is not None:
            log.info("lease %s taken, which was refused before", self._holder)
        self._n, self._versions, self._written_at, self._refused_at = n, versions, began, None

    def _release(self) -> None:
        if self._versions:
            self._versions = frozenset()
            self._store.delete(self._layout.lease(self._holder, self._n))


@dataclass(frozen=True)
class Leased:
    """Who uses what, at one moment. An unreadable lease counts for every version: nobody knows what it was for."""

    holders_of: Mapping[Version, tuple[str, ...]]
    unreadable: tuple[str, ...] = ()
    lapsed: tuple[Entry, ...] = ()

    def holders(self, version: Version) -> tuple[str, ...]:
        return (*self.holders_of.get(version, ()), *self.unreadable)


def read_leases(store: Store, layout: Layout, now: float) -> Leased:
    """The leases that are live, whoever moves between two objects while we look: a listing, and a read of each.

    An object that is gone when it is read was left for another, which the next listing has. What was read is not read
    again, for an object's bytes never change: so a fleet that moves all the time is read to the end.

    Args:
        now: from `store_now`, taken before this is called.

    Raises:
        StoreError: the store failed, or its leases would not stand still.
    """
    known: dict[str, _Said] = {}
    for _ in range(MAX_LOOKS):
        entries = store.list(layout.leases)
        young = [entry.key for entry in entries if now - entry.modified <= MAX_TTL_S + GRAIN_S]
        missing = False
        for said in at_once(functools.partial(_read, store), [key for key in young if key not in known]):
            if said is None:
                missing = True
            else:
                known[said.key] = said
        if not missing:
            return _leased(entries, known, now)
    raise StoreError(
        f"leases moved during each of {MAX_LOOKS} looks", op="read leases", key=layout.leases, retryable=True
    )


@dataclass(frozen=True)
class _Said:
    """What a lease's object says; None where it can't be read."""

    key: str
    versions: tuple[Version, ...] | None
    ttl_s: float


def _read(store: Store, key: str) -> _Said | None:
    """One object; None if it is gone."""
    try:
        body = strict_json.load_object(store.get(key, MAX_LEASE_BYTES), key=key, max_bytes=MAX_LEASE_BYTES)
        return _Said(key, tuple(Version.parse(text) for text in body["versions"]), float(body["ttl_s"]))
    except KeyMissing:
        return None
    except (Corrupt, LookupError, TypeError, ValueError, UsageError):
        return _Said(key, None, MAX_TTL_S)


def _leased(entries: Iterable[Entry], known: Mapping[str, _Said], now: float) -> Leased:
    holders: dict[Version, tuple[str, ...]] = {}
    unreadable, lapsed = [], []
    for entry in entries:
        name = entry.key.rsplit("/", 1)[-1].removesuffix(".json")
        said = known.get(entry.key)
        if said is None or now - entry.modified > said.ttl_s + GRAIN_S:
            lapsed.append(entry)
        elif said.versions is None:
            unreadable.append(f"unreadable lease {name!a}")
        else:
            for version in said.versions:
                holders[version] = (*holders.get(version, ()), name.rpartition("-")[0])
    return Leased(holders, tuple(unreadable), tuple(lapsed))


def store_now(store: Store, layout: Layout) -> float:
    """The time by the store's own clock, in Unix seconds: that of an object written just now. Three requests."""
    key = f"{layout.probes}/clock-{uuid.uuid4().hex}"
    store.put(key, b"now")
    try:
        entries = store.list(layout.probes, after=key[:-1])
    finally:
        with contextlib.suppress(StoreError):
            store.delete(key)
    for entry in entries:
        if entry.key == key:
            return entry.modified
    raise StoreError("an object written just now is not listed", op="read the store's clock", key=key)
