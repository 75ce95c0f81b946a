"""A demo that is told to stop takes its trainer and its rollout node with it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from engine_fixtures import free_port, wait_until

START_S, STOP_S = 120.0, 60.0


def commands_in(folder: Path) -> list[str]:
    """The commands of living `lorasync` processes and engines whose arguments or log name the folder."""
    found = []
    for process in psutil.process_iter():
        try:
            line = process.cmdline()
        except psutil.Error:
            continue
        if str(folder) in " ".join(line):
            found.append(next((word for word in line if word in ("demo", "train", "rollout")), line[-1]))
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_its_processes_end_with_it(tmp_path: Path, number: signal.Signals):
    words = ["demo", "--out", str(tmp_path), "--port", str(free_port())]
    demo = subprocess.Popen(
        [sys.executable, "-P", "-m", "shared.console", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: {"train", "rollout"} <= set(commands_in(tmp_path)), START_S)
        demo.send_signal(number)
        assert demo.wait(STOP_S) == {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
        assert commands_in(tmp_path) == []
    finally:
        demo.kill()
        demo.wait()
