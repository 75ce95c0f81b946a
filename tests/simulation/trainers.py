"""Trainers: lives of one job, each of several ranks, which publish until they are killed, fenced or out of time.

A rank does what `publisher.publisher.Publisher` does in its thread: put the shard, then ask for the commit until every
record is there, outlasting a store that fails. Ranks of a dead life go on as zombies until they notice.
"""

from collections.abc import Callable
from dataclasses import dataclass

from publisher.commit import Heading, Rank, commit, mend_hint, put_shard
from publisher.epochs import Claim, claim_epoch
from shared.catalog import Catalog
from shared.errors import Corrupt, Fenced, KeyMissing, StoreError
from shared.manifest import Manifest, Parent
from shared.versions import Version

from .adapters import ADAPTER, EXPECTED, heading_of, shard_of, tensors_of
from .facts import LAYOUT
from .sim_store import SimStore
from .stage import Stage

RECORD_POLL_S = 0.5
RECORD_TIMEOUT_S = 30.0
GRACE_S = 2.0  # that ranks leave to rank 0
STEP_S = 6.0  # seconds that a training step takes, on average
NEXT_LIFE_S = 20.0  # at most, until a life that lost a rank has a successor


@dataclass
class Life:
    """What the ranks of one life share: in a real job, what rank 0 broadcasts."""

    name: str
    ranks: int
    versions: int  # how many it means to publish
    claim: Claim | None = None
    parent: Parent | None = None
    first_number: int = 0
    succeeded: bool = False  # whether a next life was started


class Job:
    """Starts a life, and another one when a rank of it is gone."""

    def __init__(self, stage: Stage, name: str) -> None:
        self._stage, self._name = stage, name
        self._lives: dict[str, Life] = {}  # by the name of a rank
        self.open = True  # whether a dead life gets a successor

    def begin(self, versions: int = 1000, delay_s: float = 0.0) -> Life:
        """Start a life."""
        life = Life(f"{self._name}-{len(self._lives)}", self._stage.scenario.ranks, versions)
        for index in range(life.ranks):
            rank = TrainerRank(self._stage, life, index)
            self._lives[rank.name] = life
            skew_s = self._stage.skew_s()
            rank.clock = self._stage.scheduler.spawn(rank.name, rank.run, skew_s=skew_s, delay_s=delay_s).clock
        return life

    def ended(self, name: str) -> None:
        """A rank is gone: its life gets a successor, which need not wait for the other ranks' end."""
        life = self._lives.get(name)
        if life and self.open and not life.succeeded:
            life.succeeded = True
            self.begin(delay_s=self._stage.rng.random() * NEXT_LIFE_S)


class TrainerRank:
    """One rank of one life."""

    clock: Callable[[], float]

    def __init__(self, stage: Stage, life: Life, index: int) -> None:
        self._stage, self._life, self._rank = stage, life, Rank(index, life.ranks)
        self.name = f"{life.name}.{index}"
        self._store = SimStore(stage.bucket, self.name)

    def run(self) -> None:
        """Publish until the life ends."""
        try:
            claim = self._begin()
            parent = self._life.parent
            for number in range(self._life.first_number, self._life.first_number + self._life.versions):
                version = Version(claim.epoch, number)
                tensors = tensors_of(claim.nonce, version)
                self._stage.submitted(version, tensors)
                heading = heading_of(version, self._rank.world, parent, self.clock())
                shard = shard_of(tensors, self._rank.index, self._rank.world)
                self._stage.until_store_answers(
                    lambda: put_shard(self._store, LAYOUT, claim, heading, self._rank, shard)  # noqa: B023 - called at once
                )
                manifest = self._commit(claim, heading)
                parent = Parent(manifest.version, manifest.digest)
                self._stage.scheduler.switch(self._stage.rng.expovariate(1 / STEP_S))
        except (Fenced, StoreError, Corrupt) as error:
            self._stage.scheduler.note(self.name, "ends", "", error.message)

    def _begin(self) -> Claim:
        """Rank 0 claims the epoch and finds what to go on from; the others wait for its word."""
        life = self._life
        while self._rank.index and life.claim is None:
            self._stage.scheduler.switch(RECORD_POLL_S)
        if life.claim is None:
            claim = self._stage.until_store_answers(lambda: claim_epoch(self._store, LAYOUT, self.clock))
            self._stage.claimed(life.name, claim)
            self._stage.until_store_answers(lambda: mend_hint(self._store, LAYOUT))
            life.parent = self._stage.until_store_answers(self._newest)
            latest = life.parent.version.number if life.parent else -1
            life.first_number = max(0, latest + self._stage.rng.choice((-1, 0, 1)))
            life.claim = claim
        return life.claim

    def _newest(self) -> Parent | None:
        catalog = Catalog(self._store, ADAPTER)
        newest = catalog.newest()
        if newest is None:
            return None
        try:
            return Parent(newest, catalog.manifest(newest).digest)
        except KeyMissing:  # collected in between: there are newer ones
            return self._newest()

    def _commit(self, claim: Claim, heading: Heading) -> Manifest:
        deadline = self._stage.scheduler.now + RECORD_TIMEOUT_S
        while True:
            asked_at, manifest = self._stage.until_store_answers(lambda: self._ask(claim, heading))
            if manifest is not None:
                self._stage.acknowledged(self.name, manifest, asked_at)
                return manifest
            if self._stage.scheduler.now > deadline:
                raise StoreError("records are missing", op="commit", version=str(heading.version))
            self._stage.scheduler.switch(RECORD_POLL_S)

    def _ask(self, claim: Claim, heading: Heading) -> tuple[float, Manifest | None]:
        """One call of `commit`, and when it began on the store's clock."""
        asked_at = self._stage.facts.now
        try:
            index, wait = self._rank.index, self._stage.scheduler.switch
            return asked_at, commit(
                self._store, LAYOUT, claim, heading, self._rank.world, EXPECTED, rank=index, grace_s=GRACE_S, wait=wait
            )
        except Fenced:
            self._stage.fenced(self.name, heading.version)
            raise
