"""Where each object of an adapter lies below the store's URL. The one place that spells keys.

{adapter}/layout.json                                                    written once
{adapter}/run.json                                                       written once: what a replay needs to know
{adapter}/epochs/{epoch:08d}.json                                        claim of a trainer's life
{adapter}/data/{epoch:08d}-{number:012d}/{attempt}/...                   shards and rank records
{adapter}/manifests/{epoch:08d}-{number:012d}.json                       THE commit
{adapter}/fates/{epoch}-{number}/{n:06d}.json                            pinned, unpinned, collected: a log, n from 1
{adapter}/rollbacks/{epoch}-{number}/{epoch}-{number}.json               the second version uses the first one's data
{adapter}/leases/{holder}-{n:06d}.json                                   overwritten: versions that a reader is using
{adapter}/LATEST                                                         overwritten hint
{adapter}/trainer.json                                                   overwritten hint: the trainer's progress
{adapter}/receipts/{epoch}-{number}/{node}.json                          a node serves the version, proven
{adapter}/nodes/{node}.json                                              overwritten hint: a node's state
{adapter}/trajectories/{epoch}-{number}/{node}-{life}-{sequence}-g{groups}.parquet
{adapter}/evaluations/{epoch}-{number}/{node}.parquet                    held-out completions, by served version
{adapter}/checkpoints/{epoch:08d}-{step:012d}/...                        the trainer's own state
"""

import re
from dataclasses import dataclass

from shared.errors import UsageError
from shared.versions import ADAPTER_NAME, Version

LAYOUT = 1

_STEM = "([0-9]{8})-([0-9]{12})"
_MANIFEST = re.compile(rf"manifests/{_STEM}\.json")
_BELOW = re.compile(rf"(?:data|fates|receipts|trajectories|evaluations)/{_STEM}/.+", re.DOTALL)
_ROLLBACK = re.compile(rf"rollbacks/{_STEM}/{_STEM}\.json")


@dataclass(frozen=True)
class Layout:
    """Keys of one adapter."""

    adapter: str

    def __post_init__(self) -> None:
        if not ADAPTER_NAME.fullmatch(self.adapter):
            hint = "Use letters, digits, dot, dash and underscore; at most 64"
            raise UsageError(f"not an adapter name: {self.adapter!r}", key="store.adapter", hint=hint)

    @property
    def layout(self) -> str:
        return f"{self.adapter}/layout.json"

    @property
    def run(self) -> str:
        return f"{self.adapter}/run.json"

    @property
    def epochs(self) -> str:
        return f"{self.adapter}/epochs"

    def epoch(self, epoch: int) -> str:
        return f"{self.epochs}/{epoch:08d}.json"

    @property
    def manifests(self) -> str:
        return f"{self.adapter}/manifests"

    def manifest(self, version: Version) -> str:
        return f"{self.manifests}/{stem(version)}.json"

    def attempt(self, version: Version, attempt: str) -> str:
        return f"{self.data}/{stem(version)}/{attempt}"

    @property
    def data(self) -> str:
        return f"{self.adapter}/data"

    @property
    def fates(self) -> str:
        return f"{self.adapter}/fates"

    def fate(self, version: Version, n: int) -> str:
        return f"{self.fates}/{stem(version)}/{n:06d}.json"

    @property
    def rollbacks(self) -> str:
        return f"{self.adapter}/rollbacks"

    def rollback(self, source: Version, version: Version) -> str:
        """The marker that `version` uses the data of `source`."""
        return f"{self.rollbacks}/{stem(source)}/{stem(version)}.json"

    @property
    def leases(self) -> str:
        return f"{self.adapter}/leases"

    def lease(self, holder: str, n: int) -> str:
        return f"{self.leases}/{holder}-{n:06d}.json"

    @property
    def latest(self) -> str:
        return f"{self.adapter}/LATEST"

    @property
    def trainer(self) -> str:
        return f"{self.adapter}/trainer.json"

    @property
    def receipts(self) -> str:
        return f"{self.adapter}/receipts"

    def receipt(self, version: Version, node: str) -> str:
        return f"{self.receipts}/{stem(version)}/{node}.json"

    @property
    def nodes(self) -> str:
        return f"{self.adapter}/nodes"

    def node(self, node: str) -> str:
        return f"{self.nodes}/{node}.json"

    @property
    def all_trajectories(self) -> str:
        return f"{self.adapter}/trajectories"

    def trajectories(self, version: Version) -> str:
        return f"{self.all_trajectories}/{stem(version)}"

    @property
    def evaluations(self) -> str:
        return f"{self.adapter}/evaluations"

    def evaluation(self, version: Version, node: str) -> str:
        return f"{self.evaluations}/{stem(version)}/{node}.parquet"

    @property
    def checkpoints(self) -> str:
        return f"{self.adapter}/checkpoints"

    def checkpoint(self, epoch: int, step: int) -> str:
        return f"{self.checkpoints}/{epoch:08d}-{step:012d}"

    @property
    def probes(self) -> str:
        return f"{self.adapter}/probes"


def groups_of(key: str) -> int:
    """The number of groups that a trajectory file's key promises; 0 for a key of another form."""
    digits = key.removesuffix(".parquet").rpartition("-g")[2]
    return int(digits) if digits.isascii() and digits.isdigit() else 0


def stem(version: Version) -> str:
    """The sortable form of a version inside a key."""
    return f"{version.epoch:08d}-{version.number:012d}"


def version_of(key: str) -> Version | None:
    """The version that a key below manifests/, data/, fates/, receipts/, trajectories/ or evaluations/ is about.

    None for a key of another form: a copy that somebody made beside them (manifests/backup/...) speaks for no version.
    """
    name = key.partition("/")[2]
    match = _MANIFEST.fullmatch(name) or _BELOW.fullmatch(name)
    return Version(int(match[1]), int(match[2])) if match else None


def rollback_of(key: str) -> tuple[Version, Version] | None:
    """(source, version) of a key below rollbacks/; None for a key of another form."""
    match = _ROLLBACK.fullmatch(key.partition("/")[2])
    return (Version(int(match[1]), int(match[2])), Version(int(match[3]), int(match[4]))) if match else None
