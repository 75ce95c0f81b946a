"""Taking trajectories: the staleness bound, the order, exactly once, and what is said when none come."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from trajectory_fleet import make_group, put_groups

from publisher.lineage import Lineage
from shared.errors import LorasyncError, StoreError
from shared.layout import Layout
from shared.local_store import LocalStore
from shared.outage import QUIET_S
from shared.store import Entry
from shared.versions import Version
from trainer.intake import LIST_ALL_EVERY_S, Group, Intake, Position, Rules

ADAPTER = "policy"
RULES = Rules(group_size=4, vocab_size=128, max_tokens=64)
V = Version
FIRST_LIFE = Lineage(1)


class Clock:
    """Time that passes only by waiting; `at` runs something when its second comes."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events: list[tuple[float, Any]] = []

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds
        for event in [event for event in self.events if event[0] <= self.now]:
            self.events.remove(event)
            event[1]()


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(f"file://{tmp_path}")


@pytest.fixture
def clock() -> Clock:
    return Clock()


def intake_of(store, clock: Clock, lineage: Lineage = FIRST_LIFE, position: Position | None = None, staleness: int = 1):
    return Intake(
        store,
        Layout(ADAPTER),
        lineage,
        RULES,
        max_staleness=staleness,
        position=position,
        clock=clock,
        wait=clock.wait,
    )


def put(store: LocalStore, version: Version, file: str, *names: str, **changes: Any) -> str:
    rng = random.Random(file)
    return put_groups(store, ADAPTER, version, file, [make_group(version, name, rng, **changes) for name in names])


def names(groups: list[Group]) -> list[str]:
    return [group.samples[0].group for group in groups]


def take(intake: Intake, count: int, current: Version) -> list[str]:
    return names(intake.take(count, current, timeout_s=5.0))


def test_groups_are_taken_oldest_version_first_then_by_file_and_place_in_it(store, clock):
    put(store, V(1, 1), "a", "e", "f")
    put(store, V(1, 0), "b", "c", "d")
    put(store, V(1, 0), "a", "a", "b")
    intake = intake_of(store, clock)
    assert take(intake, 3, V(1, 1)) == ["a", "b", "c"]
    assert take(intake, 3, V(1, 1)) == ["d", "e", "f"]


def test_every_group_is_taken_exactly_once(store, clock):
    put(store, V(1, 0), "a", *(str(i) for i in range(10)))
    intake = intake_of(store, clock)
    taken = take(intake, 4, V(1, 0)) + take(intake, 4, V(1, 0))
    assert taken == [str(i) for i in range(8)]
    put(store, V(1, 0), "b", "late")
    assert take(intake, 3, V(1, 0)) == ["8", "9", "late"]
    with pytest.raises(LorasyncError, match="stalled"):
        take(intake, 1, V(1, 0))


def test_groups_older_than_the_bound_are_dropped_and_counted(store, clock):
    put(store, V(1, 2), "a", "stale")
    put(store, V(1, 3), "a", "old enough")
    put(store, V(1, 4), "a", "fresh")
    intake = intake_of(store, clock)
    assert take(intake, 2, V(1, 4)) == ["old enough", "fresh"]
    assert (intake.position.taken, intake.position.dropped, intake.position.consumed) == (2, {"stale": 1}, 3)


def test_a_group_that_grows_stale_while_it_waits_is_dropped(store, clock):
    put(store, V(1, 0), "a", "a", "b", "c")
    intake = intake_of(store, clock)
    assert take(intake, 2, V(1, 1)) == ["a", "b"]
    put(store, V(1, 2), "a", "d")
    assert take(intake, 1, V(1, 2)) == ["d"]
    assert intake.position.dropped == {"stale": 1}


def test_a_group_is_as_old_as_its_oldest_token(store, clock):
    group = make_group(V(1, 3), "mixed", random.Random(0), token_versions=None)
    mixed = [
        sample.__class__(**{**vars(sample), "token_versions": (V(1, 1), *[V(1, 3)] * (len(sample.tokens) - 1))})
        for sample in group
    ]
    put_groups(store, ADAPTER, V(1, 3), "a", [mixed])
    put(store, V(1, 3), "b", "fresh")
    intake = intake_of(store, clock)
    assert take(intake, 1, V(1, 3)) == ["fresh"]
    assert intake.position.dropped == {"stale": 1}


