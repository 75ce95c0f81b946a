"""How many groups may be begun now, so that none is too stale when the trainer takes it.

AReaL's rule (https://arxiv.org/abs/2505.24298, section 5.1): with staleness bound eta and batches of B groups, sampling
under version v may go on until (eta + v + 1) B groups exist. Here a version holds N steps, so B is N times
`prompts_per_step`, and "v B" is what the trainer had taken when it published the version that is served, which its
manifest says. That stays right when a restarted trainer goes back to a checkpoint. Groups that the trainer dropped as
too stale are not counted as existing.

What exists is known from listings: every few seconds of the newest versions' trajectories, and once a minute of all,
which grow with the run: files of versions that nobody serves any more come late if at all. The more files a listing
shows, the longer the next one waits, so that what a fleet asks grows with its size and not with its square. A node's
own files are counted as they are put. So a lone node's count is always exact, and in a fleet each node learns a little
late what the others put, as it does of what they have running.
"""

import math
import threading
import time
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any

from shared.config import TrainConfig
from shared.layout import Layout, groups_of, version_of
from shared.manifest import Manifest
from shared.status import number
from shared.store import Store

LIST_EVERY_S = 2.0
LIST_ALL_EVERY_S = 60.0
OPEN_VERSIONS = 8  # the newest that have trajectories: others get more seldom if ever
PAGE = 1000  # keys that one request to an object store lists; each is followed by `list_every_s`


@dataclass(frozen=True)
class Groups:
    """Counts of groups in one adapter's life."""

    produced: int  # put into the store, by any node
    running: int  # begun by this node, not yet put
    taken: int  # by the trainer, when it published the served version
    dropped: int  # by the trainer, until now


def capacity(groups: Groups, train: TrainConfig, max_concurrent: int) -> int:
    """Groups that may be begun now, never negative."""
    per_version = train.prompts_per_step * train.publish_every
    allowed = groups.taken + groups.dropped + (train.max_staleness + 1) * per_version
    return max(0, min(max_concurrent - groups.running, allowed - groups.produced - groups.running))


def taken_when_published(manifest: Manifest, progress: Mapping[str, Any] | None) -> int:
    """What the trainer had taken when it published this version.

    A trainer that never publishes again (`--frozen`) says so in its progress; then what it has taken by now counts,
    or sampling would stop at the first bound.
    """
    if progress and progress.get("frozen"):
        return int(number(progress.get("taken_groups")) or 0)
    return int(manifest.training.get("taken_groups", 0))


def trajectory_key(layout: Layout, manifest: Manifest, node: str, life: str, sequence: int, groups: int) -> str:
    """The key of a trajectory file; it carries the number of its groups, so that a listing counts them."""
    return f"{layout.trajectories(manifest.version)}/{node}-{life}-{sequence:06d}-g{groups}.parquet"


class ProducedGroups:
    """Counts the groups that any node ever put. May be used from any thread.

    Args:
        list_every_s: how late another node's files may be counted, for each PAGE of them; those of older versions,
            LIST_ALL_EVERY_S at least.
    """

    def __init__(
        self,
        store: Store,
        layout: Layout,
        list_every_s: float = LIST_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._layout, self._list_every_s, self._clock = store, layout, list_every_s, clock
        self._lock = threading.Lock()
        self._closed, self._after = 0, ""  # groups in files before this key, by the last listing of all
        self._open = 0  # groups in files after it, by the last listing
        self._list_at = self._list_all_at = clock()
        self._own: set[str] = set()  # keys that no listing showed

    def add(self, key: str) -> None:
        """Count a file that this node has put."""
        with self._lock:
            self._own.add(key)

    def count(self) -> int:
        """Groups known to exist, after a listing where one is due.

        Raises:
            StoreError: the listing failed; the next call lists again.
        """
        now = self._clock()
        if now >= self._list_at:
            is_due = now >= self._list_all_at
            after = "" if is_due else self._after
            keys = {entry.key for entry in self._store.list(self._layout.all_trajectories, after)}
            with self._lock:
                if is_due:
                    self._after = self._oldest_open(keys)
                    self._closed = sum(groups_of(key) for key in keys if key <= self._after)
                    self._list_all_at = now + max(LIST_ALL_EVERY_S, self._pause_s(len(keys)))
                newest = [key for key in keys if key > self._after]
                self._open, self._list_at = sum(map(groups_of, newest)), now + self._pause_s(len(newest))
                self._own -= keys
        with self._lock:
            return self._closed + self._open + sum(map(groups_of, self._own))

    def _pause_s(self, keys: int) -> float:
        """How long to wait after a listing of so many keys."""
        return self._list_every_s * max(1, math.ceil(keys / PAGE))

    def _oldest_open(self, keys: Set[str]) -> str:
        """The key after which the files of the newest OPEN_VERSIONS lie."""
        versions = sorted({version for key in keys if (version := version_of(key))})
        return self._layout.trajectories(versions[-OPEN_VERSIONS:][0]) if versions else ""
