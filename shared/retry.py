"""How long a request to a store may take, and the one place where it is made again.

Promises: bounded in attempts and in time; waits grow exponentially and are jittered, so that a fleet does not come back
in step; a server that asks to be left alone (503 SlowDown, 429, Retry-After) is left alone for longer. The error that
gets out names the operation, the key, how often it was tried and for how long.
The floor: a request that brings less than SLOWEST_BYTES_PER_S is given up, so over a line that is slower for each of
the requests at once (of four: 1 MiB/s) a large object never arrives.
Does not: decide what may be repeated. Callers hand in reads and writes that are safe to make twice: an object is
written whole, an exclusive write is read back, a part of an upload has its number.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from shared.errors import LorasyncError, StoreError

Result = TypeVar("Result")

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 20  # without a byte of the answer
SLOWEST_BYTES_PER_S = 256 << 10  # of one request: slower is as good as dead, and another connection may be better
PARTS_RETRY_FOR_S = 180.0  # of a large write: a part that stalls is given up after 90 s; time for a second try


def deadline_s(size: int) -> float:
    """How long a request that carries this many bytes may take in all."""
    return CONNECT_TIMEOUT_S + READ_TIMEOUT_S + size / SLOWEST_BYTES_PER_S


@dataclass(frozen=True)
class Fault:
    """What went wrong, as the caller shall be told, and what the server asked for."""

    error: StoreError
    throttled: bool = False
    leave_alone_s: float = 0.0  # the server's Retry-After


@dataclass(frozen=True)
class Retry:
    """How often, for how long and with which pauses. Chance and time are passed in; every thread may use it.

    Attributes:
        attempts: at most this many.
        for_s: no attempt begins later than this after the first. An attempt's own timeout comes on top.
        first_wait_s: before the second attempt, on average; doubles from one to the next.
        throttled_wait_s: the same, where the server says that it is asked too much.
    """

    attempts: int = 5
    for_s: float = 30.0
    first_wait_s: float = 0.2
    throttled_wait_s: float = 1.0
    rng: random.Random = field(default_factory=random.Random)
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def for_bytes(self, size: int) -> "Retry":
        """The same for requests that carry so many bytes: one that took its whole deadline is made once more."""
        return replace(self, for_s=max(self.for_s, 2 * deadline_s(size)))

    def run(self, call: Callable[[], Result], diagnose: Callable[[Exception], Fault]) -> Result:
        """Make a repeatable call until it succeeds, fails for good, or the bounds are reached.

        Args:
            diagnose: what an exception of the library below means. Errors of ours pass as they are.

        Raises:
            StoreError: the last attempt's, as diagnosed.
        """
        began = self.clock()
        for attempt in range(1, self.attempts + 1):
            try:
                return call()
            except LorasyncError as error:
                if not (isinstance(error, StoreError) and error.retryable):
                    raise
                fault, cause = Fault(error), error.__cause__
            except Exception as error:
                fault, cause = diagnose(error), error
            wait_s = self._wait_s(attempt, fault)
            spent_s = self.clock() - began
            if not fault.error.retryable:
                raise fault.error from cause
            if attempt == self.attempts or spent_s + wait_s > self.for_s:
                raise _tried(fault.error, attempt, spent_s) from cause
            self.sleep(wait_s)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _wait_s(self, attempt: int, fault: Fault) -> float:
        first_s = self.throttled_wait_s if fault.throttled else self.first_wait_s
        return max(fault.leave_alone_s, first_s * (1 << (attempt - 1)) * self.rng.uniform(0.5, 1.5))


def _tried(error: StoreError, attempts: int, spent_s: float) -> StoreError:
    """The same error, saying how often and how long it was tried."""
    tries = "1 attempt" if attempts == 1 else f"{attempts} attempts"
    return type(error)(
        f"{error.message} ({tries}, {spent_s:.1f} s)",
        op=error.op,
        key=error.key,
        version=error.version,
        hint=error.hint,
        retryable=error.retryable,
    )
