"""What must hold after every step. Each class is one promise; a broken one is recorded with its name and ends the seed.

"After every step" costs nothing where nothing changed: a promise is asked at each event that could break it, in the
very step of the event (a write, a deletion, an acknowledgement, an activation).
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from publisher.epochs import Claim
from shared.coverage import demand_complete
from shared.errors import Corrupt
from shared.layout import version_of
from shared.manifest import PART_BYTES, VOID, Manifest
from shared.versions import Version

from .adapters import EXPECTED, Tensors
from .facts import LAYOUT, Facts, attempt_of
from .sim_store import Object


@dataclass(frozen=True)
class Violation:
    """A broken promise."""

    invariant: str
    problem: str


TOLD_S = 1.0  # by how much the store's word on an object's time may be off: S3 tells whole seconds


@dataclass(frozen=True)
class Rules:
    """Retention as the collector was told, in versions and seconds of the store's clock."""

    keep_versions: int
    keep_s: float
    orphan_s: float


class Invariant:
    """One promise; overrides the events that could break it."""

    def __init__(self, facts: Facts, rules: Rules, broken: Callable[[Violation], None]) -> None:
        self.facts, self.rules, self._broken = facts, rules, broken

    def refuse(self, problem: str) -> None:
        """Record that the promise is broken."""
        self._broken(Violation(type(self).__name__, problem))

    def before_write(self, key: str, before: Object | None, after: Object) -> None: ...

    def deleted(self, key: str, before: Object) -> None: ...

    def claimed(self, author: str, claim: Claim) -> None: ...

    def acknowledged(self, author: str, manifest: Manifest, asked_at: float) -> None: ...

    def fenced(self, author: str, version: Version) -> None: ...

    def activated(self, reader: str, manifest: Manifest, tensors: Tensors, flipped: bool) -> None: ...

    def pinned(self, version: Version) -> None: ...


class NeverTornOrMixed(Invariant):
    """I1: what a reader activates is bit-equal to what was submitted as exactly that version (or as its source)."""

    def activated(self, reader: str, manifest: Manifest, tensors: Tensors, flipped: bool) -> None:
        if not flipped and tensors != self.facts.tensors(manifest.version):
            self.refuse(f"{reader} serves {manifest.version} with other bytes than were submitted")


class NeverOlderThanSeen(Invariant):
    """I2: a reader's activated version only grows.

    A reader that restarts begins with nothing seen and is held to it all the same: a listing shows all that was ever
    committed. `gave_up` has the versions that a reader put into quarantine; falling back from those is its own choice.
    """

    def __init__(self, facts: Facts, rules: Rules, broken: Callable[[Violation], None]) -> None:
        super().__init__(facts, rules, broken)
        self.highest: dict[str, Version] = {}
        self.gave_up: dict[str, frozenset[Version]] = {}

    def activated(self, reader: str, manifest: Manifest, tensors: Tensors, flipped: bool) -> None:
        highest = self.highest.get(reader)
        if highest and manifest.version < highest and highest not in self.gave_up.get(reader, ()):
            self.refuse(f"{reader} serves {manifest.version} after {highest}")
        self.highest[reader] = manifest.version


class NeverUnverified(Invariant):
    """I3: bytes that were damaged on their way are never activated."""

    def activated(self, reader: str, manifest: Manifest, tensors: Tensors, flipped: bool) -> None:
        if flipped and tensors != self.facts.tensors(manifest.version):
            self.refuse(f"{reader} serves {manifest.version} with a flipped bit")


class NoAcknowledgedVersionLost(Invariant):
    """I4: a commit names bytes that are there, and all; a committed version goes only when the retention rule says so.

    The rule: not pinned, at least `keep_versions` newer ones stand, and older than `keep_s` on the store's clock.
    """

    def before_write(self, key: str, before: Object | None, after: Object) -> None:
        version = version_of(key)
        if not key.startswith(f"{LAYOUT.manifests}/") or version is None:
            return
        if after.content == VOID:
            if before is not None and before.content != VOID:
                self._demand_entitled(version)
        elif before is None:
            self._demand_whole(Manifest.parse(after.content, key=key))

    def deleted(self, key: str, before: Object) -> None:
        if key.startswith(f"{LAYOUT.manifests}/") and before.content != VOID:
            self.refuse(f"the manifest of {version_of(key)} was deleted")

    def acknowledged(self, author: str, manifest: Manifest, asked_at: float) -> None:
        version = manifest.version
        if version not in self.facts.committed:
            self.refuse(f"{author} was told that {version} is committed, and no manifest was ever there")

    def _demand_whole(self, manifest: Manifest) -> None:
        for shard in manifest.shards:
            found = self.facts.bucket.objects.get(shard.key)
            if found is None or _parts(found.content) != shard.parts:
                self.refuse(f"{manifest.version} was committed without {shard.key}")
        try:
            demand_complete(manifest, EXPECTED)
        except Corrupt as error:
            self.refuse(f"{manifest.version} was committed in part: {error}")

    def _demand_entitled(self, version: Version) -> None:
        newer = sum(other > version for other in self.facts.standing())
        age_s = self.facts.now - self.facts.committed_at[version]
        fate = self.facts.fates[version][-1:]
        if newer < self.rules.keep_versions:
            self.refuse(f"{version} was collected with {newer} newer ones, {self.rules.keep_versions} are kept")
        elif age_s < self.rules.keep_s - TOLD_S:
            self.refuse(f"{version} was collected {age_s:.1f} s old, {self.rules.keep_s} s are kept")
        elif fate != ["collected"]:
            self.refuse(f"{version} was collected, its fate is {fate}")


