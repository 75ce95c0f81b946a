"""Collectors and operators: who lets versions go, and who holds on to them."""

from publisher.collect import collect
from publisher.retention import MIN_BEYOND_STALENESS, Rule
from publisher.rollback import roll_back
from shared.catalog import Catalog
from shared.errors import LorasyncError
from shared.fates import Fates
from shared.versions import Version

from .adapters import ADAPTER
from .facts import LAYOUT
from .scheduler import Actor
from .sim_store import SimStore
from .stage import Stage

NEXT_LIFE_S = 30.0  # at most, until a killed collector is started again


class Keeper:
    """A process that comes back after it was killed."""

    kind = ""

    def __init__(self, stage: Stage, number: int) -> None:
        self._stage, self._number, self._lives = stage, number, 0
        self._actor: Actor | None = None

    def begin(self, delay_s: float = 0.0) -> None:
        """Start a life."""
        self._lives += 1
        name = f"{self.kind}-{self._number}-{self._lives}"
        self._actor = self._stage.scheduler.spawn(name, lambda: self._live(name), delay_s=delay_s)
        self._actor.skew_s = self._stage.skew_s()

    def ended(self, name: str) -> None:
        """A process is gone: if it was ours, begin anew."""
        if self._actor and name == self._actor.name:
            self.begin(self._stage.rng.random() * NEXT_LIFE_S)

    def _live(self, name: str) -> None:
        assert self._actor is not None
        store = SimStore(self._stage.bucket, name)
        catalog, fates = Catalog(store, ADAPTER), Fates(store, LAYOUT, by=name, clock=self._actor.clock)
        while True:
            try:
                self.work(catalog, fates)
            except LorasyncError as error:
                self._stage.scheduler.note(name, "fails", "", error.message)
            self._stage.scheduler.switch(self._stage.rng.random() * 2 * self._stage.scenario.keeper_pause_s)

    def work(self, catalog: Catalog, fates: Fates) -> None:
        """One round."""
        raise NotImplementedError


class Collector(Keeper):
    """Runs `lorasync gc` again and again."""

    kind = "collector"

    def work(self, catalog: Catalog, fates: Fates) -> None:
        collect_once(self._stage, catalog, fates)


def collect_once(stage: Stage, catalog: Catalog, fates: Fates) -> None:
    """One collection under the seed's rules, said by `max_staleness`, which keeps two versions more than it says."""
    rules = stage.scenario.rules
    rule = Rule(1, rules.keep_versions - MIN_BEYOND_STALENESS, rules.keep_s, rules.orphan_s)
    collect(catalog, fates, rule, grace_s=stage.scenario.grace_s, sleep=stage.scheduler.switch)


class Operator(Keeper):
    """A person: pins a version, lets go of a pin, rolls back."""

    kind = "operator"

    def work(self, catalog: Catalog, fates: Fates) -> None:
        versions = catalog.versions()
        if not versions:
            return
        version = min(self._stage.rng.choices(versions, k=2))  # rather an old one, which the collector may want too
        deed = self._stage.rng.choice(("pin", "unpin", "roll back", "roll back"))
        if deed == "pin":
            fates.pin(version)
            self._stage.pinned(version)
        elif deed == "unpin":
            fates.unpin(version)
        else:
            self._roll_back(catalog, version)

    def _roll_back(self, catalog: Catalog, version: Version) -> None:
        assert self._actor is not None
        name, asked_at = self._actor.name, self._stage.facts.now
        self._stage.facts.rolling_back[name] = version
        manifest = roll_back(catalog, version, by=name, clock=self._actor.clock)
        self._stage.acknowledged(name, manifest, asked_at)
