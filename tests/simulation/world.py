"""One seed: chaos until its steps are spent, then calm, in which everyone must arrive."""

import contextlib
import logging
import random
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from unittest import mock

from shared import leases, parts, strict_json, transfer
from shared.catalog import MAX_HINT_BYTES, Catalog
from shared.fates import Fates
from shared.versions import Version

from .adapters import ADAPTER
from .facts import LAYOUT, attempt_of
from .invariants import EveryoneArrives, Violation
from .keepers import Collector, Keeper, Operator, collect_once
from .nodes import Node, without_disk
from .scheduler import Actor
from .sim_store import SimStore
from .stage import Stage
from .trainers import Job
from .weather import CALM

CHAOS_STEPS = 1000
MAX_STOP_S = 120.0
FIRST_S = 10.0  # within which everyone has begun
FEW_POLLS = 25  # until a node serves the latest where LATEST says it: the agent's longest rest
MAX_POLLS = 250  # where it does not: the listings' longest back-off
MAX_CALM_STEPS = 20_000
LONG_AFTER_S = 100_000.0  # more than every age that the collector waits for


@dataclass(frozen=True)
class Result:
    """What a seed came to."""

    seed: int
    violation: Violation | None
    steps: int
    simulated_s: float
    trace_digest: str


class World:
    """The actors of one seed."""

    def __init__(self, seed: int) -> None:
        self.stage = Stage(seed)
        self.stage.bucket.weather = self.stage.scenario.weather
        self.stage.scheduler.on_end = self._ended
        self.job = Job(self.stage, "trainer")
        self.nodes = [Node(self.stage, f"node-{n}") for n in range(self.stage.scenario.readers)]
        collectors = [Collector(self.stage, n) for n in range(self.stage.scenario.collectors)]
        operators = [Operator(self.stage, n) for n in range(self.stage.scenario.operators)]
        self.keepers: list[Keeper] = [*collectors, *operators]

    def chaos(self) -> None:
        """Everyone works, and everything goes wrong."""
        self.job.begin()
        for node in self.nodes:
            node.begin(self.stage.rng.random() * FIRST_S)
        for keeper in self.keepers:
            keeper.begin(self.stage.rng.random() * FIRST_S)
        scheduler, weather = self.stage.scheduler, self.stage.scenario.weather
        while scheduler.steps < CHAOS_STEPS and self.stage.violation is None:
            if self.stage.happens(weather.kill):
                scheduler.kill(self.stage.rng.choice(scheduler.actors))
            if self.stage.happens(weather.stop):
                longest_s = self.stage.rng.choice((MAX_STOP_S / 10, MAX_STOP_S))
                scheduler.stop(self.stage.rng.choice(scheduler.actors), self.stage.rng.random() * longest_s)
            if self.stage.happens(weather.step_clock):
                self.stage.rng.choice(scheduler.actors).skew_s = self.stage.skew_s()
            if self.stage.happens(weather.take_over):
                self.job.begin()
            scheduler.step()

    def calm(self) -> None:
        """Faults are over: one more version may be published; then every node must serve the latest."""
        self.stage.bucket.weather = CALM
        self.job.open = False
        self._end_all("trainer", "operator")
        if self.stage.happens(0.5):
            life = self.job.begin(versions=1)
            self._run_until(lambda: not self._alive(life.name))
            published = [
                version for version in self.stage.facts.acknowledged if life.claim and version.epoch == life.claim.epoch
            ]
            self._demand(bool(published), f"{life.name} published nothing, with no fault in its way")
        latest = max(self.stage.facts.standing(), default=None)
        polls = FEW_POLLS if self._hint_is_right(latest) else MAX_POLLS
        goals = {node: node.polls + polls for node in self.nodes}
        self._run_until(lambda: all(node.arrived(latest) or node.polls > goal for node, goal in goals.items()))
        for node in self.nodes:
            self._demand(
                node.arrived(latest), f"{node.name} serves {node.routed} after {polls} polls, latest is {latest}"
            )

    def clean_up(self) -> None:
        """Everyone is gone and every lease has lapsed: a last collector leaves what the rule says, and nothing else."""
        scheduler = self.stage.scheduler
        scheduler.on_end = lambda _: None
        self._end_all("")
        scheduler.spawn("last-collector", self._collect)
        self._run_until(lambda: not scheduler.actors)
        facts, keep = self.stage.facts, self.stage.scenario.rules.keep_versions
        pinned = {version for version in facts.committed if facts.fates[version][-1:] == ["pinned"]}
        kept = pinned | set(facts.standing()[-keep:])
        kept |= {version for version in facts.standing() if facts.users_of(version) & kept}
        self._demand(facts.standing() == sorted(kept), f"{facts.standing()} stand, the rule keeps {sorted(kept)}")
        needed = {attempt for attempt, users in facts.users.items() if users & kept}
        left = {attempt_of(key) for key in self.stage.bucket.objects if key.startswith(f"{LAYOUT.data}/")}
        self._demand(
            left == needed, f"data of {sorted(left - needed)} is left over, of {sorted(needed - left)} is gone"
        )
        for folder in (LAYOUT.leases, LAYOUT.probes):
            found = [key for key in self.stage.bucket.objects if key.startswith(f"{folder}/")]
            self._demand(not found, f"{found} are left over")
        self._demand(not self.stage.bucket.unfinished, f"{self.stage.bucket.unfinished} are left unfinished")

    def close(self) -> None:
        """Let nothing live on."""
        self.stage.scheduler.on_end = lambda _: None
        self._end_all("")

    def _collect(self) -> None:
        store = SimStore(self.stage.bucket, "last-collector")
        for _ in range(3):  # a rollback, then what it was made of, then its data
            self.stage.scheduler.switch(LONG_AFTER_S)
            collect_once(self.stage, Catalog(store, ADAPTER), Fates(store, LAYOUT, by="last-collector"))

    def _hint_is_right(self, latest: Version | None) -> bool:
        """Whether LATEST says the latest version, and no request is under way that may change that."""
        late = any("'s late " in actor.name for actor in self.stage.scheduler.actors)
        hint = self.stage.bucket.objects.get(LAYOUT.latest)
        if hint is None or late:
            return False
        said = strict_json.load_object(hint.content, key=LAYOUT.latest, max_bytes=MAX_HINT_BYTES)
        return latest == (said["epoch"], said["version"])

    def _alive(self, prefix: str) -> bool:
        return any(actor.name.startswith(prefix) for actor in self.stage.scheduler.actors)

    def _end_all(self, *prefixes: str) -> None:
        for actor in list(self.stage.scheduler.actors):
            if actor.name.startswith(prefixes):
                self.stage.scheduler.kill(actor)

    def _run_until(self, done: Callable[[], bool]) -> None:
        last_step = self.stage.scheduler.steps + MAX_CALM_STEPS
        while not done() and self.stage.violation is None and self.stage.scheduler.steps < last_step:
            self.stage.scheduler.step()

    def _demand(self, holds: bool, problem: str) -> None:
        if not holds:
            self.stage.broken(Violation(EveryoneArrives.__name__, problem))

    def _ended(self, actor: Actor) -> None:
        self.job.ended(actor.name)
        for node in self.nodes:
            node.ended(actor.name)
        for keeper in self.keepers:
            keeper.ended(actor.name)


