"""A fleet of readers as processes of their own, on a directory, some killed as they read. No torch in a reader.

    python reader_fleet.py FOLDER '{"readers": 32, "versions": 20, ...}'      # class Plan

One warm process forks all readers, so that each costs what it touches. A reader is the real Watcher, Catalog and
`fetch` (download, verification, assembly), and keeps a log: what it activated, when, and the sha256 of what then lay on
its disk. Killed ones (SIGKILL, when a version chosen by the seed is out) are forked anew at once.

    FOLDER/store, FOLDER/base       the publisher's, who waits for FOLDER/ready
    FOLDER/published.json           written by the publisher at the end: {"at": {number: monotonic seconds}, ...}
    FOLDER/logs/reader-017.log      life, "activated" or "refused", number, monotonic seconds, sha256
    FOLDER/fleet.json               written at the end: see `Outcome`
"""

import hashlib
import json
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rollout.watch import Watcher
from shared.base_model import read_base_config
from shared.catalog import Catalog
from shared.errors import Corrupt, KeyMissing, StoreError
from shared.fetch import WEIGHTS, fetch
from shared.local_store import LocalStore
from shared.peft_names import expected_tensors
from shared.store import Entry, Fetched
from shared.versions import Version

ADAPTER = "policy"
GIVE_UP_S = 60.0  # after the last version
LOOK_EVERY_S = 0.02
NICE = 19  # more readers than cores: the publisher has a machine of its own, in earnest

_SLOT = struct.Struct("qqqq")  # number activated + 1, gets, lists, looks; in shared memory, so it outlives a kill


@dataclass(frozen=True)
class Plan:
    """What is run. `killed` readers die once each; `damaged` versions get one wrong byte on their way to the store."""

    readers: int
    versions: int
    killed: int
    damaged: int
    seed: int
    interval_s: float = 0.1
    poll_interval_s: float = 1.0
    list_interval_s: float = 30.0

    def deaths(self) -> list[tuple[int, int]]:
        """(number, reader): the reader dies when that version is out."""
        rng = random.Random(f"{self.seed}/deaths")
        victims = rng.sample(range(self.readers), self.killed)
        return sorted((rng.randrange(self.versions), victim) for victim in victims)

    def damaged_numbers(self) -> set[int]:
        """Never the last, which all must come to."""
        return set(random.Random(f"{self.seed}/damage").sample(range(self.versions - 1), self.damaged))


@dataclass
class Outcome:
    """What the fleet cost, over all lives. CPU seconds and bytes are of all readers together."""

    deaths: int = 0
    cpu_s: float = 0.0
    seconds: float = 0.0
    most_bytes: int = 0
    asked: dict[str, int] = field(default_factory=dict)
    last: dict[int, int] = field(default_factory=dict)