def test_a_resumed_trainer_takes_what_its_ancestors_made_and_drops_what_was_thrown_away(store, clock):
    put(store, V(1, 5), "a", "ancestor")
    put(store, V(1, 6), "a", "thrown away")
    put(store, V(2, 5), "a", "own")
    put(store, V(3, 5), "a", "a later life's")
    intake = intake_of(store, clock, Lineage(1).resumed(2, number=5))
    assert take(intake, 2, V(2, 6)) == ["ancestor", "own"]
    assert intake.position.dropped == {"not_an_ancestor": 2}


def test_a_position_that_went_through_json_decides_about_nothing_twice(store, clock):
    put(store, V(1, 0), "a", "a", "b", "c")
    put(store, V(1, 0), "b", "d", "e")
    first = intake_of(store, clock)
    assert take(first, 4, V(1, 0)) == ["a", "b", "c", "d"]
    saved = json.dumps(first.position.to_json())
    assert take(first, 1, V(1, 0)) == ["e"]
    resumed = intake_of(store, clock, Lineage(1).resumed(2, 0), Position.from_json(json.loads(saved)))
    assert resumed.position.consumed == 4
    assert take(resumed, 1, V(2, 0)) == ["e"]


def test_a_saved_position_does_not_change_when_the_intake_goes_on(store, clock):
    put(store, V(1, 0), "a", "a", "b", "c")
    intake = intake_of(store, clock)
    take(intake, 1, V(1, 0))
    saved = intake.position.to_json()
    before = json.dumps(saved)
    take(intake, 1, V(1, 0))
    assert json.dumps(saved) == before


def test_files_that_retention_removed_are_forgotten(store, clock):
    key = put(store, V(1, 0), "a", "a")
    put(store, V(1, 0), "b", "b", "c")
    intake = intake_of(store, clock)
    take(intake, 2, V(1, 0))
    store.delete(key)
    put(store, V(1, 0), "c", "d")
    take(intake, 2, V(1, 0))
    assert key not in intake.position.decided
    assert intake.position.consumed == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"size": 3},
        {"prompt_tokens": ()},
        {"prompt_tokens": tuple(range(64))},
        {"prompt_tokens": (128,)},
        {"prompt_tokens": (-1,)},
        {"reward": math.nan},
        {"tokens": (3, 4), "logprobs": (-1.0, -math.inf), "token_versions": (V(1, 0), V(1, 0))},
    ],
    ids=str,
)
def test_a_group_that_breaks_the_rules_is_dropped_and_the_rest_of_its_file_is_kept(store, clock, changes):
    good, bad = make_group(V(1, 0), "good", random.Random(0)), make_group(V(1, 0), "bad", random.Random(1), **changes)
    put_groups(store, ADAPTER, V(1, 0), "a", [bad, good])
    intake = intake_of(store, clock)
    assert take(intake, 1, V(1, 0)) == ["good"]
    assert intake.position.dropped == {"malformed": 1}


def test_a_file_that_is_no_parquet_is_dropped_once_and_never_read_again(store, clock):
    store.put(f"{Layout(ADAPTER).trajectories(V(1, 0))}/a-g8.parquet", b"PAR1 but no more")
    put(store, V(1, 0), "b", "b", "c")
    intake = intake_of(store, clock)
    assert take(intake, 1, V(1, 0)) + take(intake, 1, V(1, 0)) == ["b", "c"]
    assert intake.position.dropped == {"corrupt": 8}  # all its groups, or samplers would wait for them for ever


def test_groups_that_come_while_it_waits_are_taken_when_there_are_enough(store, clock):
    put(store, V(1, 0), "a", "a")
    clock.events = [(2.0, lambda: put(store, V(1, 0), "b", "b")), (6.0, lambda: put(store, V(1, 0), "c", "c"))]
    # Each arrival renews the 5 seconds, so the third, at 6 s, is in time.
    assert take(intake_of(store, clock), 3, V(1, 0)) == ["a", "b", "c"]
    assert clock.now == 6.0


def test_when_nothing_comes_the_error_says_what_is_known_of_the_fleet(store, clock):
    put(store, V(1, 0), "a", "a")
    with pytest.raises(
        LorasyncError, match=r"fleet is stalled \(1 of 2 groups here, no rollout node has ever"
    ) as caught:
        take(intake_of(store, clock), 2, V(1, 0))
    assert caught.value.retryable and "lorasync status" in caught.value.hint
    store.put(Layout(ADAPTER).node("gpu-7"), b"{}")
    with pytest.raises(LorasyncError, match="nodes that ever reported: gpu-7"):
        take(intake_of(store, clock), 2, V(1, 0))


