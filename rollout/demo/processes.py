"""Children of the demo: `lorasync` commands as operating-system processes with a log each.

They are started by command, share nothing with the demo but the store's URL, and are stopped with it: SIGTERM first, so
that a node drains and stops its engine, SIGKILL for what does not go.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from shared.errors import LorasyncError

STOP_TIMEOUT_S = 30.0


class Child:
    """One `lorasync` subcommand. Use as a context: leaving it stops the process."""

    def __init__(self, arguments: Sequence[str], log: Path, *, threads: int = 1) -> None:
        self.name, self.log = arguments[0], log
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "shared.console", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.stop()

    def running(self) -> bool:
        """Whether it still runs.

        Raises:
            LorasyncError: it ended with an error; the message carries its last line.
        """
        code = self._process.poll()
        if code is None:
            return True
        if code != 0:
            lines = self.log.read_text(errors="replace").strip().splitlines()
            last = lines[-1] if lines else "(no output)"
            raise LorasyncError(f"lorasync {self.name} ended with exit code {code}: {last}", hint=f"See {self.log}")
        return False

    def stop(self) -> None:
        """End it, gently first; returns when it is gone."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