class OneWinner(Invariant):
    """I5: an epoch is claimed by one, a version's name is won by one, and a fenced trainer is told so.

    A commit that began after a later epoch's claim stood on the store is never acknowledged. Who is told "fenced" was
    overtaken, or its version's name holds a void: an answer that was lost makes no loser of a winner. (That no reader
    takes (E, *) after (E + 1, *) is NeverOlderThanSeen, for versions are ordered as pairs.)
    """

    def __init__(self, facts: Facts, rules: Rules, broken: Callable[[Violation], None]) -> None:
        super().__init__(facts, rules, broken)
        self.owners: dict[int, str] = {}

    def claimed(self, author: str, claim: Claim) -> None:
        owner = self.owners.setdefault(claim.epoch, author)
        if owner != author:
            self.refuse(f"epoch {claim.epoch} was won by {owner} and by {author}")

    def before_write(self, key: str, before: Object | None, after: Object) -> None:
        if key.startswith(f"{LAYOUT.manifests}/") and before is not None and before.content != after.content:
            if after.content != VOID:
                self.refuse(f"{version_of(key)} was committed over what stood there")
        elif key.startswith(f"{LAYOUT.epochs}/") and before is not None and before.content != after.content:
            self.refuse(f"{key} was claimed over another's claim")

    def acknowledged(self, author: str, manifest: Manifest, asked_at: float) -> None:
        version = manifest.version
        digest = self.facts.acknowledged.setdefault(version, manifest.digest)
        if digest != manifest.digest:
            self.refuse(f"{version} was acknowledged with two digests")
        later = [epoch for epoch, at in self.facts.claimed_at.items() if epoch > version.epoch and at < asked_at]
        if later:
            self.refuse(f"{author} was told that {version} is committed, asked after epoch {later[0]} was claimed")

    def fenced(self, author: str, version: Version) -> None:
        overtaken = any(epoch > version.epoch for epoch in self.facts.claimed_at)
        if not overtaken and version not in self.facts.voided:
            self.refuse(f"{author} was told that it is fenced at {version}, and nobody overtook it")


class NothingInUseDeleted(Invariant):
    """I6: no data goes of a version whose manifest stands, that is pinned or leased; nor of a young attempt.

    A lease counts if it was there before the manifest was read and has not lapsed on the store's clock since. A pin is
    final against the collector: whoever of the two wrote first into the version's fates. Data of a version that was
    rolled back to are in use by the newer version.
    """

    def before_write(self, key: str, before: Object | None, after: Object) -> None:
        version = version_of(key)
        if key.startswith(f"{LAYOUT.fates}/") and version:
            fates = self.facts.fates[version]
            if before is not None:
                self.refuse(f"{key} was written over")
            if fates[-1:] == ["pinned"] and b'"collected"' in after.content:
                self.refuse(f"{version} was given to the collector while pinned")
        elif key.startswith(f"{LAYOUT.manifests}/") and version and before is None and after.content == VOID:
            self._demand_abandoned(version)

    def deleted(self, key: str, before: Object) -> None:
        if not key.startswith(f"{LAYOUT.data}/"):
            return
        for version in self.facts.users.get(attempt_of(key), ()):
            reason = self.facts.in_use(version)
            if reason:
                self.refuse(f"{key} was deleted, and {version} is in use: {reason}")
        name = version_of(key)
        if name and name not in self.facts.committed and name not in self.facts.voided:
            self.refuse(f"{key} was deleted, and {name} may still be committed")

    def pinned(self, version: Version) -> None:
        if "collected" in self.facts.fates[version]:
            self.refuse(f"a pin of {version} was acknowledged, and the collector has it")

    def _demand_abandoned(self, version: Version) -> None:
        """It counts what the collector could see when it looked, so a rank that wakes up at this moment is too late."""
        quiet_s = self.facts.longest_quiet_s(version)
        if quiet_s < self.rules.orphan_s - TOLD_S:
            self.refuse(f"the attempt at {version} was voided, quiet for {quiet_s:.1f} s, not {self.rules.orphan_s}")


class EveryoneArrives(Invariant):
    """I7: when faults stop, readers reach the latest in a few polls, and the collector leaves what the rule says.

    Asked once, at the end (world.py): nothing that is kept is missing, and nothing else is left.
    """


ALL = (
    NeverTornOrMixed,
    NeverOlderThanSeen,
    NeverUnverified,
    NoAcknowledgedVersionLost,
    OneWinner,
    NothingInUseDeleted,
    EveryoneArrives,
)


def _parts(content: bytes) -> tuple[str, ...]:
    starts = range(0, len(content), PART_BYTES)
    return tuple(hashlib.sha256(content[start : start + PART_BYTES]).hexdigest() for start in starts)
