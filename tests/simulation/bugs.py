"""Deliberate bugs: each patches the product while its `with` runs, and must be found, as the promise that it breaks.

with BUGS["commit-without-fence"].planted():
    result, stage = run_seed(7)
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

from greenlet import getcurrent

import publisher.collect
import publisher.commit
import rollout.agent
import rollout.delivery
import shared.transfer
from publisher.retention import Rule
from rollout.watch import Watcher
from shared.fates import Fates

from . import invariants, keepers, sabotage, trainers


@dataclass(frozen=True)
class Bug:
    """One bug: what it does, which promise it breaks, and the patches that plant it."""

    name: str
    does: str
    breaks: type[invariants.Invariant]
    patches: Callable[[], sabotage.Patches]

    @contextlib.contextmanager
    def planted(self) -> Iterator[None]:
        """The product has the bug while the block runs."""
        with contextlib.ExitStack() as stack:
            for patch in self.patches():
                stack.enter_context(patch)
            yield


ALL = [
    Bug(
        "epoch-forgotten",
        "an engine's name for a version has its number only, so a later epoch's is taken for loaded",
        invariants.NeverTornOrMixed,
        lambda: [
            mock.patch.object(rollout.delivery, "served_name", lambda adapter, v: f"{adapter}@0001-{v.number:06d}")
        ],
    ),
    Bug(
        "hint-trusted",
        "a reader takes what LATEST says, be it older",
        invariants.NeverOlderThanSeen,
        lambda: [
            mock.patch.object(Watcher, "look", sabotage.hint_alone),
            mock.patch.object(rollout.agent, "decide", sabotage.any_other),
        ],
    ),
    Bug(
        "digest-unchecked",
        "parts are taken as they come",
        invariants.NeverUnverified,
        lambda: [mock.patch.object(shared.transfer, "_demand_digest", lambda *_: None)],
    ),
    Bug(
        "record-before-shard",
        "a rank puts its record before its shard is durable",
        invariants.NoAcknowledgedVersionLost,
        lambda: [sabotage.on_altered(trainers, "put_shard", sabotage.record_first)],
    ),
    Bug(
        "commit-of-some-ranks",
        "a commit takes the records that are there",
        invariants.NoAcknowledgedVersionLost,
        lambda: [
            mock.patch.object(publisher.commit, "read_records", sabotage.records_that_are_there),
            mock.patch.object(publisher.commit, "demand_complete", lambda *_: None),
        ],
    ),
    Bug(
        "retention-one-short",
        "the collector keeps one version fewer than the rule says",
        invariants.NoAcknowledgedVersionLost,
        lambda: [mock.patch.object(Rule, "newest", property(lambda rule: rule.max_staleness + 1))],
    ),
    Bug(
        "commit-without-fence",
        "a commit does not ask whether a later epoch was claimed",
        invariants.OneWinner,
        lambda: [mock.patch.object(publisher.commit, "demand_unfenced", lambda *_, **__: None)],
    ),
    Bug(
        "claim-overwrites",
        "an epoch is claimed by a plain put",
        invariants.OneWinner,
        lambda: [sabotage.on_altered(trainers, "claim_epoch", sabotage.overwriting)],
    ),
    Bug(
        "commit-overwrites",
        "a manifest is written by a plain put",
        invariants.OneWinner,
        lambda: [sabotage.on_altered(trainers, "commit", sabotage.overwriting)],
    ),
    Bug(
        "lost-reply-is-a-loss",
        "a put-if-absent whose answer is lost counts as another's win",
        invariants.OneWinner,
        lambda: [sabotage.on_altered(trainers, "commit", sabotage.ambiguous_is_lost)],
    ),
    Bug(
        "data-before-void",
        "the collector deletes data, then voids the manifest",
        invariants.NothingInUseDeleted,
        sabotage.data_before_void,
    ),
    Bug(
        "leases-listed-once",
        "the collector does not look at the leases again after the void",
        invariants.NothingInUseDeleted,
        sabotage.leases_listed_once,
    ),
    Bug(
        "host-clock",
        "the collector takes ages on its host's clock",
        invariants.NothingInUseDeleted,
        lambda: [mock.patch.object(publisher.collect, "store_now", lambda *_: getcurrent().clock())],
    ),
    Bug(
        "fates-ignored",
        "the collector does not care for pins",
        invariants.NothingInUseDeleted,
        sabotage.fates_ignored,
    ),
    Bug(
        "fates-overwritten",
        "a fate is written by a plain put, so a pin and a collection that meet both count",
        invariants.NothingInUseDeleted,
        lambda: [mock.patch.object(Fates, "_append", sabotage.fate_put)],
    ),
    Bug(
        "orphans-without-void",
        "the collector deletes an orphan's data and leaves its name free for a late committer",
        invariants.NothingInUseDeleted,
        sabotage.orphans_without_void,
    ),
    Bug(
        "rollback-marks-late",
        "a rollback marks the data that it uses after its commit",
        invariants.NothingInUseDeleted,
        lambda: [sabotage.on_altered(keepers, "roll_back", sabotage.marker_late)],
    ),
    Bug(
        "lists-once",
        "a reader lists when it starts, and relies on the hint from then on",
        invariants.EveryoneArrives,
        lambda: [mock.patch.object(Watcher, "_list", sabotage.list_once)],
    ),
    Bug(
        "own-victims-alone",
        "a collector does not finish what a killed one began",
        invariants.EveryoneArrives,
        sabotage.own_victims_alone,
    ),
]
BUGS = {bug.name: bug for bug in ALL}
