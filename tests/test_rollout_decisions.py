"""The pure parts of the rollout node: what to do next, how much to sample, which versions to replay."""

import pytest

from rollout.agent import Action, Seen, decide
from rollout.demo.progress import percentiles
from rollout.pace import Groups, capacity
from rollout.replay import parse_range
from rollout.router import Router
from shared.base_model import BaseIdentity
from shared.config import TrainConfig
from shared.errors import UsageError
from shared.layout import groups_of
from shared.manifest import LoraShape, Manifest
from shared.versions import Version

V1, V2 = Version(1, 1), Version(1, 2)


def manifest(version: Version) -> Manifest:
    base = BaseIdentity("qwen3_moe", "c", "w")
    lora = LoraShape(8, 16, 8, ("linear_qkv",))
    return Manifest("policy", version, None, base, lora, {}, "bf16", (), {}, {}, {}, None)


@pytest.mark.parametrize(
    ("seen", "action"),
    [
        (Seen(V1, None, True, False, True), Action.DELIVER),
        (Seen(V2, V1, True, True, True), Action.DELIVER),
        (Seen(V1, V1, True, True, True), Action.WAIT),
        (Seen(V1, V2, True, True, True), Action.WAIT),  # never backwards
        (Seen(V2, V1, True, True, False), Action.WAIT),  # no slot free: the versions in use finish first
        (Seen(V2, V1, False, False, True), Action.WAIT),  # the engine is down
        (Seen(V2, V1, True, False, True), Action.RELOAD),  # the engine was restarted
        (Seen(None, None, True, False, True), Action.WAIT),
    ],
)
def test_the_agent_decides(seen: Seen, action: Action) -> None:
    assert decide(seen) is action


def test_a_lease_keeps_a_version_from_being_idle_after_the_next_one_is_routed() -> None:
    router = Router()
    router.route(manifest(V1))
    with router.lease() as leased:
        assert leased is not None and leased.version == V1
        router.route(manifest(V2))
        assert not router.idle(V1)
        with router.lease() as later:
            assert later is not None and later.version == V2
    assert router.idle(V1)
    assert not router.idle(V2)


def test_a_lease_of_nothing_is_none_and_counts_for_no_version() -> None:
    router = Router()
    with router.lease() as leased:
        assert leased is None
    assert router.idle(V1)


TRAIN = TrainConfig(prompts_per_step=32, publish_every=2, max_staleness=1)


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (Groups(produced=0, running=0, taken=0, dropped=0), 32),  # bounded by what may run at once
        (Groups(produced=120, running=0, taken=0, dropped=0), 8),  # (1 + 1) * 64 - 120
        (Groups(produced=120, running=8, taken=0, dropped=0), 0),
        (Groups(produced=200, running=0, taken=0, dropped=0), 0),
        (Groups(produced=200, running=0, taken=64, dropped=16), 8),  # what was dropped makes room
        (Groups(produced=128, running=24, taken=128, dropped=0), 8),
    ],
)
def test_sampling_stops_where_groups_would_grow_too_stale(groups: Groups, expected: int) -> None:
    assert capacity(groups, TRAIN, max_concurrent=32) == expected


def test_a_trajectory_key_tells_its_number_of_groups() -> None:
    assert groups_of("policy/trajectories/x/node-0-ab-000001-g16.parquet") == 16
    assert groups_of("policy/trajectories/x/other.parquet") == 0


VERSIONS = [Version(1, 0), Version(1, 1), Version(1, 2), Version(2, 2), Version(2, 3)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", VERSIONS),
        ("latest", [Version(2, 3)]),
        ("1..2", [Version(1, 1), Version(1, 2), Version(2, 2)]),
        ("3", [Version(2, 3)]),
        ("0001-000001..0002-000002", [Version(1, 1), Version(1, 2), Version(2, 2)]),
    ],
)
def test_a_range_of_versions_is_read_as_a_person_means_it(text: str, expected: list[Version]) -> None:
    assert parse_range(text, VERSIONS) == expected


@pytest.mark.parametrize("text", ["7", "x..y", "0009-000001"])
def test_a_range_that_fits_nothing_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        parse_range(text, VERSIONS)


def test_percentiles_of_few_values_are_honest() -> None:
    assert percentiles([]) == {"p50": 0.0, "p99": 0.0}
    assert percentiles([2.0]) == {"p50": 2.0, "p99": 2.0}
    assert percentiles([1.0, 2.0, 3.0])["p50"] == 2.0
