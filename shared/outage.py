"""A store that fails for a while: said once when it begins and once when it is over, every failure counted.

A store that answers every other request is one outage, not a hundred: it is said to be over by the first answer that
comes QUIET_S or more after the last failure. What a full disk refuses is an outage too (`retryable`): room returns.
"""

import logging
import time
from collections.abc import Callable

from shared.errors import StoreError

log = logging.getLogger(__name__)

QUIET_S = 10.0


class Outage:
    """What one caller sees of the store; `failures` counts the calls that failed over its whole life."""

    def __init__(self, caller: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._caller, self._clock = caller, clock
        self.failures = 0
        self._before = 0  # failures before this outage
        self._began_at: float | None = None
        self._failed_at = 0.0
        self._answered_at: float | None = None  # first after the last failure

    def failed(self, error: StoreError) -> None:
        """Count a failure that will be tried again.

        Raises:
            StoreError: `error` itself, if the store refuses for good.
        """
        if not error.retryable:
            raise error
        self._failed_at, self._answered_at = self._clock(), None
        if self._began_at is None:
            self._began_at, self._before = self._failed_at, self.failures
            log.warning("%s: the store fails, trying again until it answers: %s", self._caller, error)
        self.failures += 1

    def answered(self) -> None:
        """Note that the store answers."""
        if self._began_at is None:
            return
        if self._answered_at is None:
            self._answered_at = self._clock()
        if self._clock() - self._failed_at >= QUIET_S:
            self._say_over(self._began_at, self._answered_at)

    def over(self) -> None:
        """Note that the store answered a caller who has no more to ask."""
        if self._began_at is not None:
            self._say_over(self._began_at, self._clock() if self._answered_at is None else self._answered_at)

    def _say_over(self, began_at: float, answered_at: float) -> None:
        self._began_at = None
        seconds, failures = answered_at - began_at, self.failures - self._before
        log.warning("%s: the store answers again seconds=%.1f failures=%d", self._caller, seconds, failures)
