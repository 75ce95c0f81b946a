"""Takes trajectories from the store: within the staleness bound, in a fixed order, each group exactly once.

A group is admissible when every token of it was made by a version that the policy descends from, at most
`max_staleness` numbers ago; others are dropped and counted, and so are groups that break the rules. What was decided is
the intake's position: it goes into the checkpoint, so a resumed trainer decides about the same groups again that the
lost steps had taken, and never about those that the checkpoint has seen.

Order is by key, that is by version, then node, then sequence: the oldest of those seen first, so that as few as
possible grow stale. The store is looked at only while too few groups wait. What is remembered and what is listed is
bounded: below the `floor`, the lowest number that is not stale yet, files are neither opened nor kept apart, and their
groups are one sum; keys sort by version, so a look lists what may still count, and once a minute everything, for what
came late. (Samplers may count on that: late groups are dropped, and counted, within the minute.)
Does not: delete trajectories. When retention removes a file, its decision is forgotten with it.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from publisher.lineage import Lineage
from shared.errors import Corrupt, KeyMissing, LorasyncError, StoreError, UsageError
from shared.layout import Layout, groups_of, version_of
from shared.outage import Outage
from shared.store import Store, check_key
from shared.trajectories import MAX_FILE_BYTES, Sample, decode
from shared.versions import Version

log = logging.getLogger(__name__)

SUFFIX = ".parquet"
LIST_ALL_EVERY_S = 60.0


@dataclass(frozen=True)
class Rules:
    """What a group must be for the model to train on it."""

    group_size: int
    vocab_size: int
    max_tokens: int  # prompt and completion

    def problem(self, samples: Sequence[Sample]) -> str | None:
        """Say what is wrong with a group, or None."""
        if len(samples) != self.group_size:
            return f"{len(samples)} completions, not {self.group_size}"
        for sample in samples:
            length = len(sample.prompt_tokens) + len(sample.tokens)
            if not sample.prompt_tokens or not sample.tokens or length > self.max_tokens:
                return f"{length} tokens; 1 + 1 to {self.max_tokens} fit"
            if not all(0 <= token < self.vocab_size for token in sample.prompt_tokens + sample.tokens):
                return f"a token outside the vocabulary of {self.vocab_size}"
            if not all(math.isfinite(value) for value in (sample.reward, *sample.logprobs)):
                return "a reward or log-probability that is not finite"
        return None


@dataclass(frozen=True)
class Group:
    """All completions of one prompt, where they lie, and how old they are: the lowest number among their versions."""

    samples: tuple[Sample, ...]
    key: str
    index: int  # within the file
    oldest: int


@dataclass
class Position:
    """What was decided so far.

    Attributes:
        decided: per file at or above the floor, the groups taken or dropped; None once that is all of them.
        floor: number of the oldest versions that may still be taken; never falls, whatever the configuration becomes.
        below: groups in files below the floor, all of them decided.
        taken, dropped: groups in all; dropped by reason.
    """

    decided: dict[str, list[int] | None] = field(default_factory=dict)
    floor: int = 0
    below: int = 0
    taken: int = 0
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def consumed(self) -> int:
        """Groups taken or dropped: what samplers may count as no longer outstanding."""
        return self.taken + sum(self.dropped.values())

    def to_json(self) -> dict[str, Any]:
        """A copy, which does not change when the position does."""
        decided = {key: None if indexes is None else list(indexes) for key, indexes in self.decided.items()}
        sums = {"floor": self.floor, "below": self.below, "taken": self.taken}
        return {"decided": decided, **sums, "dropped": dict(self.dropped)}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> "Position":
        floor, below, taken = (int(body[name]) for name in ("floor", "below", "taken"))
        return cls(dict(body["decided"]), floor, below, taken, dict(body["dropped"]))


class Intake:
    """One adapter's trajectories as a queue of groups.

    intake = Intake(store, layout, lineage, rules, max_staleness=1)
    groups = intake.take(32, current=Version(1, 4), timeout_s=600.0)
    """

    def __init__(
        self,
        store: Store,
        layout: Layout,
        lineage: Lineage,
        rules: Rules,
        *,
        max_staleness: int,
        position: Position | None = None,
        poll_interval_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store, self._layout, self._lineage, self._rules = store, layout, lineage, rules
        self._max_staleness, self._poll_interval_s = max_staleness, poll_interval_s
        self._clock, self._wait = clock, wait
        self.position = position or Position()
        self._files: dict[str, int] = {}  # opened: key -> number of groups in it
        self._waiting: list[Group] = []
        self._after, self._before = "", 0  # a look lists what sorts after this key; groups in files before it
        self._listed_all_at: float | None = None
        self._outage = Outage("intake", clock)

    @property
    def store_failures(self) -> int:
        """Looks that the store failed and that were tried again."""
        return self._outage.failures

    def take(
        self,
        count: int,
        current: Version,
        timeout_s: float,
        heartbeat: Callable[[], None] = lambda: None,
    ) -> list[Group]:
        """Wait for `count` admissible groups and take them.

        Args:
            current: the version of the policy that will be trained on them.
            timeout_s: how long to wait without a new group that can be taken.
            heartbeat: called at every look; what it raises ends the wait.

        Raises:
            LorasyncError: nothing that can be taken came for `timeout_s`; says what is known of the rollout fleet.
            StoreError: the store refuses for good.
        """
        self._drop_unfit(current)
        here, arrived_at = len(self._waiting), self._clock()
        while len(self._waiting) < count:
            try:
                self._look(current)
            except StoreError as error:
                self._outage.failed(error)
            else:
                self._outage.answered()
            self._drop_unfit(current)
            if len(self._waiting) >= count:
                break
            if len(self._waiting) > here:
                here, arrived_at = len(self._waiting), self._clock()
            heartbeat()
            if self._clock() - arrived_at > timeout_s:
                raise self._stalled(count, current, timeout_s)
            self._wait(self._poll_interval_s)
        taken = self._waiting[:count]
        for group in taken:
            self._decide(group)
        self.position.taken += count
        return taken

    def _look(self, current: Version) -> None:
        """Open the files that came since the last look."""
        listed, before = self._list(current)
        self._forget_deleted(listed)
        listed -= self._close(listed, before)
        done = {key for key, indexes in self.position.decided.items() if indexes is None}
        for key in sorted(listed - self._files.keys() - done):
            try:
                samples = decode(self._store.get(check_key(key), MAX_FILE_BYTES), key=key)
            except KeyMissing:
                continue
            except (Corrupt, UsageError) as error:  # a store may list what our keys don't allow: "copy of x.parquet"
                log.warning("intake: dropped a file: %s", error)
                self._count("corrupt", groups_of(key) or 1)
                self.position.decided[key] = None
                continue
            self._open(key, samples)
        self._waiting.sort(key=lambda group: (group.key, group.index))

    def _list(self, current: Version) -> tuple[set[str], int]:
        """The files, and how many groups those hold that were not asked for: all of numbers below the floor."""
        position, now = self.position, self._clock()
        position.floor = max(position.floor, current.number - self._max_staleness)
        is_due = self._listed_all_at is None or now - self._listed_all_at >= LIST_ALL_EVERY_S
        entries = self._store.list(self._layout.all_trajectories, "" if is_due else self._after)
        listed = {entry.key for entry in entries if _is_ours(entry.key)}
        if not is_due:
            return listed, self._before
        versions = {version for key in listed if (version := version_of(key)) and version.number >= position.floor}
        self._after = self._layout.trajectories(min((self._lineage.oldest(position.floor), *versions)))
        self._before = sum(groups_of(key) for key in listed if key < self._after)
        self._listed_all_at = now
        return listed, 0

    def _open(self, key: str, samples: Sequence[Sample]) -> None:
        """Queue a file's groups that are not decided yet, dropping those that break the rules."""
        by_name: dict[str, list[Sample]] = {}
        for sample in samples:
            by_name.setdefault(sample.group, []).append(sample)
        self._files[key] = len(by_name)
        decided = set(self.position.decided.get(key) or [])
        for index, group_samples in enumerate(by_name.values()):
            if index in decided:
                continue
            # The file's version too: what stands below the floor must be stale.
            oldest = min(_number(key), *(v.number for sample in group_samples for v in sample.token_versions))
            group = Group(tuple(group_samples), key, index, oldest)
            self._waiting.append(group)
            if problem := self._rules.problem(group_samples):
                log.warning("intake: dropped group=%s key=%s: %s", group_samples[0].group, key, problem)
                self._decide(group)
                self._count("malformed")

    def _drop_unfit(self, current: Version) -> None:
        """Drop what the policy does not descend from, and what has grown too old."""
        for group in list(self._waiting):
            versions = {version for sample in group.samples for version in sample.token_versions}
            if not all(self._lineage.includes(version) and version.number <= current.number for version in versions):
                self._decide(group)
                self._count("not_an_ancestor")
            elif staleness(group, current) > self._max_staleness:
                self._decide(group)
                self._count("stale")

    def _decide(self, group: Group) -> None:
        """Note that a group is taken or dropped."""
        self._waiting.remove(group)
        indexes = self.position.decided.setdefault(group.key, [])
        if indexes is not None:
            indexes.append(group.index)
            if len(indexes) == self._files[group.key]:
                self.position.decided[group.key] = None

    def _count(self, reason: str, groups: int = 1) -> None:
        """Count dropped groups, all that a file's key promises: samplers count them as existing until then."""
        self.position.dropped[reason] = self.position.dropped.get(reason, 0) + groups

    def _close(self, listed: set[str], before: int) -> set[str]:
        """The files below the floor, once it has risen: what is undecided in them is stale, and their names can go.

        Args:
            before: groups in files below the floor that are not listed.
        """
        position = self.position
        below = {key for key in listed if _number(key) < position.floor}
        for key in below & position.decided.keys():
            indexes = position.decided.pop(key)
            position.below += groups_of(key) if indexes is None else len(indexes)
            self._files.pop(key, None)
        there = before + sum(map(groups_of, below))
        if there > position.below:
            self._count("stale", there - position.below)
        position.below = there
        return below

    def _forget_deleted(self, listed: set[str]) -> None:
        for key in self.position.decided.keys() - listed:
            if key not in self._files or self.position.decided[key] is None:
                del self.position.decided[key]

    def _stalled(self, count: int, current: Version, timeout_s: float) -> LorasyncError:
        nodes = [entry.key.rsplit("/", 1)[-1].removesuffix(".json") for entry in self._store.list(self._layout.nodes)]
        known = f"nodes that ever reported: {', '.join(nodes)}" if nodes else "no rollout node has ever reported"
        dropped = ", ".join(f"{number} {reason}" for reason, number in self.position.dropped.items()) or "none"
        return LorasyncError(
            f"no new trajectories for {timeout_s:.0f} s: the rollout fleet is stalled"
            f" ({len(self._waiting)} of {count} groups here, {known}, dropped so far: {dropped})",
            op="take trajectories",
            version=str(current),
            hint="Check that a rollout node runs on this store and serves this version: lorasync status",
            retryable=True,
        )


def staleness(group: Group, current: Version) -> int:
    """How many versions old the oldest token is."""
    return current.number - group.oldest


def _number(key: str) -> int:
    """The number of the version that a trajectory file lies under."""
    version = version_of(key)
    return version.number if version else 0


def _is_ours(key: str) -> bool:
    return key.endswith(SUFFIX) and version_of(key) is not None
