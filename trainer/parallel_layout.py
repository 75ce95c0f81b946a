"""How the model is spread over ranks, and where this rank stands.

Promises: a layout that its ranks cannot form is refused with the numbers. Does not: touch any process group.
Sizes above 1 are carried everywhere; `trainer.model` says which of them this release runs.
"""

from dataclasses import dataclass

from shared.errors import UsageError


@dataclass(frozen=True)
class ParallelLayout:
    """Degrees of parallelism: tensor, pipeline, expert, expert-tensor, data. `dp` counts replicas of the dense part."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    dp: int = 1

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp * self.dp

    def check(self, world_size: int) -> None:
        """Refuse what `world_size` ranks cannot form.

        Raises:
            UsageError: with both sides of the sum.
        """
        if self.world_size != world_size:
            raise UsageError(
                f"tp {self.tp} x pp {self.pp} x dp {self.dp} = {self.world_size} ranks, but {world_size} were started",
                op="check layout",
            )
        if (self.tp * self.dp) % (self.ep * self.etp):
            raise UsageError(
                f"ep {self.ep} x etp {self.etp} does not divide tp {self.tp} x dp {self.dp}", op="check layout"
            )


@dataclass(frozen=True)
class Placement:
    """Where one rank stands. Layers and experts are counted over the whole model."""

    tp_rank: int = 0
    tp_size: int = 1
    etp_rank: int = 0
    etp_size: int = 1
    first_layer: int = 0
    first_expert: int = 0
