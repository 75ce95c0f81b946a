"""A child process group that ends when this process does, however it ends.

Children have children: an engine core under its server, the server under a node, the node under the demo. A SIGKILL of
this process would leave them running, holding memory and a port's worth of surprises. So the child holds the read end
of a pipe whose write end only we have; when we die the kernel closes it, the child sees the end of file and kills its
whole group. PR_SET_PDEATHSIG alone would not do: it fires when the thread that started the child ends, and reaches one
process, not its children.

Reads one variable of the environment, in the child only: LORASYNC_LIFELINE_FD, which `ProcessGroup` sets.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

FD_VARIABLE = "LORASYNC_LIFELINE_FD"
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class ProcessGroup:
    """One child in a process group of its own, its output appended to a file. Starts at construction.

    The child must call `follow_parent` early in its life; until then only `stop` ends it.
    """

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], log_path: Path) -> None:
        child_end, self._our_end = os.pipe()  # neither end is inherited by other children of ours
        try:
            with log_path.open("ab") as log:
                self._process = subprocess.Popen(
                    argv,
                    env={**env, FD_VARIABLE: str(child_end)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=(child_end,),
                    start_new_session=True,
                )
        except BaseException:
            os.close(self._our_end)
            raise
        finally:
            os.close(child_end)

    @property
    def pid(self) -> int:
        """The child's, which is also its group's."""
        return self._process.pid

    def exit_code(self) -> int | None:
        """None while the child runs; negative for a signal."""
        return self._process.poll()

    def stop(self, grace_s: float) -> None:
        """SIGTERM to the child, then SIGKILL to whatever is left of its group. Safe to call twice."""
        if self._our_end < 0:
            return
        if self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(grace_s)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._our_end)
        self._our_end = -1


def follow_parent() -> None:
    """In a child of `ProcessGroup`: kill our whole group once the parent is gone. Elsewhere: nothing."""
    number = os.environ.pop(FD_VARIABLE, None)
    if number is None or os.getpgid(0) != os.getpid():
        return
    fd = int(number)

    def wait_for_end() -> None:
        while os.read(fd, 1):
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait_for_end, name="lifeline", daemon=True).start()


def die_with_parent() -> None:
    """On Linux: have the kernel kill this process when the thread that started it ends. Elsewhere: nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
