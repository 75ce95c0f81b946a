"""Starts, watches and stops the vLLM server of this rollout node.

Promises: what can be refused is refused before the start, in one line; a server that dies is reported with the line of
its log that says why; nothing of it outlives `stop` or this process. Does not: restart by itself, load adapters.
"""

import os
import re
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from rollout.engine import VllmEngine
from rollout.supervise import Pulse
from rollout.vllm_settings import arguments, check_port, check_settings, environment
from shared.config import LoraConfig, ModelConfig, RolloutConfig
from shared.errors import EngineError
from shared.lifeline import ProcessGroup

STOP_GRACE_S = 15.0
RESTART_GRACE_S = 2.0  # for what is left of one that failed
POLL_S = 0.25
HEALTH_TIMEOUT_S = 5.0
LOG_TAIL_BYTES = 64 * 1024
MAX_CAUSE_CHARS = 240

Progress = Callable[[float, str], None]


class VllmServer:
    """This node's engine.

        with VllmServer(config.model, config.lora, config.rollout, log_path) as server:
            server.start(lambda seconds, line: print(f"{seconds:.0f} s  {line}"))
            engine = server.engine()

    Args:
        log_path: the server's output is appended here.
    """

    def __init__(self, model: ModelConfig, lora: LoraConfig, rollout: RolloutConfig, log_path: Path) -> None:
        self._model, self._lora, self._rollout, self.log_path = model, lora, rollout, log_path
        self._group: ProcessGroup | None = None
        self._log_start = 0

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{self._rollout.host}:{self._rollout.port}"

    @property
    def pid(self) -> int | None:
        """The server process, None before `start`."""
        return self._group.pid if self._group else None

    def engine(self) -> VllmEngine:
        """A client to it."""
        return VllmEngine(self.url, timeout_s=self._rollout.request_timeout_s)

    def check(self) -> None:
        """Refuse at once what could not start.

        Raises:
            UsageError: the configuration cannot work, or the port is taken.
        """
        check_settings(self._model, self._lora, self._rollout)
        check_port(self._rollout.host, self._rollout.port)

    def start(self, progress: Progress | None = None, *, stopping: Callable[[], bool] = lambda: False) -> None:
        """Start it, again if it died, and wait until it is healthy.

        Args:
            progress: called about once a second with the seconds passed and the log's last line.
            stopping: asked several times a second; once true, the start is given up.

        Raises:
            UsageError: the configuration cannot work, or the port is taken.
            EngineError: it died, was not healthy within start_timeout_s, or was given up.
        """
        self._stop(RESTART_GRACE_S)
        self.check()
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self._log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
        argv = [sys.executable, "-m", "rollout.vllm_launch", *arguments(self._model, self._rollout)]
        self._group = ProcessGroup(argv, {**os.environ, **environment(self._rollout)}, self.log_path)
        try:
            self._wait_until_healthy(progress, stopping)
        except BaseException:
            self.stop()
            raise

    def running(self) -> bool:
        """Whether its process runs; not whether it answers."""
        return self._group is not None and self._group.exit_code() is None

    def pulse(self) -> Pulse:
        """What it says of its health within HEALTH_TIMEOUT_S."""
        try:
            VllmEngine(self.url, timeout_s=HEALTH_TIMEOUT_S).health()
        except EngineError as error:
            answered, refused = error.__cause__ is None, isinstance(error.__cause__, ConnectionRefusedError)
            return Pulse.DONE_FOR if answered or refused else Pulse.SILENT
        return Pulse.WELL

    def death(self) -> EngineError:
        """Why it is not running, from its log."""
        code = self._group.exit_code() if self._group else None
        return EngineError(
            f"vLLM died (exit code {code}): {telling_line(self._log())}",
            op="serve",
            key=str(self.log_path),
            hint=f"The whole story is in {self.log_path}",
            retryable=True,
        )

    def stop(self) -> None:
        """Stop it and all its processes. Safe to call at any time."""
        self._stop(STOP_GRACE_S)

    def _stop(self, grace_s: float) -> None:
        if self._group is not None:
            self._group.stop(grace_s)
            self._group = None

    def __enter__(self) -> "VllmServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wait_until_healthy(self, progress: Progress | None, stopping: Callable[[], bool]) -> None:
        engine, began, told = VllmEngine(self.url, timeout_s=HEALTH_TIMEOUT_S), time.monotonic(), 0.0
        while self.running():
            if stopping():
                raise EngineError("told to stop while it was starting", op="start engine", key=self.url)
            passed = time.monotonic() - began
            try:
                return engine.health()
            except EngineError:
                pass
            if passed > self._rollout.start_timeout_s:
                raise EngineError(
                    f"vLLM was not healthy after {passed:.0f} s: {telling_line(self._log())}",
                    op="start engine",
                    key=str(self.log_path),
                    hint="Raise rollout.start_timeout_s, or see the log",
                )
            if progress and passed - told >= 1.0:
                told = passed
                progress(passed, last_line(self._log()))
            time.sleep(POLL_S)
        raise self.death()

    def _log(self) -> str:
        """The tail of what this start has written."""
        with self.log_path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._log_start, size - LOG_TAIL_BYTES))
            return file.read().decode(errors="replace")


def last_line(log: str) -> str:
    """The last line that says something, without vLLM's process and time prefix."""
    lines = [line for line in log.splitlines() if line.strip()]
    return _bare(lines[-1]) if lines else "(the log is empty)"


def telling_line(log: str) -> str:
    """The line that names the cause, cut short: the last exception's, but none that only points to one above it."""
    return _cause(log)[:MAX_CAUSE_CHARS]


def _cause(log: str) -> str:
    lines = [_bare(line) for line in log.splitlines() if line.strip()]
    for line, after in reversed(list(pairwise([*lines, ""]))):
        if _VALIDATION.search(line):
            return after.split(" [type=")[0].strip()
        if _EXCEPTION.match(line) and not _POINTER.search(line):
            return line
    return lines[-1] if lines else "(the log is empty)"


_PREFIX = re.compile(r"^\(\w+ pid=\d+\)\s*|^(INFO|WARNING|ERROR) \d\d-\d\d [\d:]+ \[[^\]]*\]\s?")
_EXCEPTION = re.compile(r"^([\w.]*(Error|Exception|Interrupt)\b|[\w.]+: error:)")
_VALIDATION = re.compile(r"\bValidationError: \d+ validation errors? for ")
_POINTER = re.compile(r"(See root cause above|initialization failed|EngineDeadError)")


def _bare(line: str) -> str:
    while (shorter := _PREFIX.sub("", line, count=1)) != line:
        line = shorter
    return line.rstrip()
