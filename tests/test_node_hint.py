"""A node's name: one living node has it, a dead one's is free, and who was overtaken in silence stops."""

from pathlib import Path
from typing import Any

import pytest

from rollout.node_hint import LATE_S, NodeHint
from shared.catalog import Catalog
from shared.errors import UsageError
from shared.status import StatusReader
from shared.stores import open_store

RENEW_S = 10.0


class Host:
    """Time passes only by sleeping, and other nodes renew their hints meanwhile, each when it is due."""

    def __init__(self, folder: Path) -> None:
        self.catalog = Catalog(open_store(str(folder)), "policy")
        self.now, self.alive = 1000.0, list[NodeHint]()
        self.told_at = self.now

    def node(self, name: str = "gpu-7") -> NodeHint:
        return NodeHint(self.catalog, name, renew_s=RENEW_S, clock=lambda: self.now, sleep=self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.now - self.told_at >= RENEW_S:
            for hint in self.alive:
                self.tell(hint)

    def tell(self, hint: NodeHint, state: str = "serving") -> None:
        hint.tell({"node": "gpu-7", "updated_at": self.now, "state": state})
        self.told_at = self.now

    @property
    def standing(self) -> dict[str, Any]:
        return self.catalog.node("gpu-7") or {}


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_a_second_node_of_a_living_nodes_name_is_refused(host: Host) -> None:
    first = host.node()
    first.claim()
    host.alive.append(first)
    with pytest.raises(UsageError, match="another node is running under the name gpu-7"):
        host.node().claim()
    host.tell(first)  # undisturbed
    host.node("gpu-8").claim()


@pytest.mark.parametrize("killed_for_s", [0.0, 4.0, 12.0])
def test_a_killed_nodes_name_is_free_when_it_would_have_renewed_its_hint(host: Host, killed_for_s: float) -> None:
    host.node().claim()
    host.now += killed_for_s
    before = host.now
    second = host.node()
    second.claim()
    assert host.now - before == pytest.approx(max(0.0, RENEW_S - killed_for_s) + LATE_S)
    host.tell(second)


def test_a_nodes_silence_is_told_when_it_missed_renewals_and_not_between_two(host: Host) -> None:
    host.node().claim()
    reader = StatusReader(host.catalog, clock=lambda: host.now)
    for later_s, silent in ((RENEW_S, False), (50.0, False), (60.0, True)):
        host.now += later_s
        [node] = reader.read().nodes
        assert (node.silent, node.renew_s) == (silent, RENEW_S)
        host.now -= later_s
    seldom = NodeHint(host.catalog, "gpu-8", renew_s=100.0, clock=lambda: host.now)
    seldom.claim()
    host.now += 150.0
    assert [node.silent for node in reader.read().nodes] == [True, False]


@pytest.mark.parametrize(("state", "later_s"), [("stopped", 0.0), ("serving", 60.0)])
def test_a_name_that_was_given_back_or_left_long_ago_is_taken_at_once(host: Host, state: str, later_s: float) -> None:
    first = host.node()
    first.claim()
    host.tell(first, state)
    host.now += later_s
    before = host.now
    host.node().claim()
    assert host.now == before


def test_who_was_silent_while_another_took_its_name_stops_and_leaves_the_others_hint(host: Host) -> None:
    silent, other = host.node(), host.node()
    silent.claim()
    other.claim()
    host.tell(other)
    with pytest.raises(UsageError, match="another node"):
        host.tell(silent, "stopped")
    assert host.standing["state"] == "serving"
    host.tell(other)


def test_a_hint_of_an_earlier_release_is_taken_over(host: Host) -> None:
    host.catalog.store.put(host.catalog.layout.node("gpu-7"), b'{"node":"gpu-7","state":"serving","updated_at":"x"}')
    hint = host.node()
    hint.claim()
    host.tell(hint)
