"""What became of a version after its commit: pinned, unpinned, collected. An append-only log of numbered objects.

    fates/{version}/000001.json    {"fate": "pinned", "by": ..., "reason": ..., "at": ...}
    fates/{version}/000002.json    {"fate": "unpinned", ...}
    fates/{version}/000003.json    {"fate": "collected", ..., "digest": the manifest's}

Promises: entries are put if absent at the number after the last, so of a pin and a collection that meet one wins, and
both know which; the last entry is the fate that counts; `collected` is the last for ever. Nothing is ever deleted here.
Guards against: a pin that returns while a collector that looked just before deletes the version.

A race, worked through: the log of version 7 ends at 1, unpinned. A person's pin and a collector both read that, both
write number 2. The collector's stands. The pin is told so, reads the log again, finds `collected`, and says that the
version is gone.
"""

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from shared import strict_json
from shared.errors import Corrupt, StoreError, UsageError
from shared.layout import Layout, version_of
from shared.store import Store
from shared.versions import Version

if TYPE_CHECKING:
    from shared.catalog import Catalog

MAX_FATE_BYTES = 100_000
MAX_TRIES = 100  # of one decision; each lost one means that somebody else's was written


class Fate(Enum):
    """What an entry says."""

    PINNED = "pinned"
    UNPINNED = "unpinned"
    COLLECTED = "collected"


@dataclass(frozen=True)
class Entry:
    """One entry of a version's log. `at` (Unix seconds, by the writer's clock) and `by` are for people."""

    n: int
    fate: Fate
    by: str
    reason: str
    at: float
    digest: str = ""  # of the manifest that was collected; empty if it could not be read

    def to_bytes(self) -> bytes:
        body: dict[str, Any] = {"fate": self.fate.value, "by": self.by, "reason": self.reason, "at": self.at}
        return strict_json.dumps(body | ({"digest": self.digest} if self.digest else {}))


def resolve(catalog: "Catalog", fates: "Fates", text: str) -> Version:
    """A version as a person writes it; one that was collected is told apart from one that never was.

    Raises:
        UsageError: no such version, or not the name of one.
    """
    try:
        return catalog.resolve(text)
    except UsageError:
        if "-" not in text:
            raise
        version = Version.parse(text)
        last = fates.last(version)
        if last is None or last.fate is not Fate.COLLECTED:
            raise
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(last.at))
        problem = f"{version} was collected on {when} by {last.by}: its data is gone"
        raise UsageError(problem, op="find version", hint="lorasync versions shows what is there") from None


class Fates:
    """One adapter's logs. Keeps no state; every method may be called from any thread."""

    def __init__(self, store: Store, layout: Layout, *, by: str = "", clock: Callable[[], float] = time.time) -> None:
        self._store, self._layout, self._clock = store, layout, clock
        self._by = by or socket.gethostname()

    def logged(self) -> dict[Version, int]:
        """The versions that have a log, and the number of its last entry: one listing."""
        last: dict[Version, int] = {}
        for entry in self._store.list(self._layout.fates):
            if (version := version_of(entry.key)) and (n := self._number(version, entry.key)):
                last[version] = max(n, last.get(version, 0))
        return last

    def entry(self, version: Version, n: int) -> Entry:
        """One entry.

        Raises:
            Corrupt: not an entry of a log.
        """
        key = self._layout.fate(version, n)
        body = strict_json.load_object(self._store.get(key, MAX_FATE_BYTES), key=key, max_bytes=MAX_FATE_BYTES)
        try:
            fate, at = Fate(body["fate"]), float(body["at"])
            return Entry(n, fate, str(body["by"]), str(body["reason"]), at, str(body.get("digest", "")))
        except (LookupError, TypeError, ValueError) as error:
            raise Corrupt(f"malformed fate: {error!r}", op="read fate", key=key, version=str(version)) from error

    def last(self, version: Version) -> Entry | None:
        """The entry that counts, or None: one listing and one read."""
        folder = self._layout.fate(version, 0).rsplit("/", 1)[0]
        n = max((self._number(version, entry.key) for entry in self._store.list(folder)), default=0)
        return self.entry(version, n) if n else None

    def pin(self, version: Version, reason: str = "") -> bool:
        """Keep a version whatever the retention rule says.

        Returns:
            False if it was pinned already.

        Raises:
            UsageError: it was collected.
        """
        return self._decide(version, Fate.PINNED, reason, unless=Fate.PINNED)

    def unpin(self, version: Version, reason: str = "") -> bool:
        """Leave a version to the retention rule again.

        Returns:
            False if it was not pinned.

        Raises:
            UsageError: it was collected.
        """
        return self._decide(version, Fate.UNPINNED, reason, unless=Fate.UNPINNED)

    def collect(self, version: Version, reason: str, digest: str = "") -> bool:
        """Decide that a version goes, for good.

        Returns:
            True if its fate is `collected` now, by us or by another collector; False if it is pinned.
        """
        for _ in range(MAX_TRIES):
            last = self.last(version)
            if last and last.fate in (Fate.COLLECTED, Fate.PINNED):
                return last.fate is Fate.COLLECTED
            if self._append(version, last, Fate.COLLECTED, reason, digest):
                return True
        raise self._contended(version)

    def _decide(self, version: Version, fate: Fate, reason: str, *, unless: Fate) -> bool:
        for _ in range(MAX_TRIES):
            last = self.last(version)
            if last and last.fate is Fate.COLLECTED:
                problem = f"{version} was collected by {last.by}"
                raise UsageError(problem, op=f"write fate {fate.value}", hint="lorasync versions shows what is there")
            if (last.fate if last else Fate.UNPINNED) is unless:
                return False
            if self._append(version, last, fate, reason):
                return True
        raise self._contended(version)

    def _append(self, version: Version, last: Entry | None, fate: Fate, reason: str, digest: str = "") -> bool:
        entry = Entry((last.n if last else 0) + 1, fate, self._by, reason, self._clock(), digest)
        return self._store.put_if_absent(self._layout.fate(version, entry.n), entry.to_bytes())

    def _contended(self, version: Version) -> StoreError:
        problem = f"others kept writing its fate, {MAX_TRIES} times"
        return StoreError(problem, op="write fate", version=str(version), retryable=True)

    def _number(self, version: Version, key: str) -> int:
        """An entry's number; 0 for a key that is not this version's entry."""
        name = key.rsplit("/", 1)[-1].removesuffix(".json")
        n = int(name) if name.isdecimal() else 0
        return n if key == self._layout.fate(version, n) else 0
