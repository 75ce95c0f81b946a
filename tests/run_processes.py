"""Real `lorasync` processes for tests: started by command, killed and suspended by signal, watched through their store.

    run = small_run(folder, engine_url=demo_server.url)
    with run.rollout() as node, run.train() as trainer:
        wait_for(lambda: run.serving() == Version(1, 2), 60, node, trainer)
        trainer.kill()

Nothing here reaches into a process: what a test knows of it comes from the store, from its log and from signals.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
from engine_fixtures import free_port

from rollout.demo.settings import DemoOptions, main_config, write_config
from rollout.evaluate import Evaluation
from rollout.vllm_server import VllmServer
from shared.catalog import Catalog
from shared.config import Config, TrainConfig
from shared.layout import groups_of, version_of
from shared.stores import open_store
from shared.trajectories import Sample, decode
from shared.versions import Version
from trainer.checkpoint import newest
from trainer.intake import Position

START_S, RUN_S = 240.0, 400.0  # deadlines on a machine that others use too: a process's start, a run of a few steps
POLL_S = 0.05
LINES_TOLD = 15  # of each log, when a wait fails

Found = TypeVar("Found")


class Command:
    """One `lorasync` command as a process, in a session of its own. Leaving the context kills it."""

    def __init__(self, words: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.words, self.log = list(words), log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "shared.console", "-v", *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment(environment),
                start_new_session=True,
            )

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        return self._process.pid

    def code(self) -> int | None:
        """Its exit code, None while it runs; negative for a signal."""
        return self._process.poll()

    def kill(self) -> None:
        """SIGKILL, also to one that is suspended; returns when it is gone."""
        self._process.kill()
        self._process.wait()

    def suspend(self) -> None:
        """SIGSTOP: alive, holding what it holds, doing nothing."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> int:
        """SIGTERM; its exit code."""
        self._process.terminate()
        return self.wait(START_S)

    def wait(self, deadline_s: float) -> int:
        """Its exit code, once it has ended."""
        try:
            return self._process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not ended within {deadline_s} s\n{self.tail()}") from None

    def told(self) -> str:
        """All it has written."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def tail(self) -> str:
        """What it wrote last, for a failure."""
        return "\n".join([f"--- {self.words[0]}, exit code {self.code()}", *self.told().splitlines()[-LINES_TOLD:]])


def wait_for(condition: Callable[[], Found], deadline_s: float, *commands: Command) -> Found:
    """The condition's first true value.

    Fails, with what the commands wrote last, at the deadline or when one of them has died.
    """
    end = time.monotonic() + deadline_s
    while not (found := condition()):
        dead = [command.words[0] for command in commands if command.code() not in (None, 0)]
        if dead or time.monotonic() > end:
            problem = f"{dead[0]} died" if dead else f"not within {deadline_s} s"
            raise AssertionError("\n".join([problem, *(command.tail() for command in commands)]))
        time.sleep(POLL_S)
    return found


def engine_group(node: Command) -> int:
    """The process group of a node's own engine."""
    [server] = psutil.Process(node.pid).children()
    return os.getpgid(server.pid)


def engine_core(group: int) -> int:
    """The process in which an engine computes, a child of its server."""
    [core] = [child for child in psutil.Process(group).children() if "EngineCore" in " ".join(child.cmdline())]
    return core.pid


def ask(*words: str, environment: Mapping[str, str] | None = None, deadline_s: float = 60) -> tuple[int, str, str]:
    """Run a command to its end: (exit code, stdout, stderr)."""
    command = [sys.executable, "-P", "-m", "shared.console", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=deadline_s, env=_environment(environment))
    return done.returncode, done.stdout, done.stderr


def _environment(more: Mapping[str, str] | None) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **(more or {})}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of the demo's base model and task: its configuration on disk, and what its store says."""

    config: Config
    file: Path
    catalog: Catalog

    @property
    def base(self) -> str:
        return self.config.model.path

    @property
    def cached(self) -> list[str]:
        """What lies in the node's cache of this adapter."""
        folder = Path(self.config.rollout.cache_dir, self.config.rollout.node, self.config.store.adapter)
        return sorted(path.name for path in folder.iterdir())

    def train(self, *words: str) -> Command:
        return self._start("train", *words)

    def rollout(self, *words: str) -> Command:
        return self._start("rollout", *words)

    def ask(self, command: str, *words: str) -> tuple[int, str, str]:
        """(exit code, stdout, stderr) of another command."""
        return ask(command, "--config", str(self.file), *words)

    def _start(self, command: str, *words: str) -> Command:
        number = len(list(self.file.parent.glob(f"{command}-*.log")))
        return Command([command, "--config", str(self.file), *words], self.file.parent / f"{command}-{number}.log")

    def hint(self) -> dict[str, Any]:
        """The node's own words; empty before the first."""
        return self.catalog.node(self.config.rollout.node) or {}

    def serving(self) -> Version | None:
        """What the node says it serves."""
        version = self.hint().get("version")
        return Version.parse(str(version)) if version else None

    def reached(self, version: Version) -> bool:
        """Whether the node serves this version or a later one."""
        serving = self.serving()
        return serving is not None and serving >= version

    def done(self) -> bool:
        """Training has ended, and the node has evaluated the last version after that."""
        progress = self.catalog.progress()
        return bool(progress and progress["done"]) and bool(self._final_evaluations())

    def final_reward(self) -> float:
        """Held-out, at temperature 1, of the version that was served when training had ended."""
        [key] = self._final_evaluations()
        return Evaluation.from_parquet(self.catalog.store.get(key), key=key).sampled_reward

    def _final_evaluations(self) -> list[str]:
        entries = self.catalog.store.list(self.catalog.layout.evaluations)
        return [entry.key for entry in entries if entry.key.endswith(".final.parquet")]

    def receipts(self) -> list[Version | None]:
        """The version of each receipt, in order."""
        return [version_of(entry.key) for entry in self.catalog.store.list(self.catalog.layout.receipts)]

    def trajectories(self) -> dict[str, list[Sample]]:
        """Every file, by key."""
        store, layout = self.catalog.store, self.catalog.layout
        return {e.key: decode(store.get(e.key), key=e.key) for e in store.list(layout.all_trajectories)}

    def samples(self) -> list[Sample]:
        return [sample for samples in self.trajectories().values() for sample in samples]

    def checkpointed_step(self) -> int | None:
        """Of the newest checkpoint."""
        checkpoint = newest(self.catalog.store, self.catalog.layout)
        return checkpoint.step if checkpoint else None

    def position(self) -> Position:
        """The data position of the newest checkpoint."""
        checkpoint = newest(self.catalog.store, self.catalog.layout)
        assert checkpoint is not None
        return Position.from_json(checkpoint.state["position"])


