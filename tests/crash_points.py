"""Real processes that die by SIGKILL at their n-th change to the disk.

A nursery is one warm process, with everything imported and one thread, that forks a process for every life asked of it:
a killed life costs milliseconds. Ranks of one publication are lives of one request; those named `last` begin when the
others have put their records.

    with Nursery() as nursery:
        [unharmed] = nursery.run([Life("publish", {...})])
        for n in range(unharmed.changes):
            [killed] = nursery.run([Life("publish", {...}, kill_at=n)])

A change is a call that writes, makes, names or removes; a kill at a write comes after half of its bytes. A sync is
none: what a killed process wrote stays in the kernel (test_power_loss.py is about the rest).
"""

import contextlib
import gc
import itertools
import json
import mmap
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import light_commands
import synthetic
import torch
from fake_engine import BASE_NAME, FakeEngine
from memory_folder import memory_folder
from syscalls import CHANGING, creates, intercepted

from publisher import publisher as publisher_module
from publisher.collect import collect
from publisher.commit import Rank
from publisher.convert import AdapterSlice, convert
from publisher.epochs import Claim, claim_epoch
from publisher.retention import Rule
from publisher.rollback import roll_back
from rollout.agent import Agent
from rollout.delivery import Delivery, Target
from rollout.router import Router
from rollout.watch import Watcher
from shared import transfer
from shared.base_model import identify
from shared.catalog import Catalog
from shared.errors import LorasyncError
from shared.fates import Fates
from shared.fetch import fetch
from shared.layout import Layout
from shared.lifeline import die_with_parent
from shared.local_store import LocalStore
from shared.manifest import PART_BYTES, Manifest
from shared.versions import Version

START_S, LIFE_S = 120.0, 60.0  # deadlines: of the nursery's imports, of the longest request
POLL_S = 0.005
LAYOUT = Layout(synthetic.ADAPTER)
NODE = "node-0"
RECORD = re.compile(r"/rank-\d+\.json$")


@dataclass(frozen=True)
class Life:
    """What one process shall do, and before which of its changes (from 0) it dies; None: never."""

    act: str
    words: dict[str, Any]
    kill_at: int | None = None
    last: bool = False  # begins when the other lives' records are on the store; their patience ends when it does


@dataclass(frozen=True)
class End:
    """How a life ended."""

    signal: int  # 9 if it was killed
    code: int = 0  # its exit code, if it was not killed
    changes: int = 0  # to the disk, if it was not killed
    error: str = ""


@dataclass
class _Asked:
    done: threading.Event = field(default_factory=threading.Event)
    ends: list[End] = field(default_factory=list)


class Nursery:
    """See the module. `run` may be called from several threads at once.

    Args:
        skew_s: by how much the lives' clock is wrong.
    """

    def __init__(self, skew_s: float = 0.0) -> None:
        self._skew_s = skew_s

    def __enter__(self) -> Self:
        command = [sys.executable, str(Path(__file__).with_name("skewed_clock.py")), str(self._skew_s), __file__]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._numbers, self._asked, self._writing = itertools.count(), dict[int, _Asked](), threading.Lock()
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait(LIFE_S)

    def run(self, lives: Sequence[Life]) -> list[End]:
        """Let lives begin, together; their ends, in the same order."""
        number, asked = next(self._numbers), _Asked()
        self._asked[number] = asked
        line = json.dumps([number, [asdict(life) for life in lives]])
        with self._writing:
            print(line, file=self._process.stdin, flush=True)
        if not asked.done.wait(START_S + LIFE_S):
            raise AssertionError(f"no answer to {line}")
        return asked.ends

    def _listen(self) -> None:
        for line in self._process.stdout:  # type: ignore[union-attr]
            number, ends = json.loads(line)
            asked = self._asked.pop(number)
            asked.ends = [End(**end) for end in ends]
            asked.done.set()


