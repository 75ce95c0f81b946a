"""How many groups may be begun now, so that none is too stale when the trainer takes it.

AReaL's rule (https://arxiv.org/abs/2505.24298, section 5.1): with staleness bound eta and batches of B groups, sampling
under version v may go on until (eta + v + 1) B groups exist. Here a version holds N steps, so B is N times
`prompts_per_step`, and "v B" is what the trainer had taken when it published the version that is served, which its
manifest says. That stays right when a restarted trainer goes back to a checkpoint. Groups that the trainer dropped as
too stale are not counted as existing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shared.config import TrainConfig
from shared.layout import Layout
from shared.manifest import Manifest
from shared.store import Store


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
        return int(progress["taken_groups"])
    return int(manifest.training.get("taken_groups", 0))


def trajectory_key(layout: Layout, manifest: Manifest, node: str, life: str, sequence: int, groups: int) -> str:
    """The key of a trajectory file; it carries the number of its groups, so that a listing counts them."""
    return f"{layout.trajectories(manifest.version)}/{node}-{life}-{sequence:06d}-g{groups}.parquet"


def groups_of(key: str) -> int:
    """The number of groups that a trajectory file's key promises; 0 for a key of another form."""
    digits = key.removesuffix(".parquet").rpartition("-g")[2]
    return int(digits) if digits.isdigit() else 0


def produced_groups(store: Store, layout: Layout) -> int:
    """Groups that any node ever put: one listing."""
    return sum(groups_of(entry.key) for entry in store.list(f"{layout.adapter}/trajectories"))
