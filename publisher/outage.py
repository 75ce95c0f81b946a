"""A store that fails for a while: said once when it begins and once when it is over, every failure counted."""

import logging
import time
from collections.abc import Callable

from shared.errors import StoreError

log = logging.getLogger(__name__)


class Outage:
    """What one caller sees of the store; `failures` counts the calls that failed over its whole life."""

    def __init__(self, caller: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._caller, self._clock = caller, clock
        self.failures = 0
        self._began_at: float | None = None

    def failed(self, error: StoreError) -> None:
        """Count a failure that will be tried again.

        Raises:
            StoreError: `error` itself, if the store refuses for good.
        """
        if not error.retryable:
            raise error
        self.failures += 1
        if self._began_at is None:
            self._began_at = self._clock()
            log.warning("%s: the store fails, trying again until it answers: %s", self._caller, error)

    def answered(self) -> None:
        """Note that the store answers."""
        if self._began_at is not None:
            seconds, self._began_at = self._clock() - self._began_at, None
            log.warning("%s: the store answers again seconds=%.1f failures=%d", self._caller, seconds, self.failures)
