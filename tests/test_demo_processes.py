"""The demo's children end with it: asked to end, hung up on, or killed."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from engine_fixtures import group_members, wait_until

from rollout.demo.processes import Child
from shared.errors import LorasyncError

DEMO = """
import signal, sys
from pathlib import Path
from rollout.demo.processes import Child, end_in_order
end_in_order()
with Child(["versions", "--config", sys.argv[1]], Path(sys.argv[2])) as child:
    print(child.pid, flush=True)
    while True:
        signal.pause()
"""


@dataclass(frozen=True)
class Running:
    demo: subprocess.Popen[bytes]
    group: int  # of its child


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    """A parent with a `lorasync` command that waits for ever: its configuration is a pipe that says nothing."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    demo = subprocess.Popen([sys.executable, "-c", DEMO, pipe, tmp_path / "log"], stdout=subprocess.PIPE)
    assert demo.stdout is not None
    group = int(demo.stdout.readline())
    writer = os.open(pipe, os.O_WRONLY)  # returns once the command reads
    yield Running(demo, group)
    demo.kill()
    demo.communicate()
    os.close(writer)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_demo_that_is_asked_to_end_stops_its_children_first(running: Running, number: signal.Signals) -> None:
    running.demo.send_signal(number)
    assert running.demo.wait(30) == 128 + number
    assert group_members(running.group) == []


def test_a_killed_demo_takes_its_children_with_it(running: Running) -> None:
    assert group_members(running.group) != []
    running.demo.kill()
    wait_until(lambda: group_members(running.group) == [], 10)


def test_a_child_that_failed_says_so_with_its_last_line(tmp_path: Path) -> None:
    with Child(["versions", "--config", str(tmp_path / "nowhere.toml")], tmp_path / "log") as child:

        def ended() -> bool:
            try:
                return not child.running()
            except LorasyncError:
                return True

        wait_until(ended, 30)
        with pytest.raises(LorasyncError, match=r"exit code 2: .*no such configuration file"):
            child.running()
