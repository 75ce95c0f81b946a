"""Collecting behind the training: one thread of the trainer's process, every `interval_s`.

    collector = Collector(catalog, rule, interval_s=60.0, grace_s=10.0)
    ...
    collector.close()

Where the rule keeps every version there are still attempts that nobody committed and uploads that nobody finished. They
have time: after the first look an hour passes to the next. So it is with the walk for unfinished writes.

A collection that fails costs disk space and nothing else: it is counted, said once until one succeeds, and the next one
finishes what it began. So it never ends training.
"""

import logging
import threading
import time

from publisher.collect import collect
from publisher.retention import Rule
from shared.catalog import Catalog
from shared.fates import Fates

log = logging.getLogger(__name__)

CLOSE_S = 10.0  # a store that hangs is not waited for any longer
LEFTOVERS_EVERY_S = 3600.0  # they go when they are a day old


class _Closed(Exception):
    """The wait between two steps ended because the collector is closed; the next life goes on from there."""


class Collector:
    """Owns the thread. `collected` counts versions, `failures` collections that failed."""

    def __init__(self, catalog: Catalog, rule: Rule, *, interval_s: float, grace_s: float) -> None:
        self._catalog, self._rule, self._interval_s, self._grace_s = catalog, rule, interval_s, grace_s
        self._fates = Fates(catalog.store, catalog.layout)
        self.collected = self.failures = 0
        self._failing = False
        self._leftovers_at: float | None = None  # when they were last looked for
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="collector", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop, in the middle of a collection too."""
        self._closing.set()
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while not self._closing.wait(self._interval_s):
            leftovers = self._leftovers_at is None or time.monotonic() - self._leftovers_at >= LEFTOVERS_EVERY_S
            if not (leftovers or self._rule.newest):
                continue
            try:
                outcome = collect(
                    self._catalog,
                    self._fates,
                    self._rule,
                    grace_s=self._grace_s,
                    sleep=self._wait,
                    leftovers=leftovers,
                )
            except _Closed:
                return
            except Exception as error:
                self.failures += 1
                if not self._failing:
                    log.warning("collector: failed, trying again every %.0f s: %s", self._interval_s, error)
                self._failing = True
                continue
            self._failing = False
            if leftovers:
                self._leftovers_at = time.monotonic()
            self.collected += len(outcome.collected)
            if outcome.collected:
                log.info("collected versions=%d bytes=%d", len(outcome.collected), outcome.swept.bytes)

    def _wait(self, seconds: float) -> None:
        if self._closing.wait(seconds):
            raise _Closed
