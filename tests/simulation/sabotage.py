"""How deliberate bugs are made: stores that do not what they are asked, and functions in the product's place.

`bugs.py` says which of them is planted where.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any
from unittest import mock

from greenlet import getcurrent

import publisher.collect
import rollout.agent
from publisher import retention
from publisher.retention import Rule
from rollout.watch import Watcher
from shared import strict_json
from shared.catalog import Catalog
from shared.errors import StoreError
from shared.fates import Entry, Fate, Fates
from shared.leases import read_leases
from shared.store import Store
from shared.versions import Version

Patches = Sequence[Any]  # of mock.patch.object


class Altered:
    """A store whose methods a bug replaces."""

    def __init__(self, store: Store, **methods: Callable[..., Any]) -> None:
        self._store = store
        self.__dict__.update(methods)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def on_altered(module: Any, name: str, alter: Callable[[Any], Any]) -> Any:
    """Patch a function whose first argument is a store, so that it works on an altered one."""
    real = getattr(module, name)
    return mock.patch.object(module, name, lambda store, *args, **more: real(alter(store), *args, **more))


def overwriting(store: Store) -> Altered:
    def put_if_absent(key: str, content: bytes) -> bool:
        store.put(key, content)
        return True

    return Altered(store, put_if_absent=put_if_absent)


def ambiguous_is_lost(store: Store) -> Altered:
    def put_if_absent(key: str, content: bytes) -> bool:
        try:
            return store.put_if_absent(key, content)
        except StoreError:
            return False

    return Altered(store, put_if_absent=put_if_absent)


def record_first(store: Store) -> Altered:
    waiting: list[tuple[str, bytes]] = []

    def put_stream(key: str, chunks: Iterable[bytes | memoryview], size: int) -> None:
        waiting.append((key, b"".join(chunks)))

    def put(key: str, content: bytes) -> None:
        store.put(key, content)
        while "/rank-" in key and waiting:
            key, late = waiting.pop()
            store.put_stream(key, [late], len(late))

    return Altered(store, put_stream=put_stream, put=put)


def records_that_are_there(
    store: Store, layout: Any, claim: Any, version: Version, world: int
) -> list[dict[str, Any]] | None:
    keys = [entry.key for entry in store.list(layout.attempt(version, claim.nonce)) if "/rank-" in entry.key]
    found = [key for key in keys if key.endswith(".json")]
    if not found or not found[0].endswith("rank-00000.json"):
        return None
    return [strict_json.load_object(store.get(key), key=key, max_bytes=1 << 20) for key in found]


def hint_alone(watcher: Watcher, without: Collection[Version] = ()) -> Version | None:
    hint = watcher._catalog.hint()
    return hint[0] if hint else None


def list_once(watcher: Watcher, real: Callable[[Watcher], None] = Watcher._list) -> None:
    if watcher._list_at is None:
        real(watcher)


def any_other(seen: rollout.agent.Seen) -> rollout.agent.Action:
    other = seen.wanted is not None and seen.wanted != seen.routed
    return rollout.agent.Action.DELIVER if other and seen.room else rollout.agent.Action.WAIT


def data_before_void() -> Patches:
    real = publisher.collect.void

    def void(catalog: Catalog, marked: Collection[Version], orphans: Collection[Version] = ()) -> tuple[Version, ...]:
        for version in marked:
            _delete_data(catalog, version)
        return real(catalog, marked, orphans)

    return [mock.patch.object(publisher.collect, "void", void)]


def orphans_without_void() -> Patches:
    real = publisher.collect.void

    def void(catalog: Catalog, marked: Collection[Version], orphans: Collection[Version] = ()) -> tuple[Version, ...]:
        for version in orphans:
            _delete_data(catalog, version)
        return real(catalog, marked)

    return [mock.patch.object(publisher.collect, "void", void)]


def _delete_data(catalog: Catalog, version: Version) -> None:
    for entry in catalog.store.list(catalog.layout.attempt(version, "").rstrip("/")):
        catalog.store.delete(entry.key)


def leases_listed_once() -> Patches:
    real_choose, real_read = publisher.collect.choose, read_leases
    chosen_under: dict[int, Any] = {}

    def choose(catalog: Catalog, fates: Fates, rule: Rule) -> Any:
        plan = real_choose(catalog, fates, rule)
        chosen_under[id(catalog.store)] = plan.seen.leased
        return plan

    def read_once(store: Store, layout: Any, now: float) -> Any:
        return chosen_under.pop(id(store), None) or real_read(store, layout, now)

    return [
        mock.patch.object(publisher.collect, "choose", choose),
        mock.patch.object(publisher.collect, "read_leases", read_once),
    ]


def fates_ignored() -> Patches:
    def collect(fates: Fates, version: Version, reason: str, digest: str = "") -> bool:
        return fates._append(version, fates.last(version), Fate.COLLECTED, reason, digest)

    return [
        mock.patch.object(publisher.collect, "_fate", lambda *_: Fate.UNPINNED),
        mock.patch.object(Fates, "collect", collect),
    ]


def fate_put(fates: Fates, version: Version, last: Any, fate: Fate, reason: str, digest: str = "") -> bool:
    entry = Entry((last.n if last else 0) + 1, fate, fates._by, reason, fates._clock(), digest)
    fates._store.put(fates._layout.fate(version, entry.n), entry.to_bytes())
    return True


def own_victims_alone() -> Patches:
    real_void, real_unneeded = publisher.collect.void, retention.unneeded
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


def marker_late(catalog: Catalog) -> Catalog:
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
