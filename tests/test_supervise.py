"""When the node starts its own engine again: a death, a hang, a start that fails, and when it gives up."""

from collections.abc import Callable

import pytest

from rollout.supervise import HEALTH_INTERVAL_S, HUNG_AFTER_S, MAX_STARTS, STEADY_S, Pulse, Supervisor
from shared.errors import EngineError, LorasyncError, UsageError


class FakeServer:
    """A server whose process and health are switches, and a clock that moves when told."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.alive = self.healthy = True
        self.done_for = False
        self.asked = self.starts = 0
        self.start_error: LorasyncError | None = None

    def start(self, *, stopping: Callable[[], bool]) -> None:
        self.starts += 1
        if self.start_error is not None:
            self.alive = False
            raise self.start_error
        self.alive = self.healthy = True
        self.done_for = False

    def running(self) -> bool:
        return self.alive

    def pulse(self) -> Pulse:
        self.asked += 1
        return Pulse.DONE_FOR if self.done_for else Pulse.WELL if self.healthy else Pulse.SILENT


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


@pytest.fixture
def supervisor(server: FakeServer) -> Supervisor:
    return Supervisor(server, clock=lambda: server.now)


def failure_within(supervisor: Supervisor, server: FakeServer, seconds: float, *, serving: bool = False) -> str:
    """Look twice a second, as the node does, until something is wrong or the time is over."""
    end = server.now + seconds
    while server.now < end:
        if failure := supervisor.failure(serving=serving):
            return failure
        server.now += 0.5
    return ""


def never() -> bool:
    return False


def test_a_dead_process_is_seen_at_once(supervisor: Supervisor, server: FakeServer) -> None:
    assert supervisor.failure(serving=True) == ""
    server.alive = False
    assert supervisor.failure(serving=True) == "died"
    supervisor.restart(never)
    assert (server.starts, supervisor.failure(serving=False)) == (1, "")


def test_a_server_that_lives_and_does_not_answer_is_hung_after_a_while(
    supervisor: Supervisor, server: FakeServer
) -> None:
    server.healthy = False
    assert failure_within(supervisor, server, HUNG_AFTER_S) == ""
    assert "has not answered" in failure_within(supervisor, server, 2 * HEALTH_INTERVAL_S, serving=True)
    supervisor.restart(never)
    assert failure_within(supervisor, server, 2 * HUNG_AFTER_S) == ""


def test_a_server_that_says_it_is_done_for_is_not_waited_for(supervisor: Supervisor, server: FakeServer) -> None:
    server.done_for = True
    assert failure_within(supervisor, server, 2 * HEALTH_INTERVAL_S, serving=True) == "is done for"
    supervisor.restart(never)
    assert failure_within(supervisor, server, HUNG_AFTER_S) == ""


def test_one_answer_in_between_is_no_hang(supervisor: Supervisor, server: FakeServer) -> None:
    for _ in range(5):
        server.healthy = False
        assert failure_within(supervisor, server, HUNG_AFTER_S - HEALTH_INTERVAL_S) == ""
        server.healthy = True
        assert failure_within(supervisor, server, HEALTH_INTERVAL_S + 0.5) == ""


def test_health_is_not_asked_at_every_look(supervisor: Supervisor, server: FakeServer) -> None:
    failure_within(supervisor, server, 10 * HEALTH_INTERVAL_S)
    assert server.asked < 11


@pytest.mark.parametrize("error", [EngineError("died", op="serve"), UsageError("port taken", op="start engine")])
def test_a_start_that_fails_is_tried_again_and_not_for_ever(
    error: LorasyncError, supervisor: Supervisor, server: FakeServer
) -> None:
    server.alive, server.start_error = False, error
    for _ in range(MAX_STARTS):
        supervisor.restart(never)
        assert supervisor.failure(serving=False) == "died"
    with pytest.raises(EngineError, match="would not stay up"):
        supervisor.restart(never)
    assert server.starts == MAX_STARTS


@pytest.mark.parametrize(("serving", "seconds"), [(True, 1.0), (False, STEADY_S + HEALTH_INTERVAL_S)])
def test_an_engine_that_serves_or_stays_healthy_has_all_its_starts_again(
    serving: bool, seconds: float, supervisor: Supervisor, server: FakeServer
) -> None:
    for _ in range(2 * MAX_STARTS):
        server.alive = False
        supervisor.restart(never)
        assert failure_within(supervisor, server, seconds, serving=serving) == ""


def test_an_engine_that_dies_soon_after_each_start_is_given_up(supervisor: Supervisor, server: FakeServer) -> None:
    for _ in range(MAX_STARTS):
        supervisor.restart(never)
        assert failure_within(supervisor, server, STEADY_S / 2) == ""
    with pytest.raises(EngineError):
        supervisor.restart(never)
