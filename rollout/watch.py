"""Notice new versions: a hint often, a listing seldom, never backwards.

    every poll_interval_s       LATEST, conditionally: one request, mostly answered "unchanged"; jittered, so that a
                                fleet does not ask in step
    at start, and when nothing  the keys after the newest version known: what a lost or stale hint missed. Each listing
    came for list_interval_s    that finds nothing doubles the interval, up to 16 times; anything newer resets it
    after `forget`              the whole listing, once

So history costs nothing, and a quiet store two requests a poll at most. A hint that steps back (a stalled trainer's, a
replayed object) changes nothing. A version that was told of and can't be read (collected, or never there) is a ghost:
left out until a listing that is due anyway shows it again, so that it is tried seldom and holds nobody up.

On a local path watchdog cuts the wait short; it is only ever a reason to look sooner: inotify dies silently when a
directory is recreated and is mute on NFS. It hears of renames alone, which is how LATEST is replaced: if readers' own
reads were events, each of n readers would wake the others, n * n times a version.
"""

import contextlib
import random
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path

from watchdog.events import FileMovedEvent, FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer

from shared.catalog import Catalog
from shared.local_store import LocalStore
from shared.versions import Version

JITTER = 0.2  # fraction of the interval
WOKEN_GAP = 0.2  # of the interval, and no more than ...
MAX_WOKEN_GAP_S = 0.2  # ... after its last look may a reader be woken to the next one
MAX_BACK_OFF = 16  # times list_interval_s


class Watcher:
    """Tells the newest version that may be read. Used by one thread; `wake` may be called from any.

    Loop:
        watcher = Watcher(catalog, poll_interval_s=1.0, list_interval_s=30.0)
        while not stopping:
            version = watcher.look()
            ...                                 # KeyMissing: watcher.forget(version)
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
        self._known: list[Version] = []  # ascending, without ghosts
        self._ghosts: set[Version] = set()
        self._tag = ""
        self._whole = False  # whether history was ever listed: until then only what came since the start is known
        self._list_all = False
        self._list_at: float | None = None  # None: at once
        self._fruitless = 0  # listings in a row
        self._looked_at = clock()
        self._woken = threading.Event()
        self._observer = _observe(catalog, self._woken.set)

    def look(self, without: Collection[Version] = ()) -> Version | None:
        """The newest version known, after one look.

        Args:
            without: versions that the caller won't have (quarantined): the newest of the others is told.

        Raises:
            StoreError: the store failed; look again later.
        """
        self._looked_at = self._clock()
        hint = self._catalog.hint(self._tag)
        if hint is not None:
            found, self._tag = hint
            if found is not None and found not in self._ghosts and (not self._known or found > self._known[-1]):
                self._known.append(found)
                self._came()
        if self._list_all or self._list_at is None or self._clock() >= self._list_at:
            self._list()
        newest = self._newest(without)
        if newest is None and self._known and not self._whole:
            self._list_all = True
            self._list()
            newest = self._newest(without)
        return newest

    def forget(self, version: Version) -> None:
        """A version that was told of and can't be read: an expired one, or a hint to what never was.

        The next look lists, and tells the newest of the others.
        """
        self._ghosts.add(version)
        self._list_all = True

    def _newest(self, without: Collection[Version]) -> Version | None:
        return next((version for version in reversed(self._known) if version not in without), None)

    def _list(self) -> None:
        if self._list_all:
            listed = self._catalog.versions()
            self._known = [version for version in listed if version not in self._ghosts]
            self._whole, self._list_all = True, False
        else:
            after = self._known[-1] if self._known else None
            listed = self._catalog.versions(after)
            if any(version not in self._ghosts for version in listed):
                self._fruitless = 0
            elif self._list_at is not None:
                self._fruitless += 1
            self._ghosts -= set(listed)  # there after all: tried again
            self._known += listed
            self._whole |= after is None
        self._list_at = self._clock() + self._list_s * min(2**self._fruitless, MAX_BACK_OFF)

    def _came(self) -> None:
        """Something newer came: no listing is due for a while, but for the first one."""
        self._fruitless = 0
        if self._list_at is not None:
            self._list_at = self._clock() + self._list_s

    def pause_s(self) -> float:
        """Draw how long to wait until the next look."""
        return self._poll_s * self._rng.uniform(1 - JITTER, 1 + JITTER)

    def wait(self) -> None:
        """Sleep until the next look is due, or the directory changed, or `wake`.

        Woken soon after its last look it rests a little first: of versions that come faster than that, only the last
        is worth a look.
        """
        pause_s = self.pause_s()
        if self._woken.wait(pause_s):
            rest_s = self._looked_at + min(WOKEN_GAP * pause_s, MAX_WOKEN_GAP_S) - self._clock()
            if rest_s > 0:
                time.sleep(rest_s)
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

    def on_moved(self, event: FileSystemEvent) -> None:
        """LATEST is replaced by a rename, which names it as the destination."""
        if str(event.dest_path).endswith(self._name):
            self._notify()


def _observe(catalog: Catalog, notify: Callable[[], None]):  # type: ignore[no-untyped-def]  # watchdog's Observer is a variable
    """A running watchdog observer of a local store's adapter directory, or None where there is nothing to watch."""
    if not isinstance(catalog.store, LocalStore):
        return None
    folder = Path(catalog.store.root, catalog.layout.adapter)
    handler = _OnChange(notify, catalog.layout.latest.rsplit("/", 1)[-1])
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        observer = Observer()
        observer.daemon = True
        observer.schedule(handler, str(folder), event_filter=[FileMovedEvent])
        observer.start()
        return observer
    return None
