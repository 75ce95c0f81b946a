"""What really happened, as nobody in the simulation can know it: from every change of the bucket, in its own order."""

import itertools
import math
from collections import defaultdict
from dataclasses import dataclass

from shared import strict_json
from shared.layout import Layout, rollback_of, version_of
from shared.manifest import VOID, Manifest
from shared.versions import Version

from .adapters import ADAPTER, Tensors
from .sim_store import Bucket, Object

LAYOUT = Layout(ADAPTER)
MAX_BYTES = 1_000_000


@dataclass
class Lease:
    """A lease as it stands on the store. A version is proven if its manifest was read under it, by its holder."""

    holder: str
    renewed_at: float  # the store's clock, as all times here
    ttl_s: float
    proven: dict[Version, bool]

    def lives(self, now: float) -> bool:
        return now - self.renewed_at <= self.ttl_s


class Facts:
    """The history of the bucket, told by versions."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.submitted: dict[Version, Tensors] = {}
        self.sources: dict[Version, Version] = {}  # rollbacks: new version -> the one whose data it uses
        self.rolling_back: dict[str, Version] = {}  # operator -> where it means to go back to
        self.committed: dict[Version, Manifest] = {}  # ever; voided ones too
        self.committed_at: dict[Version, float] = {}
        self.acknowledged: dict[Version, str] = {}  # version -> digest that its publisher was told
        self.voided: set[Version] = set()
        self.users: dict[str, set[Version]] = defaultdict(set)  # attempt -> the versions whose shards lie there
        self.fates: dict[Version, list[str]] = defaultdict(list)
        self.leases: dict[str, Lease] = {}
        self._written_at: dict[Version, list[float]] = defaultdict(list)  # data, in order
        self.claimed_at: dict[int, float] = {}  # when an epoch's claim stood on the store

    @property
    def now(self) -> float:
        return self.bucket.clock()

    def standing(self) -> list[Version]:
        """Versions whose manifest stands, ascending."""
        return sorted(self.committed.keys() - self.voided)

    def users_of(self, version: Version) -> set[Version]:
        """The versions whose shards lie in this one's attempt: itself, and its rollbacks."""
        attempts = {attempt_of(shard.key) for shard in self.committed[version].shards}
        return {user for attempt in attempts if version_of(attempt) == version for user in self.users[attempt]}

    def longest_quiet_s(self, version: Version) -> float:
        """For how long nothing was written of an attempt, at most, up to now; endless if nothing ever was."""
        times = self._written_at[version]
        return max((b - a for a, b in itertools.pairwise([*times, self.now])), default=math.inf)

    def tensors(self, version: Version) -> Tensors | None:
        """What was submitted as this version, or as the one that it rolled back to."""
        while version in self.sources:
            version = self.sources[version]
        return self.submitted.get(version)

    def in_use(self, version: Version) -> str:
        """Who may rely on a version's data now; empty if nobody."""
        for lease in self.leases.values():
            if lease.proven.get(version) and lease.lives(self.now):
                return f"leased by {lease.holder}"
        if self.fates[version][-1:] == ["pinned"]:
            return "pinned"
        return "its manifest stands" if version in self.committed.keys() - self.voided else ""

    def wrote(self, actor: str, key: str, after: Object) -> None:
        """Learn from a write."""
        version = version_of(key)
        if key.startswith(f"{LAYOUT.manifests}/") and version:
            if after.content == VOID:
                self.voided.add(version)
            else:
                self._rolled_back(actor, version)
                self._committed(version, Manifest.parse(after.content, key=key))
        elif key.startswith(f"{LAYOUT.data}/") and version:
            self._written_at[version].append(self.now)
        elif key.startswith(f"{LAYOUT.fates}/") and version:
            self.fates[version].append(str(_json(key, after)["fate"]))
        elif key.startswith(f"{LAYOUT.leases}/"):
            self._renewed(key, after)
        elif key.startswith(f"{LAYOUT.rollbacks}/") and (pair := rollback_of(key)):
            self._rolled_back(actor, pair[1])
        elif key.startswith(f"{LAYOUT.epochs}/"):
            self.claimed_at.setdefault(int(key.rsplit("/", 1)[-1].removesuffix(".json")), self.now)

    def deleted(self, key: str) -> None:
        """Learn from a deletion."""
        if key.startswith(f"{LAYOUT.leases}/"):
            self.leases.pop(key, None)

    def _rolled_back(self, actor: str, version: Version) -> None:
        """The first that is heard of a rollback says what its operator is about; marker or manifest may come late."""
        if actor in self.rolling_back:
            self.sources.setdefault(version, self.rolling_back[actor])

    def _committed(self, version: Version, manifest: Manifest) -> None:
        self.committed.setdefault(version, manifest)
        self.committed_at.setdefault(version, self.now)
        for shard in manifest.shards:
            self.users[attempt_of(shard.key)].add(version)

    def read_manifest(self, holder: str, key: str, content: bytes) -> None:
        """A holder was given a manifest: from here on it may count on its leases."""
        version = version_of(key)
        if version and content != VOID:
            for lease in self._live_leases(holder):
                if version in lease.proven:
                    lease.proven[version] = True

    def _renewed(self, key: str, after: Object) -> None:
        """What a holder had proven stays proven as long as one of its leases has it and lives."""
        body = strict_json.load_object(after.content, key=key, max_bytes=MAX_BYTES)
        holder, versions = str(body["holder"]), [Version.parse(text) for text in body["versions"]]
        before = self._live_leases(holder)
        proven = {version: any(lease.proven.get(version) for lease in before) for version in versions}
        self.leases[key] = Lease(holder, self.now, float(body["ttl_s"]), proven)

    def _live_leases(self, holder: str) -> list[Lease]:
        return [lease for lease in self.leases.values() if lease.holder == holder and lease.lives(self.now)]


def attempt_of(key: str) -> str:
    """The attempt that a key below data/ belongs to."""
    return "/".join(key.split("/")[:4])


def _json(key: str, after: Object) -> dict[str, object]:  # values as the writers of these objects promise
    return strict_json.load_object(after.content, key=key, max_bytes=MAX_BYTES)