def test_the_heartbeat_ends_a_wait(store, clock):
    def fenced() -> None:
        raise LorasyncError("another trainer took over")

    with pytest.raises(LorasyncError, match="took over"):
        intake_of(store, clock).take(1, V(1, 0), 5.0, heartbeat=fenced)


def test_groups_that_can_never_be_taken_do_not_renew_the_timeout(store, clock):
    for second in range(1, 20):
        clock.events += [
            (second, lambda second=second: put(store, V(9, 9), f"foreign-{second}", str(second))),
            (second, lambda second=second: put(store, V(1, 0), f"short-{second}", str(second), size=1)),
        ]
    with pytest.raises(LorasyncError, match="no new trajectories for 5 s"):
        take(intake_of(store, clock), 1, V(1, 0))
    assert clock.now == 6.0


def test_a_file_whose_name_is_no_key_is_dropped_with_the_groups_that_it_promises(store, clock):
    key = put(store, V(1, 0), "a", "a", "b")
    file = store.root / key
    file.with_name(f"copy of {file.name}").write_bytes(file.read_bytes())
    intake = intake_of(store, clock)
    assert take(intake, 2, V(1, 0)) == ["a", "b"]
    assert intake.position.dropped == {"corrupt": 2}


def below_of(position: Position) -> tuple[int, int, int]:
    return len(position.decided), position.floor, position.below


def test_what_is_remembered_does_not_grow_with_the_run_and_late_files_are_still_counted_once(store, clock):
    intake = intake_of(store, clock)
    for number in range(20):
        put(store, V(1, number), "a", f"{number}-0", f"{number}-1")
        assert take(intake, 2, V(1, number)) == [f"{number}-0", f"{number}-1"]
    assert below_of(intake.position) == (2, 18, 36)
    put(store, V(1, 3), "late", "x", "y", "z")
    put(store, V(1, 19), "b", "fresh")
    clock.wait(LIST_ALL_EVERY_S)
    assert take(intake, 1, V(1, 19)) == ["fresh"]
    assert (intake.position.dropped, intake.position.consumed) == ({"stale": 3}, 44)
    put(store, V(1, 19), "c", "fresh too")
    assert take(intake, 1, V(1, 19)) == ["fresh too"]
    assert intake.position.dropped == {"stale": 3}


def test_a_resumed_trainer_with_another_bound_takes_nothing_twice_from_below_the_floor(store, clock):
    put(store, V(1, 0), "a", "a", "b", "c")
    first = intake_of(store, clock, staleness=0)
    assert take(first, 2, V(1, 0)) == ["a", "b"]
    put(store, V(1, 1), "a", "d")
    assert take(first, 1, V(1, 1)) == ["d"]
    assert below_of(first.position) == (1, 1, 3)
    position = Position.from_json(json.loads(json.dumps(first.position.to_json())))
    resumed = intake_of(store, clock, Lineage(1).resumed(2, 1), position, staleness=5)
    put(store, V(2, 1), "a", "e")
    assert take(resumed, 1, V(2, 1)) == ["e"]
    assert (resumed.position.taken, resumed.position.dropped) == (4, {"stale": 1})


def test_a_half_taken_file_that_grew_stale_before_the_resume_is_counted_in_full(store, clock):
    put(store, V(1, 0), "a", "a", "b", "c")
    first = intake_of(store, clock, staleness=0)
    assert take(first, 1, V(1, 0)) == ["a"]
    resumed = intake_of(
        store, clock, Lineage(1).resumed(2, 1), Position.from_json(first.position.to_json()), staleness=0
    )
    put(store, V(2, 1), "a", "d")
    assert take(resumed, 1, V(2, 1)) == ["d"]
    assert (resumed.position.dropped, resumed.position.consumed) == ({"stale": 2}, 4)


def test_files_below_the_floor_that_retention_removed_are_forgotten(store, clock):
    key = put(store, V(1, 0), "a", "a", "b")
    intake = intake_of(store, clock, staleness=0)
    put(store, V(1, 1), "a", "c")
    assert take(intake, 1, V(1, 1)) == ["c"]
    assert below_of(intake.position) == (1, 1, 2)
    store.delete(key)
    put(store, V(1, 1), "b", "d")
    clock.wait(LIST_ALL_EVERY_S)
    assert take(intake, 1, V(1, 1)) == ["d"]
    assert (intake.position.below, intake.position.dropped) == (0, {"stale": 2})


class CountingStore(LocalStore):
    """Counts its listings, and what they answered."""

    listings = 0
    listed = 0

    def list(self, prefix: str, after: str = "") -> list[Entry]:
        self.listings += 1
        entries = super().list(prefix, after)
        self.listed += len(entries)
        return entries


