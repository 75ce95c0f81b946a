"""Which versions does the policy in training descend from?

Every life of the trainer is an epoch. It resumes at some number of an earlier epoch, so that epoch's later versions are
no ancestors of it, though their numbers may be lower than its own. Worked through:

    epoch 1 publishes 0 .. 10; epoch 2 resumes at number 5 and publishes 5 .. 8; epoch 3 resumes at epoch 2's number 7
    ancestors of epoch 3: every (2, n <= 7) and (1, n <= 5), not (1, 6): it was trained on and thrown away

A rollback is a version of an epoch of its own, with the weights of its origin: it belongs to who went on from there.
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

    def oldest(self, number: int) -> Version:
        """The first of the ancestors, in the order of versions, whose number is not below `number`."""
        epochs = [last.epoch for last in self.before if last.number >= number]
        return Version(min((*epochs, self.epoch)), number)

    def resumed(self, epoch: int, number: int, rollback: Version | None = None) -> "Lineage":
        """The lineage of a new life that goes on from this one's `number`.

        Args:
            rollback: that it goes on after. What was sampled from it counts if `number` has come as far.
        """
        before = [Version(last.epoch, min(last.number, number)) for last in (*self.before, Version(self.epoch, number))]
        if rollback is not None and rollback.number <= number:
            before.append(rollback)
        return Lineage(epoch, tuple(before))

    def to_json(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "before": [list(version) for version in self.before]}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> "Lineage":
        return cls(int(body["epoch"]), tuple(Version(int(epoch), int(number)) for epoch, number in body["before"]))


@dataclass(frozen=True)
class Past:
    """What a rollback went back to: its own version, and step and lineage of the weights that it has."""

    rollback: Version
    step: int
    lineage: Lineage

    def holds(self, epoch: int, step: int, publish_every: int) -> bool:
        """Whether a checkpoint may be gone on from: made after the rollback, or on the way to those weights."""
        return epoch > self.rollback.epoch or self.led_there(epoch, step, publish_every)

    def led_there(self, epoch: int, step: int, publish_every: int) -> bool:
        """Whether a checkpoint was made on the way to those weights."""
        return step <= self.step and self.lineage.includes(Version(epoch, step // publish_every))