def _below(key: str, floor: int) -> bool:
    version = version_of(key)
    return version is not None and version.number < floor


def demand_each_group_decided_once(run: Run, steps: int) -> None:
    """Hold a finished run's data position to its files: groups whole, none decided about twice, no step short."""
    sizes: dict[str, Counter[str]] = {}
    for key, samples in run.trajectories().items():
        sizes[key] = Counter(sample.group for sample in samples)
        assert len(sizes[key]) == groups_of(key), key
    names = [name for groups in sizes.values() for name in groups]
    assert len(names) == len(set(names)), "a group was put twice"
    assert {size for groups in sizes.values() for size in groups.values()} == {run.config.train.group_size}
    # `decided` has a file's groups by index, or None once that is all of them; older files are one sum.
    position = run.position()
    decided = {key: list(range(len(sizes[key]))) if at is None else at for key, at in position.decided.items()}
    assert all(len(set(indexes)) == len(indexes) for indexes in decided.values()), decided
    assert sum(map(len, decided.values())) + position.below == position.consumed
    assert position.below == sum(len(groups) for key, groups in sizes.items() if _below(key, position.floor))
    assert position.taken == steps * run.config.train.prompts_per_step


def written(config: Config, folder: Path) -> Run:
    """A run whose configuration lies in the folder."""
    catalog = Catalog(open_store(config.store.url, config.store.options), config.store.adapter)
    return Run(config, write_config(config, folder / "run.toml"), catalog)


def small_run(folder: Path, *, port: int = 8000, **train: Any) -> Run:
    """The demo's model and task in small steps: 8 prompts of 4 completions, a version each, 32 held-out prompts.

    The adapter is called after the folder, so that runs can share an engine.
    """
    config = main_config(DemoOptions(out=folder, adapter=folder.name, port=port))
    small = {"prompts_per_step": 8, "group_size": 4, "publish_every": 1, "checkpoint_every": 3, "take_timeout_s": 600.0}
    rollout = {"heldout_limit": 32, "groups_per_request": 4, "max_concurrent_groups": 8}
    config = dataclasses.replace(
        config,
        train=TrainConfig(**{**small, **train}),
        rollout=dataclasses.replace(config.rollout, **rollout),
    )
    return written(config, folder)


def changed(run: Run, **sections: Mapping[str, Any]) -> Run:
    """The same run with other values: changed(run, rollout={"engine_url": url})."""
    parts = {name: dataclasses.replace(getattr(run.config, name), **values) for name, values in sections.items()}
    return written(dataclasses.replace(run.config, **parts), run.file.parent)


@pytest.fixture(scope="session")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    """A server of the demo's base model, as the demo starts it. Its runs are told apart by their adapters' names."""
    config = small_run(tmp_path_factory.mktemp("demo_server"), port=free_port()).config
    rollout = dataclasses.replace(config.rollout, start_timeout_s=RUN_S)
    with VllmServer(config.model, config.lora, rollout, tmp_path_factory.mktemp("vllm") / "vllm.log") as server:
        server.start()
        yield server


class LongRequest:
    """A request of many sequences that runs for seconds, straight to the engine; the end of sequence is ignored."""

    sequences, tokens = 96, 110
    prompt = (1, *range(40, 46))

    def __init__(self, url: str, model: str) -> None:
        self._url, self._model = url, model
        self._choices: list[dict[str, Any]] = []
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        body = {
            "model": self._model,
            "prompt": [self.prompt] * self.sequences,
            "max_tokens": self.tokens,
            "ignore_eos": True,
            "temperature": 1.0,
            "logprobs": 0,
            "return_token_ids": True,
        }
        content, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self._url}/v1/completions", content, headers)
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=RUN_S) as answer:
            self._choices = json.load(answer)["choices"]

    def running(self) -> bool:
        return self._thread.is_alive()

    def result(self) -> list[tuple[list[int], list[float]]]:
        """(whole sequence, log-probabilities of what was generated) of each; empty if the request was lost."""
        self._thread.join(RUN_S)
        return [([*self.prompt, *c["token_ids"]], c["logprobs"]["token_logprobs"]) for c in self._choices]
