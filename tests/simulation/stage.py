"""What all actors of a seed share: scheduler, bucket, facts, and the invariants, which are asked at every event."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from publisher.epochs import Claim
from shared.errors import StoreError
from shared.manifest import Manifest
from shared.versions import Version

from .adapters import Tensors
from .facts import Facts
from .invariants import ALL, NeverOlderThanSeen, Rules, Violation
from .scheduler import Scheduler
from .sim_store import Bucket, Object
from .weather import Weather

Result = TypeVar("Result")

MAX_SKEW_S = 600.0  # ten minutes, either way
RETRY_S = 1.0


@dataclass(frozen=True)
class Scenario:
    """Who takes part in a seed, and under which rules."""

    weather: Weather
    ranks: int
    readers: int
    collectors: int
    operators: int
    rules: Rules
    grace_s: float
    lease_ttl_s: float
    keeper_pause_s: float  # between two rounds of a collector or operator, on average
    pace_s: float  # that a step takes at most

    @classmethod
    def of(cls, rng: random.Random) -> "Scenario":
        """Draw a seed's scenario."""
        return cls(
            weather=Weather.of(rng),
            ranks=rng.choice((1, 1, 2, 3)),
            readers=rng.choice((1, 2, 3)),
            collectors=rng.choice((0, 1, 1, 2)),
            operators=rng.choice((0, 1, 2)),
            rules=Rules(rng.choice((2, 2, 3)), rng.choice((0.0, 0.0, 20.0)), rng.choice((8.0, 30.0, 60.0))),
            grace_s=rng.choice((0.0, 5.0, 20.0)),
            lease_ttl_s=rng.choice((20.0, 40.0)),
            keeper_pause_s=rng.choice((2.0, 15.0)),
            pace_s=rng.choice((0.02, 0.05, 0.1)),
        )


class Stage:
    """See the module. Actors report to it what only they know; the bucket reports the rest."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.scenario = Scenario.of(self.rng)
        self.scheduler = Scheduler(self.rng, self.scenario.pace_s)
        self.bucket = Bucket(self.scheduler, self.skew_s())
        self.bucket.observer = self
        self.bucket.whole_seconds = self.rng.random() < 0.5
        self.bucket.in_pages = self.rng.random() < 0.5
        self.bucket.reply_s = self.rng.choice((0.05, 0.2, 0.2, 2.0))
        self.facts = Facts(self.bucket)
        self.violation: Violation | None = None
        self.invariants = [kind(self.facts, self.scenario.rules, self.broken) for kind in ALL]
        self.seen = next(found for found in self.invariants if isinstance(found, NeverOlderThanSeen))

    def skew_s(self) -> float:
        """Draw how far a host's clock is off."""
        return self.rng.uniform(-MAX_SKEW_S, MAX_SKEW_S)

    def happens(self, probability: float) -> bool:
        """Draw whether something that has this probability happens."""
        return probability > 0.0 and self.rng.random() < probability

    def broken(self, violation: Violation) -> None:
        """The first broken promise is the one that counts."""
        if self.violation is None:
            self.violation = violation
            self.scheduler.note("", "VIOLATION", violation.invariant, violation.problem)

    def until_store_answers(self, call: Callable[[], Result]) -> Result:
        """Make a call again until the store answers, as every long-lived process of ours does."""
        while True:
            try:
                return call()
            except StoreError as error:
                if not error.retryable:
                    raise
                self.scheduler.switch(self.rng.uniform(0.5, 1.5) * RETRY_S)

    def wrote(self, actor: str, key: str, before: Object | None, after: Object) -> None:
        for invariant in self.invariants:
            invariant.before_write(key, before, after)
        self.facts.wrote(actor, key, after)

    def deleted(self, actor: str, key: str, before: Object) -> None:
        for invariant in self.invariants:
            invariant.deleted(key, before)
        self.facts.deleted(key)

    def read(self, actor: str, key: str, content: bytes) -> None:
        if "/manifests/" in key:
            self.facts.read_manifest(actor, key, content)

    def submitted(self, version: Version, tensors: Tensors) -> None:
        self.facts.submitted.setdefault(version, tensors)

    def claimed(self, author: str, claim: Claim) -> None:
        self.scheduler.note(author, "owns", f"epoch {claim.epoch}")
        for invariant in self.invariants:
            invariant.claimed(author, claim)

    def acknowledged(self, author: str, manifest: Manifest, asked_at: float) -> None:
        self.scheduler.note(author, "committed", str(manifest.version))
        for invariant in self.invariants:
            invariant.acknowledged(author, manifest, asked_at)

    def fenced(self, author: str, version: Version) -> None:
        self.scheduler.note(author, "fenced", str(version))
        for invariant in self.invariants:
            invariant.fenced(author, version)

    def activated(self, reader: str, manifest: Manifest, tensors: Tensors, flipped: bool) -> None:
        self.scheduler.note(reader, "serves", str(manifest.version))
        for invariant in self.invariants:
            invariant.activated(reader, manifest, tensors, flipped)

    def pinned(self, version: Version) -> None:
        for invariant in self.invariants:
            invariant.pinned(version)
