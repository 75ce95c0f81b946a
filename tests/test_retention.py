"""The retention rule alone: what goes, what stays, and why."""

import random

import pytest

from publisher.retention import Rollback, Rule, Seen, Stored, decide, unneeded
from shared.fates import Fate
from shared.leases import Leased
from shared.versions import Version

NOW = 1_700_000_000.0
DAY_S = 86400.0


def v(number: int, epoch: int = 1) -> Version:
    return Version(epoch, number)


def seen(numbers: range, **changes: object) -> Seen:
    """Versions committed a minute apart, the last one just now."""
    last = numbers[-1] if numbers else 0
    facts: dict[str, object] = {
        "now": NOW,
        "committed": {v(n): NOW - 60.0 * (last - n) for n in numbers},
        "void": frozenset(),
        "fates": {},
        "leased": Leased({}),
        "rollbacks": (),
        "stored": {v(n): Stored((f"k{n}",), 10, NOW - 60.0 * (last - n)) for n in numbers},
    }
    return Seen(**{**facts, **changes})  # type: ignore[arg-type]


def numbers(versions: object) -> list[int]:
    return [version.number for version in versions]  # type: ignore[attr-defined]


def test_by_default_everything_is_kept():
    assert decide(seen(range(1000)), Rule()).collect == ()


@pytest.mark.parametrize(("keep", "staleness", "kept"), [(5, 0, 5), (1, 0, 2), (1, 4, 6), (8, 4, 8)])
def test_the_newest_are_kept_and_never_fewer_than_staleness_needs(keep: int, staleness: int, kept: int):
    decision = decide(seen(range(20)), Rule(keep_versions=keep, max_staleness=staleness))
    assert numbers(decision.collect) == list(range(20 - kept))


def test_fewer_versions_than_are_to_be_kept_all_stay():
    assert decide(seen(range(3)), Rule(keep_versions=5)).collect == ()
    assert decide(seen(range(0)), Rule(keep_versions=5)).collect == ()


def test_the_young_are_kept_whatever_their_number():
    decision = decide(seen(range(20)), Rule(keep_versions=2, keep_younger_s=600.0))
    assert numbers(decision.collect) == list(range(10))
    assert set(decision.kept.values()) == {"young"}


def test_pinned_leased_and_rolled_back_versions_are_kept_and_it_is_said_why():
    look = seen(
        range(10),
        fates={v(0): Fate.PINNED, v(1): Fate.UNPINNED, v(5): None},
        leased=Leased({v(2): ("node-a", "node-b"), v(9): ("node-a",)}),
        rollbacks=(Rollback(v(3), v(3, epoch=2), NOW), Rollback(v(4), v(4, epoch=3), NOW)),
        void=frozenset({v(4, epoch=3)}),
    )
    decision = decide(look, Rule(keep_versions=2))
    assert numbers(decision.collect) == [1, 4, 6, 7]
    assert {version.number: why for version, why in decision.kept.items()} == {
        0: "pinned",
        2: "leased by node-a, node-b",
        3: "rolled back to by 0002-000003",
        5: "its fate can't be read",
    }


def test_a_lease_that_nobody_can_read_keeps_everything():
    decision = decide(seen(range(10), leased=Leased({}, ("policy/leases/odd.json",))), Rule(keep_versions=2))
    assert decision.collect == () and len(decision.kept) == 8


def test_what_a_killed_collector_decided_comes_first_even_where_the_rule_keeps_everything():
    look = seen(range(10), fates={v(3): Fate.COLLECTED})
    assert numbers(decide(look, Rule()).collect) == [3]
    assert numbers(decide(look, Rule(keep_versions=2)).collect) == [3, 0, 1, 2, 4, 5, 6, 7]


def test_collected_versions_do_not_count_among_the_newest():
    decision = decide(seen(range(10), fates={v(8): Fate.COLLECTED}), Rule(keep_versions=2))
    assert numbers(decision.collect) == [8, 0, 1, 2, 3, 4, 5, 6], "7 and 9 are the newest two"


def test_old_attempts_and_old_rollbacks_without_a_manifest_are_orphans_and_young_ones_are_not():
    stored = {v(7): Stored(("k",), 10, NOW - 3599), v(8): Stored(("k",), 10, NOW - 3601), v(1): Stored(("k",), 10, 0)}
    rollbacks = (Rollback(v(1), v(1, epoch=2), NOW - 3601), Rollback(v(1), v(1, epoch=3), NOW - 1))
    decision = decide(seen(range(3), stored=stored, rollbacks=rollbacks), Rule(orphan_after_s=3600))
    assert decision.orphans == (v(8), v(1, epoch=2))


def test_an_orphan_that_is_void_already_is_none():
    look = seen(range(3), stored={v(8): Stored(("k",), 10, 0.0)}, void=frozenset({v(8)}))
    assert decide(look, Rule(orphan_after_s=3600)).orphans == ()


def test_data_of_a_void_goes_unless_it_or_a_rollback_that_uses_it_is_needed():
    void = {v(0), v(1), v(2), v(3), v(1, epoch=2), v(3, epoch=2)}
    rollbacks = (
        Rollback(v(1), v(1, epoch=2), NOW),  # void too
        Rollback(v(2), v(2, epoch=2), NOW),  # alive, or not committed yet
        Rollback(v(3), v(3, epoch=2), NOW),  # void, and leased
    )
    leased = Leased({v(0): ("node",), v(3, epoch=2): ("node",)})
    stored = [v(n) for n in range(5)]
    assert unneeded(void, leased, rollbacks, stored) == [v(1)]
    assert unneeded(void, Leased({}, ("odd",)), rollbacks, stored) == []


@pytest.mark.parametrize("seed", range(200))
def test_whatever_is_seen_the_latest_the_newest_and_what_is_held_are_never_chosen(seed: int):
    """Replay one: pytest tests/test_retention.py -k 'never_chosen and <seed>'."""
    rng = random.Random(seed)
    versions = [v(n, epoch) for epoch in (1, 2) for n in range(rng.randint(0, 8))]
    fates = [None, *Fate]
    look = seen(
        range(0),
        committed={version: NOW - rng.uniform(0, 2 * DAY_S) for version in versions},
        fates={version: rng.choice(fates) for version in versions if rng.random() < 0.4},
        leased=Leased({version: ("node",) for version in versions if rng.random() < 0.2}),
        rollbacks=tuple(Rollback(version, v(version.number, 3), NOW) for version in versions if rng.random() < 0.1),
    )
    rule = Rule(rng.randint(0, 4), rng.randint(0, 3), rng.choice([0.0, DAY_S]))
    decision = decide(look, rule)
    alive = [version for version in versions if look.fates.get(version) is not Fate.COLLECTED]
    chosen = set(decision.collect) & set(alive)
    newest = set(sorted(alive)[-max(1, rule.newest) :]) if rule.newest else set(alive)
    used = {rollback.source for rollback in look.rollbacks}
    pinned = {version for version, fate in look.fates.items() if fate in (Fate.PINNED, None)}
    young = {version for version in alive if NOW - look.committed[version] < rule.keep_younger_s}
    assert not chosen & (newest | set(look.leased.holders_of) | used | pinned | young), f"seed {seed}"
    assert chosen | set(decision.kept) | newest == set(alive), f"seed {seed}: all are accounted for"
