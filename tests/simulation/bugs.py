"""Deliberate bugs: each patches the product while its `with` runs, and must be found, as the promise that it breaks.

with BUGS["commit-without-fence"].planted():
    result, stage = run_seed(7)
"""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

from greenlet import getcurrent

import publisher.collect
import publisher.commit
import rollout.agent
import shared.transfer
from publisher.retention import Rule
from rollout.watch import Watcher
from shared import strict_json
from shared.catalog import Catalog
from shared.errors import StoreError
from shared.fates import Fate, Fates
from shared.store import Store
from shared.versions import Version

from . import invariants, keepers, nodes, trainers

Patches = Sequence[Any]  # of mock.patch.object


@dataclass(frozen=True)
class Bug:
    """One bug: what it does, which promise it breaks, and the patches that plant it."""

    name: str
    does: str
    breaks: type[invariants.Invariant]
    patches: Callable[[], Patches]

    @contextlib.contextmanager
    def planted(self) -> Iterator[None]:
        """The product has the bug while the block runs."""
        with contextlib.ExitStack() as stack:
            for patch in self.patches():
                stack.enter_context(patch)
            yield


class Altered:
    """A store whose methods a bug replaces."""

    def __init__(self, store: Store, **methods: Callable[..., Any]) -> None:
        self._store = store
        self.__dict__.update(methods)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def _on_altered(module: Any, name: str, alter: Callable[[Any], Altered]) -> Any:
    """Patch a function whose first argument is a store, so that it works on an altered one."""
    real = getattr(module, name)
    return mock.patch.object(module, name, lambda store, *args, **more: real(alter(store), *args, **more))


def _overwriting(store: Store) -> Altered:
    def put_if_absent(key: str, content: bytes) -> bool:
        store.put(key, content)
        return True

    return Altered(store, put_if_absent=put_if_absent)


def _ambiguous_is_lost(store: Store) -> Altered:
    def put_if_absent(key: str, content: bytes) -> bool:
        try:
            return store.put_if_absent(key, content)
        except StoreError:
            return False

    return Altered(store, put_if_absent=put_if_absent)


def _record_first(store: Store) -> Altered:
    waiting: list[tuple[str, bytes]] = []

    def put_stream(key: str, chunks: Iterable[bytes | memoryview], size: int) -> None:
        waiting.append((key, b"".join(chunks)))

    def put(key: str, content: bytes) -> None:
        store.put(key, content)
        while "/rank-" in key and waiting:
            key, late = waiting.pop()
            store.put_stream(key, [late], len(late))

    return Altered(store, put_stream=put_stream, put=put)


def _records_that_are_there(
    store: Store, layout: Any, claim: Any, version: Version, world: int
) -> list[dict[str, Any]] | None:
    keys = [entry.key for entry in store.list(layout.attempt(version, claim.nonce)) if "/rank-" in entry.key]
    found = [key for key in keys if key.endswith(".json")]
    if not found or not found[0].endswith("rank-00000.json"):
        return None
    return [strict_json.load_object(store.get(key), key=key, max_bytes=1 << 20) for key in found]


def _hint_alone(watcher: Watcher, without: Collection[Version] = ()) -> Version | None:
    hint = watcher._catalog.hint()
    return hint[0] if hint else None


def _any_other(seen: rollout.agent.Seen) -> rollout.agent.Action:
    other = seen.wanted is not None and seen.wanted != seen.routed
    return rollout.agent.Action.DELIVER if other and seen.room else rollout.agent.Action.WAIT


def _data_before_void() -> Patches:
    real = publisher.collect.void

    def void(catalog: Catalog, marked: Collection[Version], orphans: Collection[Version] = ()) -> tuple[Version, ...]:
        for version in marked:
            _delete_data(catalog, version)
        return real(catalog, marked, orphans)

    return [mock.patch.object(publisher.collect, "void", void)]


def _orphans_without_void() -> Patches:
    real = publisher.collect.void

    def void(catalog: Catalog, marked: Collection[Version], orphans: Collection[Version] = ()) -> tuple[Version, ...]:
        for version in orphans:
            _delete_data(catalog, version)
        return real(catalog, marked)

    return [mock.patch.object(publisher.collect, "void", void)]


def _delete_data(catalog: Catalog, version: Version) -> None:
    for entry in catalog.store.list(catalog.layout.attempt(version, "").rstrip("/")):
        catalog.store.delete(entry.key)


def _leases_listed_once() -> Patches:
    real_choose, real_read = publisher.collect.choose, publisher.collect.read_leases
    chosen_under: dict[int, Any] = {}

    def choose(catalog: Catalog, fates: Fates, rule: Rule) -> Any:
        plan = real_choose(catalog, fates, rule)
        chosen_under[id(catalog.store)] = plan.seen.leased
        return plan

    def read_leases(store: Store, layout: Any, now: float) -> Any:
        return chosen_under.pop(id(store), None) or real_read(store, layout, now)

    return [
        mock.patch.object(publisher.collect, "choose", choose),
        mock.patch.object(publisher.collect, "read_leases", read_leases),
    ]


