"""Is the node's own engine to be started again? Watches its process and its health, and does it.

Three failures: the process died; it lives and is done for (vLLM's server says so, or has closed its port, and then
waits without end for requests that its dead core will never answer); it lives and has not answered for HUNG_AFTER_S (a
deadlock, a stuck device). All end in a new start, tried until MAX_STARTS in a row gave nothing that lasted. Does not:
watch an engine of somebody else's, know adapters (`rollout.agent` loads them again).
"""

import logging
import time
from collections.abc import Callable
from enum import Enum
from typing import Protocol

from shared.errors import EngineError, UsageError

log = logging.getLogger(__name__)

HEALTH_INTERVAL_S = 2.0
HUNG_FAILURES = 3  # in a row, over HUNG_AFTER_S at least: one slow answer on a busy machine is no hang
HUNG_AFTER_S = 30.0
MAX_STARTS = 5  # in a row, without the engine serving a version or being healthy for STEADY_S
STEADY_S = 60.0


class Pulse(Enum):
    """What a living process says of its health."""

    WELL = "well"
    SILENT = "silent"  # nothing, or nothing that tells
    DONE_FOR = "done for"  # it says so, or nobody listens any more


class Server(Protocol):
    """The process behind the engine, if it is ours to keep alive."""

    def start(self, *, stopping: Callable[[], bool]) -> None:
        """Start it again, whatever is left of it; returns when it is healthy, raises when `stopping` says so."""

    def running(self) -> bool:
        """Whether its process lives."""

    def pulse(self) -> Pulse:
        """What it says of its health within seconds."""


class Supervisor:
    """One server's. Both methods belong to one thread.

    Loop:
        if failure := supervisor.failure(serving=router.routed is not None):
            supervisor.restart(stopping.is_set)
    """

    def __init__(self, server: Server, clock: Callable[[], float] = time.monotonic) -> None:
        self._server, self._clock = server, clock
        self._asked_at = self._healthy_since = self._answered_at = clock()
        self._failures = self._starts = 0

    def failure(self, *, serving: bool) -> str:
        """What is wrong with the engine, or "".

        Args:
            serving: whether a version is routed to it, which proves that it works.
        """
        if not self._server.running():
            return "died"
        now = self._clock()
        if now - self._asked_at >= HEALTH_INTERVAL_S:
            self._asked_at = now
            pulse = self._server.pulse()
            if pulse is Pulse.DONE_FOR:
                return "is done for"
            self._hear(pulse is Pulse.WELL)
        silent_s = now - self._answered_at
        if self._failures >= HUNG_FAILURES and silent_s >= HUNG_AFTER_S:
            return f"has not answered for {silent_s:.0f} s"
        if self._failures == 0 and (serving or now - self._healthy_since >= STEADY_S):
            self._starts = 0
        return ""

    def restart(self, stopping: Callable[[], bool]) -> None:
        """Start it again. A start that fails is logged: `failure` is true again at the next look.

        Raises:
            EngineError: it would not stay up.
        """
        self._starts += 1
        if self._starts > MAX_STARTS:
            raise EngineError(f"the engine would not stay up, {MAX_STARTS} starts in a row", op="supervise engine")
        try:
            self._server.start(stopping=stopping)
        except (EngineError, UsageError) as error:  # usage: the dead one's port may not be free yet
            if not stopping():
                log.warning("engine did not start: %s", error)
        self._failures = 0
        self._asked_at = self._healthy_since = self._answered_at = self._clock()

    def _hear(self, answered: bool) -> None:
        now = self._clock()
        if answered:
            self._failures, self._answered_at = 0, now
            return
        self._failures += 1
        self._healthy_since = now
