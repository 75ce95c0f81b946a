"""When a request is made again, when it is given up, and what is said then. Time and chance are made here."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from shared.errors import Corrupt, KeyMissing, StoreError
from shared.retry import Fault, Retry, deadline_s
from shared.store_faults import leave_alone_s

SEED = 7


@dataclass
class Clock:
    """Time that passes only in sleep and in attempts."""

    now: float = 0.0
    slept: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    print(f"seed {SEED}")
    return Clock()


def patient(clock: Clock, attempts: int = 5, for_s: float = 30.0) -> Retry:
    return Retry(attempts, for_s, rng=random.Random(SEED), clock=clock, sleep=clock.sleep)


def failing(clock: Clock, times: int, takes_s: float = 0.0) -> Callable[[], int]:
    """A call that fails so often, and then says how often it was made."""
    made = 0

    def call() -> int:
        nonlocal made
        made += 1
        clock.now += takes_s
        if made <= times:
            raise ConnectionError("reset")
        return made

    return call


def passing(error: Exception) -> Fault:
    return Fault(StoreError(f"the store: {error}", op="put", key="a/b", hint="Is it up?", retryable=True))


def throttled(error: Exception) -> Fault:
    return Fault(passing(error).error, throttled=True)


def test_a_passing_fault_is_tried_again_until_it_passes(clock: Clock):
    assert patient(clock).run(failing(clock, 4), passing) == 5
    assert len(clock.slept) == 4


def test_waits_double_and_are_jittered_by_the_passed_chance(clock: Clock):
    patient(clock).run(failing(clock, 4), passing)
    for nth, waited in enumerate(clock.slept):
        assert 0.5 <= waited / (0.2 * 2**nth) <= 1.5
    again = Clock()
    patient(again).run(failing(again, 4), passing)
    assert again.slept == clock.slept
    other = Clock()
    Retry(rng=random.Random(SEED + 1), clock=other, sleep=other.sleep).run(failing(other, 4), passing)
    assert other.slept != clock.slept


def test_the_last_error_says_operation_key_attempts_and_seconds(clock: Clock):
    with pytest.raises(StoreError) as caught:
        patient(clock, attempts=3).run(failing(clock, 99, takes_s=2.0), passing)
    error = caught.value
    assert (error.op, error.key, error.hint, error.retryable) == ("put", "a/b", "Is it up?", True)
    assert error.message == f"the store: reset (3 attempts, {6 + sum(clock.slept):.1f} s)"
    assert isinstance(error.__cause__, ConnectionError)


def test_no_attempt_begins_later_than_the_bound(clock: Clock):
    with pytest.raises(StoreError, match=r"2 attempts, 40\.\d s"):  # a timeout of 20 s, twice: the third comes too late
        patient(clock, attempts=9).run(failing(clock, 99, takes_s=20.0), passing)
    with pytest.raises(StoreError, match=r"1 attempt, 31\.0 s"):
        patient(clock).run(failing(clock, 99, takes_s=31.0), passing)


def test_a_server_that_asks_to_be_left_alone_is_left_alone_for_longer(clock: Clock):
    patient(clock).run(failing(clock, 3), throttled)
    for nth, waited in enumerate(clock.slept):
        assert 0.5 <= waited / 2**nth <= 1.5


def test_what_the_server_asks_for_is_granted(clock: Clock):
    patient(clock).run(failing(clock, 2), lambda error: Fault(passing(error).error, True, 7.0))
    assert clock.slept == [7.0, 7.0]


def test_a_server_that_asks_for_more_than_the_bound_is_told_upwards_at_once(clock: Clock):
    with pytest.raises(StoreError, match="1 attempt") as caught:
        patient(clock).run(failing(clock, 99), lambda error: Fault(passing(error).error, True, 3600.0))
    assert caught.value.retryable and clock.slept == []


@pytest.mark.parametrize("error", [KeyMissing("no such object"), StoreError("refused"), Corrupt("too large")])
def test_a_lasting_fault_is_told_at_once(clock: Clock, error: Exception):
    def call() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        patient(clock).run(call, passing)
    assert caught.value is error and clock.slept == []


def test_our_own_passing_errors_are_tried_again_as_well(clock: Clock):
    made = []

    def call() -> int:
        made.append(1)
        if len(made) < 3:
            raise StoreError("refused as existing, and nothing is there", op="put if absent", retryable=True)
        return len(made)

    assert patient(clock).run(call, passing) == 3


@pytest.mark.parametrize("size", [1, 16 << 20, 100_000_000])
def test_a_request_that_took_its_whole_deadline_is_made_once_more(clock: Clock, size: int):
    again = patient(clock).for_bytes(size)
    assert again.run(failing(clock, 1, takes_s=deadline_s(size)), passing) == 2
    with pytest.raises(StoreError, match="2 attempts"):
        again.run(failing(clock, 99, takes_s=deadline_s(size)), passing)


def test_who_is_patient_already_stays_so(clock: Clock):
    assert patient(clock, for_s=1000.0).for_bytes(1).for_s == 1000.0


def test_an_interrupt_is_no_fault(clock: Clock):
    def call() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        patient(clock).run(call, passing)
    assert clock.slept == []


def test_a_deadline_grows_with_the_bytes():
    assert deadline_s(0) == 25
    assert deadline_s(16 << 20) == 25 + 64


def test_retry_after_is_read_as_seconds_or_as_a_time_of_the_server():
    date = "Mon, 23 Nov 2026 17:00:00 GMT"
    assert leave_alone_s("120", date) == 120
    assert leave_alone_s("Mon, 23 Nov 2026 17:01:30 GMT", date) == 90
    assert leave_alone_s("Mon, 23 Nov 2026 16:00:00 GMT", date) == 0
    for nothing in ("", "soon", "-1"):
        assert leave_alone_s(nothing, date) == 0
