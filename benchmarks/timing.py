"""Seconds, and what several runs of them say."""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class Stopwatch:
    """Collects seconds under names: `with watch("write"): ...`. Beside them the processor's, of all our threads."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.cpu_seconds: dict[str, list[float]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began, cpu_began = time.perf_counter(), time.process_time()
        yield
        self.seconds.setdefault(name, []).append(time.perf_counter() - began)
        self.cpu_seconds.setdefault(name, []).append(time.process_time() - cpu_began)

    def summary(self) -> dict[str, dict[str, float]]:
        """Median, least and most of each; `cpu` is the median of the processor's."""
        cpu = {name: round(statistics.median(seconds), 4) for name, seconds in self.cpu_seconds.items()}
        return {name: {**summary(seconds), "cpu": cpu[name]} for name, seconds in self.seconds.items()}


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, 4) for name, value in found.items()}


def total(watch: Stopwatch, *names: str) -> list[float]:
    """The sum of several names, run by run."""
    return [sum(run) for run in zip(*(watch.seconds[name] for name in names), strict=True)]