def serve() -> None:
    """The nursery's own loop: a process for each request, which forks its lives and answers for them."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # requests are reaped by the kernel
    for line in sys.stdin:
        if os.fork() == 0:
            die_with_parent()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            number, lives = json.loads(line)
            ends = _lives([Life(**life) for life in lives])
            os.write(1, (json.dumps([number, [asdict(end) for end in ends]]) + "\n").encode())
            os._exit(0)


def _lives(lives: list[Life]) -> list[End]:
    impatient = mmap.mmap(-1, 1)  # shared with the lives
    others = [_begin(life, impatient) for life in lives if not life.last]
    ends = {}
    for place, life in enumerate(lives):
        if life.last:
            _await_records(life, len(others))
            ends[place] = _end(*_begin(life, impatient))
    impatient[0] = 1
    return [ends[place] if life.last else _end(*others.pop(0)) for place, life in enumerate(lives)]


class _Clock:
    """Stands for `time` in a publisher that waits for records: the timeout has passed when the last life has ended.

    So nothing here depends on how fast this machine is, and nobody waits for nothing.
    """

    def __init__(self, impatient: mmap.mmap) -> None:
        self._impatient = impatient

    def monotonic(self) -> float:
        return time.monotonic() + self._impatient[0] * LIFE_S * 10


def _begin(life: Life, impatient: mmap.mmap) -> tuple[int, int]:
    """Fork a life: (its process, the end of a pipe where it reports)."""
    ours, theirs = os.pipe()
    process = os.fork()
    if process:
        os.close(theirs)
        return process, ours
    die_with_parent()  # also one that is suspended
    publisher_module.time = _Clock(impatient)  # type: ignore[assignment]
    mortal, error, code = Mortal(life.kill_at), "", 1
    try:
        with mortal.counted():
            code = ACTS[life.act](**life.words) or 0
    except LorasyncError as told:
        error = f"{type(told).__name__}: {told}"
    except BaseException:
        error = traceback.format_exc()
    os.write(theirs, json.dumps({"changes": mortal.changes, "error": error}).encode())
    os._exit(code)


def _end(process: int, report: int) -> End:
    with open(report) as file:
        said = file.read()
    _, status = os.waitpid(process, 0)
    killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 0
    return End(killed, code, **(json.loads(said) if said else {}))


def _await_records(life: Life, count: int) -> None:
    store, end = LocalStore(life.words["url"]), time.monotonic() + LIFE_S
    attempt = LAYOUT.attempt(Version(*life.words["version"]), life.words["nonce"])
    while sum(bool(RECORD.search(entry.key)) for entry in store.list(attempt)) < count:
        if time.monotonic() > end:
            raise AssertionError("the other ranks put no records")
        time.sleep(POLL_S)


class Mortal:
    """Counts this process's changes to the disk, and ends it before the `kill_at`-th."""

    def __init__(self, kill_at: int | None) -> None:
        self._kill_at, self.changes = kill_at, 0
        self._lock = threading.RLock()
        self._writes = {"write": os.write, "pwrite": os.pwrite}

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """While the block runs, changes count."""
        sys.addaudithook(self._audited)
        with intercepted((*CHANGING, "open"), self._around):
            yield

    def _around(self, name: str, call: Callable[[], Any], args: tuple[Any, ...]) -> Any:
        if name == "open" and not creates(name, args):
            return call()
        with self._lock:
            if self.changes == self._kill_at and name in ("write", "pwrite"):
                self._writes[name](args[0], memoryview(args[1])[: len(args[1]) // 2], *args[2:])
            self._change()
            return call()

    def _audited(self, event: str, args: tuple[Any, ...]) -> None:
        """`open(path, "wb")` and its like, which do not go through `os.open`."""
        if event == "open" and isinstance(args[1], str) and args[2] & os.O_CREAT:
            with self._lock:
                self._change()

    def _change(self) -> None:
        if self.changes == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.changes += 1


def held_slices(number: int, rank: int, world: int) -> list[AdapterSlice]:
    """What a rank publishes as a version of that number."""
    whole = synthetic.factors(number)
    return list(convert(synthetic.BASE, synthetic.rank_factors(whole, rank, world) if world > 1 else whole))


def publish(url: str, base: str, version: list[int], nonce: str, rank: int, world: int) -> None:
    """One rank's part of a version."""
    epoch, number = version
    place = Rank(rank, world)
    publisher = synthetic.open_publisher(
        LocalStore(url), Path(base), Claim(epoch, nonce), rank=place, record_timeout_s=2 * LIFE_S
    )
    publisher.submit(number, SLICES[number, rank, world], training={"step": number})
    publisher.close()


def in_parts_of(part_bytes: int, store: LocalStore, manifest: Manifest) -> Manifest:
    """A version whose shards have a digest per `part_bytes`: many, though they are small. For all of this process."""
    transfer.PART_BYTES = part_bytes
    shards = [replace(shard, parts=transfer.file_digests(store.root / shard.key)) for shard in manifest.shards]
    return replace(manifest, shards=tuple(shards)).sealed()


def download(url: str, version: list[int], directory: str, part_bytes: int) -> None:
    """A version into a node's cache."""
    store = LocalStore(url)
    manifest = in_parts_of(part_bytes, store, Catalog(store, synthetic.ADAPTER).manifest(Version(*version)))
    fetch(store, manifest, synthetic.EXPECTED, Path(directory), base_name="base")


def activate(url: str, base: str, cache: str) -> None:
    """A node's life: one look, which ends in a route to the latest version."""
    router, engine, catalog = Router(), FakeEngine(), Catalog(LocalStore(url), synthetic.ADAPTER)
    target = Target(BASE_NAME, synthetic.BASE, identify(base), 8, Path(cache))
    watcher = Watcher(catalog, poll_interval_s=60.0, list_interval_s=60.0)
    delivery = Delivery(catalog, engine, target)
    agent = Agent(
        catalog, engine, watcher, router, delivery, node=NODE, max_loras=2, quarantine_after=3, retry_wait_s=0.0
    )
    agent.tick()
    if router.routed is None:
        raise AssertionError(agent.health.last_error)


def collect_garbage(url: str) -> None:
    """All that the collector may let go: all but the newest two, and every attempt without a manifest."""
    store = LocalStore(url)
    rule = Rule(keep_versions=2, orphan_after_s=-1.0)
    collect(Catalog(store, synthetic.ADAPTER), Fates(store, LAYOUT), rule, sleep=lambda _: None)


def go_back(url: str, version: list[int]) -> None:
    """A rollback."""
    roll_back(Catalog(LocalStore(url), synthetic.ADAPTER), Version(*version))


ACTS: dict[str, Callable[..., int | None]] = {
    "publish": publish,
    "download": download,
    "activate": activate,
    "collect": collect_garbage,
    "rollback": go_back,
    "lorasync": light_commands.main,
}
SLICES: dict[tuple[int, int, int], list[AdapterSlice]] = {}


def warm_up() -> None:
    """Do once what lives do, so that they find it compiled and cached; then keep it out of their memory's way."""
    torch.set_num_threads(1)
    SLICES.update({(1, rank, world): held_slices(1, rank, world) for world in (1, 4, 8) for rank in range(world)})
    with memory_folder() as folder:
        store, base = LocalStore(str(folder / "store")), synthetic.write_base(folder / "base")
        claim = claim_epoch(store, LAYOUT)
        publish(str(store.root), str(base), [1, 1], claim.nonce, rank=0, world=1)
        download(str(store.root), [1, 1], str(folder / "out"), PART_BYTES)
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    warm_up()
    serve()