class Counting(LocalStore):
    """Counts what an object store would be asked."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.asked: Counter[str] = Counter()

    def get(self, key: str, max_bytes: int | None = None) -> bytes:
        self.asked["get"] += 1
        return super().get(key, max_bytes)

    def get_range(self, key: str, start: int, end: int) -> bytes:
        self.asked["get"] += 1
        return super().get_range(key, start, end)

    def get_if_changed(self, key: str, tag: str, max_bytes: int | None = None) -> Fetched | None:
        self.asked["get"] += 1
        return super().get_if_changed(key, tag, max_bytes)

    def list(self, prefix: str, after: str = "") -> list[Entry]:
        self.asked["list"] += 1
        return super().list(prefix, after)


def read_on(folder: Path, plan: Plan, index: int, life: int, slots: mmap.mmap, parent: int) -> None:
    """One life of a reader: follow the newest version until killed."""
    store = Counting(f"file://{folder / 'store'}")
    catalog, cache = Catalog(store, ADAPTER), folder / "cache" / str(index)
    base = read_base_config(folder / "base")
    log = os.open(folder / "logs" / f"reader-{index:03d}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    _, gets, lists, looks = _SLOT.unpack_from(slots, index * _SLOT.size)
    watcher = Watcher(
        catalog,
        poll_interval_s=plan.poll_interval_s,
        list_interval_s=plan.list_interval_s,
        rng=random.Random(f"{plan.seed}/{index}/{life}"),
    )
    activated: Version | None = None
    refused: set[Version] = set()

    def note(what: str, version: Version, digest: str) -> None:
        os.write(log, f"{life} {what} {version.number} {time.monotonic():.6f} {digest}\n".encode())

    while os.getppid() == parent:
        version = None
        try:
            version = watcher.look(without=refused)
            if version is not None and (activated is None or version > activated):
                manifest = catalog.manifest(version)
                expected = expected_tensors(base, manifest.lora.targets, manifest.lora.rank)
                place = fetch(store, manifest, expected, cache / str(version), base_name="base")
                note("activated", version, hashlib.sha256((place / WEIGHTS).read_bytes()).hexdigest())
                if activated is not None:
                    shutil.rmtree(cache / str(activated), ignore_errors=True)
                activated = version
        except KeyMissing:
            watcher.forget(version or Version(0, 0))
        except Corrupt:
            refused.add(version or Version(0, 0))
            note("refused", version or Version(0, 0), "-")
        except StoreError:
            pass
        looks += 1
        counts = gets + store.asked["get"], lists + store.asked["list"], looks
        _SLOT.pack_into(slots, index * _SLOT.size, activated.number + 1 if activated else 0, *counts)
        watcher.wait()


class Fleet:
    """Forks readers, kills some, waits until all serve the last version."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self._folder, self._plan = folder, plan
        self._slots = mmap.mmap(-1, plan.readers * _SLOT.size)
        self._pids: dict[int, int] = {}
        self._lives: Counter[int] = Counter()
        self._outcome = Outcome()

    def run(self) -> Outcome:
        (self._folder / "logs").mkdir()
        began = time.monotonic()
        try:
            for index in range(self._plan.readers):
                self._fork(index)
            (self._folder / "ready").touch()
            self._oversee()
        finally:
            self._outcome.most_bytes = sum(map(_own_bytes, self._pids.values()))
            for pid in self._pids.values():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        self._outcome.cpu_s, self._outcome.seconds = usage.ru_utime + usage.ru_stime, time.monotonic() - began
        counts = [self._slot(index) for index in range(self._plan.readers)]
        self._outcome.asked = {name: sum(c[i] for c in counts) for i, name in enumerate(("get", "list", "look"), 1)}
        self._outcome.last = {index: count[0] - 1 for index, count in enumerate(counts)}
        return self._outcome

    def _oversee(self) -> None:
        catalog, tag, newest = Catalog(LocalStore(f"file://{self._folder / 'store'}"), ADAPTER), "", -1
        deaths, ended, give_up_at = self._plan.deaths(), self._folder / "published.json", float("inf")
        while time.monotonic() < give_up_at:
            hint = catalog.hint(tag)
            if hint is not None:
                newest, tag = hint[0].number if hint[0] else -1, hint[1]
            while deaths and deaths[0][0] <= newest:
                self._kill(deaths.pop(0)[1])
            if ended.exists() and give_up_at == float("inf"):
                give_up_at = time.monotonic() + GIVE_UP_S
            last = self._plan.versions
            if newest == last - 1 and all(self._slot(index)[0] == last for index in self._pids):
                return
            time.sleep(LOOK_EVERY_S)

    def _kill(self, index: int) -> None:
        os.kill(self._pids[index], signal.SIGKILL)
        os.waitpid(self._pids[index], 0)
        self._outcome.deaths += 1
        _SLOT.pack_into(self._slots, index * _SLOT.size, 0, *self._slot(index)[1:])
        self._fork(index)

    def _fork(self, index: int) -> None:
        self._lives[index] += 1
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                read_on(self._folder, self._plan, index, self._lives[index], self._slots, parent)
            finally:
                os._exit(1)
        self._pids[index] = pid

    def _slot(self, index: int) -> tuple[int, ...]:
        return _SLOT.unpack_from(self._slots, index * _SLOT.size)


def _own_bytes(pid: int) -> int:
    """A process's memory, what it shares divided among those that share it (proportional set size)."""
    fields = Path(f"/proc/{pid}/smaps_rollup").read_text().split("Pss:")[1].split()
    return int(fields[0]) * 1024


def main() -> None:
    folder, plan = Path(sys.argv[1]), Plan(**json.loads(sys.argv[2]))
    os.nice(NICE)
    outcome = Fleet(folder, plan).run()
    (folder / "fleet.json").write_text(json.dumps(asdict(outcome)))


if __name__ == "__main__":
    main()
