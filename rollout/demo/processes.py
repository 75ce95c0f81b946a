"""Children of the demo: `lorasync` commands as operating-system processes with a log each.

They are started by command, share nothing with the demo but the store's URL, and end with it: SIGTERM first, so that a
node drains and stops its engine, SIGKILL for what does not go; and at once if the demo is killed (`shared.lifeline`).
"""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

from shared.errors import LorasyncError
from shared.lifeline import ProcessGroup

STOP_TIMEOUT_S = 30.0
ENDING = (signal.SIGTERM, signal.SIGHUP)


class Child:
    """One `lorasync` subcommand. Use as a context: leaving it stops the process."""

    def __init__(self, arguments: Sequence[str], log: Path, *, threads: int = 1) -> None:
        self.name, self.log = arguments[0], log
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        self._group = ProcessGroup([sys.executable, "-P", "-m", "shared.console", *arguments], environment, log)

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Of the command, which leads a process group of its own."""
        return self._group.pid

    def running(self) -> bool:
        """Whether it still runs.

        Raises:
            LorasyncError: it ended with an error; the message carries its last line.
        """
        code = self._group.exit_code()
        if code is None:
            return True
        if code != 0:
            lines = self.log.read_text(errors="replace").strip().splitlines()
            last = lines[-1] if lines else "(no output)"
            raise LorasyncError(f"lorasync {self.name} ended with exit code {code}: {last}", hint=f"See {self.log}")
        return False

    def stop(self) -> None:
        """End it, gently first; returns when it is gone."""
        self._group.stop(STOP_TIMEOUT_S)


def end_in_order() -> None:
    """Turn SIGTERM, and SIGHUP unless it is ignored (nohup), into SystemExit(128 + signal): contexts stop children."""
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)


def _end(number: int, _: FrameType | None) -> NoReturn:
    for ending in ENDING:  # a second one must not cut the stopping short
        signal.signal(ending, signal.SIG_IGN)
    sys.exit(128 + number)