def test_the_store_is_looked_at_only_while_too_few_groups_wait(store, clock):
    counting = CountingStore(store.url)
    put(store, V(1, 0), "a", *(str(i) for i in range(6)))
    intake = intake_of(counting, clock)
    assert [take(intake, 2, V(1, 0)) for _ in range(3)] == [["0", "1"], ["2", "3"], ["4", "5"]]
    assert counting.listings == 1


def test_a_look_lists_what_may_still_count_and_the_whole_run_once_a_minute(store, clock):
    counting = CountingStore(store.url)
    intake = intake_of(counting, clock)
    for number in range(120):
        put(store, V(1, number), "a", f"{number}-0", f"{number}-1")
        assert take(intake, 2, V(1, number)) == [f"{number}-0", f"{number}-1"]
        clock.wait(1.0)
    assert counting.listings == 120
    whole = 1 + 61  # at the first look, and a minute later
    since_then = sum(range(2, 61)) + sum(range(3, 62))  # each look lists from the staleness bound of that minute on
    assert counting.listed == whole + since_then
    assert (intake.position.consumed, intake.position.dropped) == (240, {})


def test_files_of_a_life_before_are_seen_by_each_look_while_they_may_count(store, clock):
    """A node goes on serving version 5 of epoch 1 until epoch 2, which resumed there, publishes."""
    put(store, V(1, 2), "a", "old")
    put(store, V(1, 6), "a", "thrown away")
    intake = intake_of(store, clock, Lineage(1).resumed(2, number=5))
    put(store, V(1, 5), "a", "a")
    assert take(intake, 1, V(2, 5)) == ["a"]
    put(store, V(1, 4), "b", "b")
    put(store, V(2, 5), "b", "c")
    assert take(intake, 2, V(2, 5)) == ["b", "c"]
    for number in range(6, 10):
        clock.wait(LIST_ALL_EVERY_S / 2)
        put(store, V(2, number), "b", str(number))
        assert take(intake, 1, V(2, number)) == [str(number)]
    assert intake.position.dropped == {"stale": 1, "not_an_ancestor": 1}
    assert intake.position.consumed == 9


def test_however_the_listings_fall_each_group_is_decided_once(store, clock):
    """Files come in any order and late; at the end as many groups are taken or dropped as there are."""
    seed = 7
    rng, intake, there = random.Random(seed), intake_of(store, clock), 0
    for number in range(60):
        for file in range(rng.randrange(1, 4)):
            late = rng.choice((0, 0, 0, 1, 2, 5))
            size = rng.randrange(1, 4)
            put(store, V(1, max(0, number - late)), f"{number}-{file}", *(f"{number}-{file}-{i}" for i in range(size)))
            there += size
        put(store, V(1, number), f"{number}-last", f"{number}")
        there += 1
        intake.take(1, V(1, number), timeout_s=5.0)
        clock.wait(rng.choice((1.0, 20.0)))
    clock.wait(LIST_ALL_EVERY_S)
    put(store, V(1, 99), "end", "end")
    assert take(intake, 1, V(1, 99)) == ["end"]
    assert intake.position.consumed == there + 1, f"seed {seed}"


class Flaky(LocalStore):
    """Fails its first listings."""

    failures = 3
    retryable = True

    def list(self, prefix: str, after: str = "") -> list[Entry]:
        if self.failures:
            self.failures -= 1
            raise StoreError("connection reset", op="list", retryable=self.retryable)
        return super().list(prefix, after)


def test_a_store_that_fails_for_a_while_is_waited_for_and_said_twice(store, clock, caplog):
    put(store, V(1, 0), "a", "a")
    intake = intake_of(Flaky(store.url), clock)
    with caplog.at_level("WARNING"):
        assert take(intake, 1, V(1, 0)) == ["a"]
        clock.wait(QUIET_S)
        put(store, V(1, 0), "b", "b")
        assert take(intake, 1, V(1, 0)) == ["b"]
    assert intake.store_failures == 3
    said = [record.message for record in caplog.records]
    assert len(said) == 2, "once when it begins to fail, once when it answers again"
    assert "connection reset" in said[0] and "answers again seconds=3.0 failures=3" in said[1]


def test_a_store_that_refuses_for_good_is_not(store, clock):
    flaky = Flaky(store.url)
    flaky.retryable = False
    with pytest.raises(StoreError, match="connection reset"):
        take(intake_of(flaky, clock), 1, V(1, 0))
