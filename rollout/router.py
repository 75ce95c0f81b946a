"""Which version new requests go to, and which versions still have requests in flight.

A request leases the version it begins with and keeps it to its end, so nothing is paused and nothing is mixed. A
version that is no longer routed is idle when its last lease is returned; only then may it be unloaded.
"""

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator

from shared.manifest import Manifest
from shared.versions import Version


class Router:
    """Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._routed: Manifest | None = None
        self._leases: Counter[Version] = Counter()

    @property
    def routed(self) -> Manifest | None:
        """The version that new requests get, or None before the first."""
        with self._lock:
            return self._routed

    def route(self, manifest: Manifest | None) -> None:
        """Send new requests to a version (None: to nobody, the engine is down)."""
        with self._lock:
            self._routed = manifest

    @contextlib.contextmanager
    def lease(self) -> Iterator[Manifest | None]:
        """Hold the routed version while the block runs; None if there is none."""
        with self._lock:
            manifest = self._routed
            if manifest is not None:
                self._leases[manifest.version] += 1
        try:
            yield manifest
        finally:
            if manifest is not None:
                self.release(manifest.version)

    def hold(self, version: Version) -> None:
        """Take a lease on a given version; return it with `release`."""
        with self._lock:
            self._leases[version] += 1

    def release(self, version: Version) -> None:
        """Return a lease."""
        with self._lock:
            self._leases[version] -= 1

    def idle(self, version: Version) -> bool:
        """Whether a version is neither routed nor leased."""
        with self._lock:
            routed = self._routed is not None and self._routed.version == version
            return not routed and self._leases[version] == 0
