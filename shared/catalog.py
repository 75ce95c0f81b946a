"""What versions an adapter has, read from the store.

"Latest" is the highest (epoch, number) with a manifest. LATEST is a hint that saves a listing: it may lag and, when a
stalled trainer of a lower epoch wakes up, even step back. A listing neither lags nor steps back unless versions are
deleted; whoever follows the hint keeps the highest version it has seen, and lists now and then (rollout/watch.py).
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from shared import strict_json
from shared.errors import Corrupt, KeyMissing, UsageError
from shared.layout import LAYOUT, Layout, version_of
from shared.manifest import MAX_MANIFEST_BYTES, VOID, Manifest
from shared.store import Store
from shared.versions import Version

if TYPE_CHECKING:
    from shared.signing import Trust

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_HINT_BYTES = 100_000
READS_AT_ONCE = 8


class Catalog:
    """Reads one adapter's versions. Keeps no state; every method may be called from any thread.

    Args:
        trust: refuse every manifest that none of these keys signed; None: take who can write to the store at its word.
    """

    def __init__(self, store: Store, adapter: str, trust: "Trust | None" = None) -> None:
        self.store, self.layout, self._trust = store, Layout(adapter), trust

    def hint(self, tag: str = "") -> tuple[Version | None, str] | None:
        """What LATEST says: one conditional read.

        Args:
            tag: of the last read, or empty.

        Returns:
            (version, tag), or None if nothing changed. (None, "") while nothing was ever published. A hint that can't
            be read counts as absent: the listing is the truth.
        """
        try:
            fetched = self.store.get_if_changed(self.layout.latest, tag, MAX_HINT_BYTES)
        except KeyMissing:
            return None, ""
        except Corrupt:  # too large for a hint
            return None, ""
        if fetched is None:
            return None
        try:
            body = strict_json.load_object(fetched.content, key=self.layout.latest, max_bytes=MAX_HINT_BYTES)
            return Version.parse(f"{body['epoch']}-{body['version']}"), fetched.tag
        except (Corrupt, KeyError, UsageError):
            return None, fetched.tag

    def versions(self, after: Version | None = None) -> list[Version]:
        """Every committed version, ascending: one listing. A void is known by its size, which no manifest can have.

        Args:
            after: only those that are newer.
        """
        entries = self.store.list(self.layout.manifests, self.layout.manifest(after) if after else "")
        found = (version_of(entry.key) for entry in entries if entry.size != len(VOID))
        return sorted(version for version in found if version)

    def collected(self) -> list[Version]:
        """Versions that retention took, ascending: two listings. The void of an attempt is none: it was no version."""
        entries = self.store.list(self.layout.manifests)
        void = {version_of(entry.key) for entry in entries if entry.size == len(VOID)}
        decided = {version_of(entry.key) for entry in self.store.list(self.layout.fates)}
        return sorted(version for version in void & decided if version)

    def newest(self) -> Version | None:
        """The latest version by listing."""
        versions = self.versions()
        return versions[-1] if versions else None

    def manifest(self, version: Version) -> Manifest:
        """Fetch and check one manifest.

        Raises:
            KeyMissing: no such version (never committed, or expired).
            Corrupt: the manifest, or one that stands under another version's name.
            Untrusted: no trusted key signed it.
        """
        key = self.layout.manifest(version)
        content = self.store.get(key, MAX_MANIFEST_BYTES)
        if content == VOID:
            raise KeyMissing("collected", op="read manifest", key=key, version=str(version))
        manifest = Manifest.parse(content, key=key)
        if (manifest.adapter, manifest.version) != (self.layout.adapter, version):
            problem = f"names {manifest.adapter}@{manifest.version}"
            raise Corrupt(problem, op="read manifest", key=key, version=str(version))
        if self._trust is not None:
            self._trust.demand_signed(manifest, key=key)
        return manifest

    def resolve(self, text: str) -> Version:
        """A version as a person writes it: `latest`, `0001-000012`, or `12` (the highest epoch that has it).

        Raises:
            UsageError: no such version, or not the name of one.
        """
        versions = self.versions()
        if text == "latest" and versions:
            return versions[-1]
        if text.isdecimal():
            match = [version for version in versions if version.number == int(text)]
        else:
            asked = None if text == "latest" else Version.parse(text)
            match = [version for version in versions if version == asked]
        if not match:
            have = f"{versions[0]} .. {versions[-1]}" if versions else "none"
            raise UsageError(f"no version {text!r} of {self.layout.adapter}", op="find version", hint=f"Have: {have}")
        return match[-1]

    def progress(self) -> dict[str, Any] | None:
        """The trainer's own hint of how far it is, or None."""
        return self._hint_object(self.layout.trainer)

    def node(self, node: str) -> dict[str, Any] | None:
        """A node's own hint of its state, or None."""
        return self._hint_object(self.layout.node(node))

    def nodes(self) -> list[dict[str, Any]]:
        """Every node's hint."""
        keys = [entry.key for entry in self.store.list(self.layout.nodes)]
        return [hint for hint in at_once(self._hint_object, keys) if hint]

    def _hint_object(self, key: str) -> dict[str, Any] | None:
        try:
            return strict_json.load_object(self.store.get(key, MAX_HINT_BYTES), key=key, max_bytes=MAX_HINT_BYTES)
        except (KeyMissing, Corrupt):
            return None


def at_once(read: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """What `read` says of each item, in their order; a few of them are read at a time, for each is a request."""
    with ThreadPoolExecutor(READS_AT_ONCE, thread_name_prefix="read") as pool:
        return list(pool.map(read, items))


def check_layout(store: Store, layout: Layout) -> None:
    """Check that the store's layout is one we read.

    Raises:
        Corrupt: a newer layout, or not one at all.
    """
    try:
        content = store.get(layout.layout, MAX_HINT_BYTES)
    except KeyMissing:
        return
    body = strict_json.load_object(content, key=layout.layout, max_bytes=MAX_HINT_BYTES)
    if body.get("layout") != LAYOUT:
        problem = f"store has layout {body.get('layout')!r}, this lorasync reads {LAYOUT}"
        raise Corrupt(problem, op="read layout", key=layout.layout, hint="Upgrade lorasync, or use another URL")
