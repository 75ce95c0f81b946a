"""How far the trainer is, which version is the latest, and what each node serves, as the store tells it.

Nothing here asks a process: the trainer and every node overwrite a hint of their own state, and a hint may be old or
malformed (then it says so, or is left out). Lag counts committed versions newer than the served one; in seconds, it is
the age of the first of them.
"""

import time
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shared.catalog import Catalog, at_once
from shared.errors import Corrupt, KeyMissing, UsageError
from shared.versions import Version

SILENT_AFTER_S = 60.0
SILENT_RENEWALS = 3  # missed, of a node that renews its hint more seldom


@dataclass(frozen=True)
class NodeStatus:
    """One node, as its hint tells it. Lags are None while it serves nothing.

    Attributes:
        silent_s: the hint's age. A living node's grows to `renew_s` (rollout.hint_interval_s) and no further.
        silent: whether it is so old that the node must be dead, hung, or cut off from the store.
    """

    node: str
    state: str
    version: Version | None
    lag_versions: int | None
    lag_s: float | None
    served_since: float | None
    silent_s: float | None
    renew_s: float | None
    failures: int
    quarantined: tuple[str, ...]

    @property
    def silent(self) -> bool:
        return self.silent_s is not None and self.silent_s >= max(SILENT_AFTER_S, SILENT_RENEWALS * (self.renew_s or 0))

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "version": str(self.version) if self.version else None, "silent": self.silent}


@dataclass(frozen=True)
class Status:
    """One look at an adapter."""

    adapter: str
    store: str
    latest: Version | None
    versions: int
    trainer: Mapping[str, Any] | None
    nodes: tuple[NodeStatus, ...]

    def to_json(self) -> dict[str, Any]:
        latest, nodes = str(self.latest) if self.latest else None, [node.to_json() for node in self.nodes]
        return {**self.__dict__, "latest": latest, "nodes": nodes}


class StatusReader:
    """Reads the status of one adapter; remembers when versions were submitted, which never changes.

    Args:
        clock: Unix seconds.
    """

    def __init__(self, catalog: Catalog, clock: Callable[[], float] = time.time) -> None:
        self._catalog, self._clock = catalog, clock
        self._submitted: dict[Version, float | None] = {}

    def read(self) -> Status:
        """Look once: two listings, the hints, and for lagging nodes the manifest of the first version they miss."""
        versions = self._catalog.versions()
        hints = sorted(self._catalog.nodes(), key=lambda hint: str(hint.get("node")))
        first_missed = {missed[0] for hint in hints if (missed := _missed(hint, versions))}
        unread = sorted(first_missed - self._submitted.keys())
        self._submitted.update(zip(unread, at_once(self._read_submitted, unread), strict=True))
        return Status(
            adapter=self._catalog.layout.adapter,
            store=self._catalog.store.url,
            latest=versions[-1] if versions else None,
            versions=len(versions),
            trainer=self._catalog.progress(),
            nodes=tuple(self._node(hint, versions) for hint in hints),
        )

    def _node(self, hint: Mapping[str, Any], versions: list[Version]) -> NodeStatus:
        version, updated = _version(hint.get("version")), number(hint.get("updated_at"))
        quarantined = hint.get("quarantined")
        missed = _missed(hint, versions)
        return NodeStatus(
            node=str(hint.get("node")),
            state=str(hint.get("state", "unknown")),
            version=version,
            lag_versions=len(missed) if version else None,
            lag_s=self._age(missed[0]) if missed else 0.0 if version else None,
            served_since=number(hint.get("served_since")),
            silent_s=self._clock() - updated if updated is not None else None,
            renew_s=number(hint.get("renew_s")),
            failures=int(number(hint.get("failures")) or 0),
            quarantined=tuple(str(item) for item in quarantined) if isinstance(quarantined, list) else (),
        )

    def _age(self, version: Version) -> float | None:
        submitted = self._submitted[version]
        return None if submitted is None else max(0.0, self._clock() - submitted)

    def _read_submitted(self, version: Version) -> float | None:
        try:
            return submitted_at(self._catalog.manifest(version).training)
        except (Corrupt, KeyMissing):  # expired between the listing and now, or for `verify` to tell
            return None


def submitted_at(training: Mapping[str, Any]) -> float | None:
    """When the trainer handed the version over, in Unix seconds."""
    return number(training.get("submitted_at"))


def number(value: Any) -> float | None:
    """A hint's number, or None for anything else."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _missed(hint: Mapping[str, Any], versions: list[Version]) -> list[Version]:
    """The versions that are newer than the one which a node serves."""
    version = _version(hint.get("version"))
    return versions[bisect_right(versions, version) :] if version else []


def _version(text: Any) -> Version | None:
    try:
        return Version.parse(text) if isinstance(text, str) else None
    except UsageError:
        return None
