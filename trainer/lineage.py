"""Which versions does the policy in training descend from?

Every life of the trainer is an epoch. It resumes at some number of an earlier epoch, so that epoch's later versions are
no ancestors of it, though their numbers may be lower than its own. Worked through:

    epoch 1 publishes 0 .. 10; epoch 2 resumes at number 5 and publishes 5 .. 8; epoch 3 resumes at epoch 2's number 7
    ancestors of epoch 3: every (2, n <= 7) and (1, n <= 5), not (1, 6): it was trained on and thrown away
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shared.versions import Version


@dataclass(frozen=True)
class Lineage:
    """This life's epoch, and for each life before it the highest number that lives on: (epoch, number)."""

    epoch: int
    before: tuple[Version, ...] = ()

    def includes(self, version: Version) -> bool:
        """Whether the version is an ancestor of this life's policy, or of this life itself."""
        if version.epoch == self.epoch:
            return True
        return any(version.epoch == last.epoch and version.number <= last.number for last in self.before)

    def resumed(self, epoch: int, number: int) -> "Lineage":
        """The lineage of a new life that goes on from this one's `number`."""
        before = (Version(last.epoch, min(last.number, number)) for last in self.before)
        return Lineage(epoch, (*before, Version(self.epoch, number)))

    def to_json(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "before": [list(version) for version in self.before]}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> "Lineage":
        return cls(int(body["epoch"]), tuple(Version(int(epoch), int(number)) for epoch, number in body["before"]))
