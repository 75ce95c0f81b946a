"""Which versions may go, and whose data nobody needs any more? Pure: what was seen in, the decision out.

A version is kept while any of these holds:

    it is one of the newest max(keep_versions, max_staleness + 2), the latest always; keep_versions 0 keeps all
    it is younger than keep_younger_s, by the store's clock
    it is pinned, leased by a reader, or serves a rollback with its data

An attempt (data that no manifest names) is an orphan when its newest object is older than orphan_after_s.
Data of a version whose manifest is a void is needed while the version, or a rollback that uses it, is leased, or such a
rollback is not void itself. `publisher.collect` reads, and does what is decided here.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from shared.config import RetentionConfig
from shared.fates import Fate
from shared.leases import Leased
from shared.versions import Version

MIN_BEYOND_STALENESS = 2  # the version that is being published, and the one that it replaces


@dataclass(frozen=True)
class Rule:
    """What to keep. Ages in seconds."""

    keep_versions: int = 0
    max_staleness: int = 0
    keep_younger_s: float = 0.0
    orphan_after_s: float = 86400.0

    @property
    def newest(self) -> int:
        """How many of the newest versions are kept; 0 for all."""
        return max(self.keep_versions, self.max_staleness + MIN_BEYOND_STALENESS) if self.keep_versions else 0


def rule_of(retention: RetentionConfig, max_staleness: int) -> Rule:
    """The rule that a configuration says."""
    return Rule(retention.keep_versions, max_staleness, retention.keep_younger_s, retention.orphan_after_s)


@dataclass(frozen=True)
class Stored:
    """What lies under data/ for one version."""

    keys: tuple[str, ...]
    bytes: int
    newest_at: float  # the store's clock


@dataclass(frozen=True)
class Rollback:
    """`version` uses the data of `source`, marked at `marked_at` by the store's clock."""

    source: Version
    version: Version
    marked_at: float


@dataclass(frozen=True)
class Seen:
    """One look at an adapter. All times are the store's clock.

    Attributes:
        committed: versions with a manifest, and when it was written.
        void: versions whose manifest is a void.
        fates: the last fate of each committed version that has one; None if it can't be read.
    """

    now: float
    committed: Mapping[Version, float]
    void: frozenset[Version]
    fates: Mapping[Version, Fate | None]
    leased: Leased
    rollbacks: tuple[Rollback, ...]
    stored: Mapping[Version, Stored]


@dataclass(frozen=True)
class Decision:
    """What shall go, and what the rule would let go but something holds.

    Attributes:
        collect: committed versions, ascending; those first that a killed collector had decided about.
        orphans: attempts and rollbacks without a manifest, to be void.
        kept: version -> why.
    """

    collect: tuple[Version, ...]
    orphans: tuple[Version, ...]
    kept: Mapping[Version, str]


def decide(seen: Seen, rule: Rule) -> Decision:
    """Apply the rule."""
    begun = [version for version in sorted(seen.committed) if seen.fates.get(version) is Fate.COLLECTED]
    alive = [version for version in sorted(seen.committed) if version not in set(begun)]
    old = alive[: -rule.newest] if rule.newest else []
    holds = {version: _held(seen, rule, version) for version in old}
    orphans = sorted(_orphans(seen, rule.orphan_after_s))
    collect = [version for version, why in holds.items() if not why]
    return Decision((*begun, *collect), tuple(orphans), {version: why for version, why in holds.items() if why})


def unneeded(
    void: Collection[Version], leased: Leased, rollbacks: Iterable[Rollback], stored: Iterable[Version]
) -> list[Version]:
    """The versions of `stored` whose data may be deleted.

    What is true of a version here stays true: no reader begins to use a void, no rollback begins to use its data.

    Args:
        void: listed before `leased` and `rollbacks` were read.
    """
    users: dict[Version, list[Version]] = {}
    for rollback in rollbacks:
        users.setdefault(rollback.source, []).append(rollback.version)
    gone = {version for version in void if not leased.holders(version)}
    return [version for version in sorted(stored) if gone.issuperset((version, *users.get(version, ())))]


def _held(seen: Seen, rule: Rule, version: Version) -> str:
    """Why an old version is kept, or ""."""
    if seen.now - seen.committed[version] < rule.keep_younger_s:
        return "young"
    if version in seen.fates and seen.fates[version] is None:
        return "its fate can't be read"
    if seen.fates.get(version) is Fate.PINNED:
        return "pinned"
    if holders := seen.leased.holders(version):
        return f"leased by {', '.join(holders)}"
    users = [str(r.version) for r in seen.rollbacks if r.source == version and r.version not in seen.void]
    return f"rolled back to by {', '.join(users)}" if users else ""


def _orphans(seen: Seen, after_s: float) -> set[Version]:
    """What was begun and never committed, and is old."""
    begun = {version: stored.newest_at for version, stored in seen.stored.items()}
    for rollback in seen.rollbacks:
        begun[rollback.version] = max(rollback.marked_at, begun.get(rollback.version, rollback.marked_at))
    named = seen.committed.keys() | seen.void
    return {version for version, at in begun.items() if version not in named and seen.now - at > after_s}
