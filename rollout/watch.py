"""Notice new versions: a hint often, a listing now and then, never backwards.

The hint (LATEST) is asked conditionally every `poll_interval_s`, jittered so that a fleet does not ask in step. The
listing every `list_interval_s` finds what a lost or stale hint missed. On a local path watchdog cuts the wait short;
it is only ever a reason to look sooner: inotify dies silently when a directory is recreated and is mute on NFS.
"""

import contextlib
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

from watchdog.events import (
    EVENT_TYPE_CLOSED,
    EVENT_TYPE_CREATED,
    EVENT_TYPE_MODIFIED,
    EVENT_TYPE_MOVED,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer

from shared.catalog import Catalog
from shared.local_store import LocalStore
from shared.versions import Version

JITTER = 0.2  # fraction of the interval
WRITES = (EVENT_TYPE_CREATED, EVENT_TYPE_MODIFIED, EVENT_TYPE_MOVED, EVENT_TYPE_CLOSED)


class Watcher:
    """Tells the highest version ever seen. Used by one thread; `wake` may be called from any.

    Loop:
        watcher = Watcher(catalog, poll_interval_s=1.0, list_interval_s=30.0)
        while not stopping:
            version = watcher.look()
            ...
            watcher.wait()
    """

    def __init__(
        self,
        catalog: Catalog,
        *,
        poll_interval_s: float,
        list_interval_s: float,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self._catalog, self._poll_s, self._list_s = catalog, poll_interval_s, list_interval_s
        self._clock, self._rng = clock, rng or random.Random()
        self._newest: Version | None = None
        self._ghosts: set[Version] = set()
        self._tag = ""
        self._listed_at: float | None = None
        self._woken = threading.Event()
        self._observer = _observe(catalog, self._woken.set)

    def look(self) -> Version | None:
        """The highest version seen so far, after one look.

        Raises:
            StoreError: the store failed; look again later.
        """
        hint = self._catalog.hint(self._tag)
        if hint is not None:
            found, self._tag = hint
            self._see(found if found not in self._ghosts else None)
        now = self._clock()
        if self._listed_at is None or now - self._listed_at >= self._list_s:
            listed = self._catalog.versions()
            self._listed_at = now
            self._ghosts -= set(listed)
            self._see(listed[-1] if listed else None)
        return self._newest

    def forget(self, version: Version) -> None:
        """A version that was told of and is not there: a hint that outlived its manifest, or an expired version.

        It counts as unseen until a listing shows it; the next look lists.
        """
        self._ghosts.add(version)
        self._newest, self._tag, self._listed_at = None, "", None

    def _see(self, version: Version | None) -> None:
        if version is not None and (self._newest is None or version > self._newest):
            self._newest = version

    def wait(self) -> None:
        """Sleep until the next look is due, or the directory changed, or `wake`."""
        self._woken.wait(self._poll_s * self._rng.uniform(1 - JITTER, 1 + JITTER))
        self._woken.clear()

    def wake(self) -> None:
        """Cut a wait short."""
        self._woken.set()

    def close(self) -> None:
        """Stop watching the directory."""
        if self._observer is not None:
            self._observer.stop()
            self._observer.join()


class _OnChange(FileSystemEventHandler):
    def __init__(self, notify: Callable[[], None], name: str) -> None:
        self._notify, self._name = notify, name

    def dispatch(self, event: FileSystemEvent) -> None:
        """LATEST is replaced by a rename, which names it as the destination. Reads are events too: our own."""
        if event.event_type in WRITES and str(event.dest_path or event.src_path).endswith(self._name):
            self._notify()


def _observe(catalog: Catalog, notify: Callable[[], None]):  # type: ignore[no-untyped-def]  # watchdog's Observer is a variable
    """A running watchdog observer of a local store's adapter directory, or None where there is nothing to watch."""
    if not isinstance(catalog.store, LocalStore):
        return None
    folder = Path(catalog.store.root, catalog.layout.adapter)
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        observer = Observer()
        observer.daemon = True
        observer.schedule(_OnChange(notify, catalog.layout.latest.rsplit("/", 1)[-1]), str(folder))
        observer.start()
        return observer
    return None