def run_seed(seed: int) -> tuple[Result, Stage]:
    """Run one seed."""
    world = World(seed)
    with _seeded(seed):
        try:
            world.chaos()
            if world.stage.violation is None:
                world.calm()
            simulated_s = world.stage.scheduler.now  # without the long wait of the last collector
            if world.stage.violation is None:
                world.clean_up()
        finally:
            digest = world.stage.scheduler.trace_digest()
            world.close()
    return Result(seed, world.stage.violation, world.stage.scheduler.steps, simulated_s, digest), world.stage


class _OnThisThread:
    """An executor that works at once: a thread would be chance that no seed replays."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def submit(self, work: Callable[..., object], *arguments: object) -> Future[object]:
        future: Future[object] = Future()
        future.set_result(work(*arguments))
        return future

    def shutdown(self, **_: object) -> None: ...


def _work_through(items: Iterable[int], work: Callable[[int, threading.Event], None], threads: int) -> None:
    """`shared.parts.work_through` without its threads."""
    for item in items:
        work(item, threading.Event())


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Nonces are drawn from the seed, nothing runs on another thread, nothing is logged."""
    rng = random.Random(f"names {seed}")
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            mock.patch.object(uuid, "uuid4", lambda: uuid.UUID(int=rng.getrandbits(128), version=4)),
            mock.patch.object(parts, "ThreadPoolExecutor", _OnThisThread),
            mock.patch.object(leases, "at_once", lambda read, items: [read(item) for item in items]),
            mock.patch.object(transfer, "work_through", _work_through),
            without_disk(),
        ):
            yield
    finally:
        logging.disable(disabled)
