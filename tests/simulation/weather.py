"""What goes wrong in a seed, and how often. Half of the kinds are off in any one seed, so that each shows alone too."""

import random
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Weather:
    """Probabilities, per call of the store or (kill, stop, step clock, take over) per step; zero is off."""

    refuse: float = 0.0  # the store answers with an error and does nothing
    lose_reply: float = 0.0  # the store does it; the answer is lost
    late: float = 0.0  # the caller hears of a timeout; the store does it later
    stall: float = 0.0  # a request about a manifest hangs before the store acts: there all races are decided
    twice: float = 0.0  # the store does it, and once more later: a request that was sent again below us
    tear_listing: float = 0.0  # a listing takes a while: what is written or deleted meanwhile may be in it or not
    old_hint: float = 0.0  # LATEST reads as it was some writes ago
    flip: float = 0.0  # a bit of a shard or manifest is flipped on its way to an agent
    kill: float = 0.0
    stop: float = 0.0
    step_clock: float = 0.0  # a host's clock is set anew, ten minutes off at most
    take_over: float = 0.0  # another life of the trainer begins while the last one is well
    lose_engine: float = 0.0  # an agent's engine is restarted and forgets its adapters

    @classmethod
    def of(cls, rng: random.Random) -> "Weather":
        """Draw a seed's weather."""
        return cls(**{kind: rng.choices(*SEVERITIES)[0] * BAD[kind] for kind in KINDS})


KINDS = [field.name for field in fields(Weather)]
SEVERITIES = (0.0, 0.3, 1.0, 5.0), (50, 25, 23, 2)  # times BAD, and how often
BAD = {
    "refuse": 0.1,
    "lose_reply": 0.1,
    "late": 0.04,
    "stall": 0.15,
    "twice": 0.04,
    "tear_listing": 0.3,
    "old_hint": 0.3,
    "flip": 0.04,
    "kill": 0.006,
    "stop": 0.02,
    "step_clock": 0.02,
    "take_over": 0.003,
    "lose_engine": 0.05,
}
CALM = Weather()