def _fates_ignored() -> Patches:
    def collect(fates: Fates, version: Version, reason: str, digest: str = "") -> bool:
        return fates._append(version, fates.last(version), Fate.COLLECTED, reason, digest)

    return [
        mock.patch.object(publisher.collect, "_fate", lambda *_: Fate.UNPINNED),
        mock.patch.object(Fates, "collect", collect),
    ]


def _own_victims_alone() -> Patches:
    real_void, real_unneeded = publisher.collect.void, publisher.collect.unneeded
    mine: dict[Any, set[Version]] = {}

    def void(catalog: Catalog, marked: Collection[Version], orphans: Collection[Version] = ()) -> tuple[Version, ...]:
        mine[getcurrent()] = {*marked, *orphans}
        return real_void(catalog, marked, orphans)

    def unneeded(*seen: Any) -> list[Version]:
        return [version for version in real_unneeded(*seen) if version in mine.get(getcurrent(), ())]

    return [
        mock.patch.object(publisher.collect, "void", void),
        mock.patch.object(publisher.collect, "unneeded", unneeded),
    ]


def _marker_late(catalog: Catalog) -> Catalog:
    store, waiting = catalog.store, dict[str, bytes]()

    def put_if_absent(key: str, content: bytes) -> bool:
        if "/rollbacks/" in key:
            waiting[key] = content
            return True
        won = store.put_if_absent(key, content)
        for marker in list(waiting) if "/manifests/" in key else ():
            store.put_if_absent(marker, waiting.pop(marker))
        return won

    return Catalog(Altered(store, put_if_absent=put_if_absent), catalog.layout.adapter)


ALL = [
    Bug(
        "epoch-forgotten",
        "an engine's name for a version has its number only, so a later epoch's is taken for loaded",
        invariants.NeverTornOrMixed,
        lambda: [mock.patch.object(nodes, "served_name", lambda adapter, v: f"{adapter}@0001-{v.number:06d}")],
    ),
    Bug(
        "hint-trusted",
        "a reader takes what LATEST says, be it older",
        invariants.NeverOlderThanSeen,
        lambda: [
            mock.patch.object(Watcher, "look", _hint_alone),
            mock.patch.object(rollout.agent, "decide", _any_other),
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
        lambda: [_on_altered(trainers, "put_shard", _record_first)],
    ),
    Bug(
        "commit-of-some-ranks",
        "a commit takes the records that are there",
        invariants.NoAcknowledgedVersionLost,
        lambda: [
            mock.patch.object(publisher.commit, "read_records", _records_that_are_there),
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
        lambda: [_on_altered(trainers, "claim_epoch", _overwriting)],
    ),
    Bug(
        "commit-overwrites",
        "a manifest is written by a plain put",
        invariants.OneWinner,
        lambda: [_on_altered(trainers, "commit", _overwriting)],
    ),
    Bug(
        "lost-reply-is-a-loss",
        "a put-if-absent whose answer is lost counts as another's win",
        invariants.OneWinner,
        lambda: [_on_altered(trainers, "commit", _ambiguous_is_lost)],
    ),
    Bug(
        "data-before-void",
        "the collector deletes data, then voids the manifest",
        invariants.NothingInUseDeleted,
        _data_before_void,
    ),
    Bug(
        "leases-listed-once",
        "the collector does not look at the leases again after the void",
        invariants.NothingInUseDeleted,
        _leases_listed_once,
    ),
    Bug(
        "host-clock",
        "the collector takes ages on its host's clock",
        invariants.NothingInUseDeleted,
        lambda: [mock.patch.object(publisher.collect, "store_now", lambda *_: getcurrent().clock())],  # type: ignore[attr-defined]
    ),
    Bug(
        "fates-ignored",
        "the collector does not care for pins",
        invariants.NothingInUseDeleted,
        _fates_ignored,
    ),
    Bug(
        "orphans-without-void",
        "the collector deletes an orphan's data and leaves its name free for a late committer",
        invariants.NothingInUseDeleted,
        _orphans_without_void,
    ),
    Bug(
        "rollback-marks-late",
        "a rollback marks the data that it uses after its commit",
        invariants.NothingInUseDeleted,
        lambda: [_on_altered(keepers, "roll_back", _marker_late)],
    ),
    Bug(
        "never-lists",
        "a reader relies on the hint, and never lists",
        invariants.EveryoneArrives,
        lambda: [mock.patch.object(Watcher, "_list", lambda _: None)],
    ),
    Bug(
        "own-victims-alone",
        "a collector does not finish what a killed one began",
        invariants.EveryoneArrives,
        _own_victims_alone,
    ),
]
BUGS = {bug.name: bug for bug in ALL}
