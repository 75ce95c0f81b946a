"""Who goes on: actors as greenlets, one seeded source of chance, one simulated time.

A killed actor is gone as by SIGKILL: GreenletExit unwinds it, and neither its `finally` nor anything else of it reaches
the store any more. A stopped one (SIGSTOP) keeps all it knows and goes on later, when the world has moved.
"""

import hashlib
import random
from collections.abc import Callable
from typing import Any

from greenlet import GreenletExit, getcurrent, greenlet

Line = tuple[float, str, str, str, str]


class Actor(greenlet):
    """One process. `clock` is its host's idea of Unix time, `monotonic` its idea of elapsed seconds."""

    def __init__(self, scheduler: "Scheduler", name: str, body: Callable[[], None], skew_s: float) -> None:
        super().__init__(body)
        self.name, self.skew_s = name, skew_s
        self.wake_at = scheduler.now
        self.killed = False
        self._scheduler = scheduler

    def clock(self) -> float:
        return EPOCH_S + self._scheduler.now + self.skew_s

    def monotonic(self) -> float:
        return self._scheduler.now


EPOCH_S = 1_795_000_000.0  # Unix time at which every simulation begins


class Scheduler:
    """Runs actors step by step; a step is what one of them does between two calls of `switch`."""

    def __init__(self, rng: random.Random, pace_s: float) -> None:
        self.rng, self.pace_s = rng, pace_s
        self.now = 0.0  # seconds since the simulation began
        self.steps = 0
        self.actors: list[Actor] = []
        self.trace: list[Line] = []
        self.on_end: Callable[[Actor], None] = lambda _: None
        self._main = getcurrent()

    def spawn(self, name: str, body: Callable[[], None], *, skew_s: float = 0.0, delay_s: float = 0.0) -> Actor:
        """Add an actor, which begins after `delay_s`."""
        actor = Actor(self, name, body, skew_s)
        actor.wake_at = self.now + delay_s
        self.actors.append(actor)
        return actor

    def switch(self, delay_s: float = 0.0) -> None:
        """Called by an actor: let others go on, and come back after `delay_s` at the earliest."""
        actor: Any = getcurrent()
        if actor.killed:
            raise GreenletExit
        actor.wake_at = self.now + delay_s
        self._main.switch()
        if actor.killed:
            raise GreenletExit

    def step(self) -> bool:
        """Let one actor go on; False when there is none left."""
        if not self.actors:
            return False
        ready = [actor for actor in self.actors if actor.wake_at <= self.now]
        if not ready:
            self.now = min(actor.wake_at for actor in self.actors)
            ready = [actor for actor in self.actors if actor.wake_at <= self.now]
        actor = ready[int(self.rng.random() * len(ready))]
        self.steps += 1
        self.now += self.rng.random() * self.pace_s
        actor.switch()
        if actor.dead:
            self._end(actor)
        return True

    def kill(self, actor: Actor) -> None:
        """SIGKILL."""
        actor.killed = True
        self.note(actor.name, "killed")
        actor.throw(GreenletExit)
        self._end(actor)

    def stop(self, actor: Actor, seconds: float) -> None:
        """SIGSTOP, and SIGCONT after `seconds`."""
        self.note(actor.name, "stopped", f"{seconds:.0f} s")
        actor.wake_at = max(actor.wake_at, self.now + seconds)

    def note(self, actor: str, what: str, about: str = "", outcome: str = "") -> None:
        """Add a line to the trace."""
        self.trace.append((self.now, actor, what, about, outcome))

    def trace_digest(self) -> str:
        """Two runs with the same digest did the same things at the same times."""
        digest = hashlib.sha256()
        for line in self.trace:
            digest.update(repr(line).encode())
        return digest.hexdigest()

    def _end(self, actor: Actor) -> None:
        self.actors.remove(actor)
        self.on_end(actor)
