"""What a fleet of rollout nodes asks of an object store, what that costs a month, and how late it notices a version.

    python -m benchmarks.fleet                    # the tables of docs/scale.md
    python -m benchmarks.fleet --write            # ... written into it

Two steps. First the real code of one node (Watcher, Agent, Delivery with download and verification, NodeHint, and what
the sampler asks before it begins a request) runs for an hour of simulated time over a store that counts, with a version
every 20 s. Then 1,000 nodes are simulated as the times at which they look, drawn by the real Watcher's own jitter: that
gives the lag and the busiest second. Everything else is proportional to the number of nodes, for no node asks anything
on another's account.

Not in the numbers: the trainer (a dozen requests a version), trajectories and evaluations (what they weigh depends on
the task), retries, and the time that a request takes: the lag is from the write of LATEST to the look that finds it.
"""

import argparse
import heapq
import math
import random
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.counted_node import (
    ADAPTER,
    HOUR_S,
    SEED,
    VERSION_EVERY_S,
    CountingStore,
    sample_for_an_hour,
    serve_for_an_hour,
)
from rollout.watch import Watcher
from shared.catalog import Catalog
from shared.manifest import PART_BYTES

POLL_INTERVALS_S = (0.5, 1.0, 2.0, 5.0, 10.0)
NODES = (10, 100, 1_000, 10_000)
MONTH_S = 30 * 24 * HOUR_S
SIMULATED_NODES = 1_000
SIMULATED_S = 120.0

# S3 Standard, us-east-1, from https://aws.amazon.com/s3/pricing/ in November 2026. A GET that is answered 304 is a GET.
DOLLARS_PER_GET = 0.0004 / 1_000
DOLLARS_PER_PUT = 0.005 / 1_000  # and LIST; DELETE is free
DOLLARS_PER_GB_OUT = 0.09  # to the internet, the first 10 TB of a month; within the region nothing
# Attention alone at a low rank; every linear of Qwen3-30B-A3B at rank 32.
ADAPTERS = {"20 MB": 20_000_000, "3.4 GB": 3_400_000_000}


@dataclass(frozen=True)
class Requests:
    """What one node asks of the store, a second."""

    get: float
    put: float
    list: float

    @property
    def all(self) -> float:
        return self.get + self.put + self.list

    @property
    def dollars_a_month(self) -> float:
        return MONTH_S * (self.get * DOLLARS_PER_GET + (self.put + self.list) * DOLLARS_PER_PUT)

    def __add__(self, other: "Requests") -> "Requests":
        return Requests(self.get + other.get, self.put + other.put, self.list + other.list)

    @classmethod
    def counted(cls, asked: Counter[tuple[str, str]], seconds: float) -> "Requests":
        sums = {kind: sum(n for (k, _), n in asked.items() if k == kind) / seconds for kind in ("GET", "PUT", "LIST")}
        return cls(sums["GET"], sums["PUT"], sums["LIST"])


@dataclass(frozen=True)
class Arrivals:
    """When a fleet looks: how late versions are noticed, and the most requests that fall into one second."""

    lag_mean_s: float
    lag_p99_s: float
    busiest_second: int


def simulate_arrivals(poll_interval_s: float, requests_a_version: int) -> Arrivals:
    """Simulate the looks of SIMULATED_NODES nodes that were started within one interval.

    Args:
        requests_a_version: what a node asks beside its look when it finds a version.
    """
    rng = random.Random(SEED)
    watcher = Watcher(
        Catalog(CountingStore(), ADAPTER), poll_interval_s=poll_interval_s, list_interval_s=0.0, rng=random.Random(SEED)
    )
    looks = [(rng.uniform(0.0, poll_interval_s), node) for node in range(SIMULATED_NODES)]
    heapq.heapify(looks)
    seen = [0] * SIMULATED_NODES
    lags: list[float] = []
    by_second: Counter[int] = Counter()
    while looks[0][0] < SIMULATED_S:
        now, node = looks[0]
        by_second[int(now)] += 1
        out = int(now // VERSION_EVERY_S)
        if out > seen[node]:
            seen[node] = out
            lags.append(now - out * VERSION_EVERY_S)
            by_second[int(now)] += requests_a_version
        heapq.heapreplace(looks, (now + watcher.pause_s(), node))
    cuts = statistics.quantiles(lags, n=100)
    return Arrivals(statistics.fmean(lags), cuts[98], max(by_second.values()))


def parts(size: int) -> int:
    """GETs for an adapter's bytes: one a part."""
    return math.ceil(size / PART_BYTES)


def tables() -> Iterator[str]:
    """The tables, in Markdown."""
    versions = HOUR_S / VERSION_EVERY_S
    counted = {poll: serve_for_an_hour(poll) for poll in POLL_INTERVALS_S}
    asked = {poll: Counter({k: n for k, n in c.items() if k != ("GET", "data")}) for poll, c in counted.items()}
    serving = {poll: Requests.counted(asked[poll], HOUR_S) for poll in POLL_INTERVALS_S}
    sampling = {poll: Requests.counted(sample_for_an_hour(poll), HOUR_S) for poll in POLL_INTERVALS_S}
    one = asked[1.0]
    a_version = round(sum(n for (_, folder), n in one.items() if folder != "LATEST") / versions)

    yield "One node, one version every 20 s, without the adapter's own bytes:"
    yield ""
    yield (
        "| poll, s | lag mean, s | lag p99, s | GET/s | PUT/s | LIST/hour | $/month | sampling adds, $/month |"
        " 1,000 nodes: busiest second |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for poll in POLL_INTERVALS_S:
        requests, arrivals = serving[poll], simulate_arrivals(poll, a_version)
        yield (
            f"| {poll:g} | {arrivals.lag_mean_s:.2f} | {arrivals.lag_p99_s:.2f} | {requests.get:.2f} |"
            f" {requests.put:.2f} | {requests.list * HOUR_S:.0f} | {requests.dollars_a_month:.2f} |"
            f" {sampling[poll].dollars_a_month:.2f} | {arrivals.busiest_second:,} |"
        )
    yield ""
    yield "Where a node's requests go, in an hour at a poll interval of 1 s:"
    yield ""
    yield "| request | object | an hour |"
    yield "| --- | --- | --- |"
    for (kind, folder), number in sorted(one.items()):
        yield f"| {kind} | {folder} | {number:,} |"
    yield ""
    yield "The fleet, serving, the adapter's bytes included:"
    yield ""
    heads = "".join(f" requests/s, {name} | $/month, {name} |" for name in ADAPTERS)
    yield f"| nodes | poll, s |{heads}"
    yield f"| --- | --- |{' --- |' * 2 * len(ADAPTERS)}"
    for nodes in NODES:
        for poll in POLL_INTERVALS_S:
            cells = ""
            for size in ADAPTERS.values():
                whole = serving[poll] + Requests(parts(size) / VERSION_EVERY_S, 0.0, 0.0)
                cells += f" {nodes * whole.all:,.0f} | {nodes * whole.dollars_a_month:,.0f} |"
            yield f"| {nodes:,} | {poll:g} |{cells}"
    yield ""
    yield "The adapter's bytes, whatever the poll interval, and what they would cost if they left the region:"
    yield ""
    yield "| nodes |" + "".join(f" GB/month, {name} | $/month to the internet |" for name in ADAPTERS)
    yield f"| --- |{' --- |' * 2 * len(ADAPTERS)}"
    for nodes in NODES:
        cells = ""
        for size in ADAPTERS.values():
            gigabytes = nodes * size / 1e9 * MONTH_S / VERSION_EVERY_S
            cells += f" {gigabytes:,.0f} | {gigabytes * DOLLARS_PER_GB_OUT:,.0f} |"
        yield f"| {nodes:,} |{cells}"


BEGIN, END = "<!-- benchmarks.fleet: begin -->\n", "<!-- benchmarks.fleet: end -->\n"
PAGE = Path(__file__).parent.parent / "docs" / "scale.md"


def main() -> None:
    parser = argparse.ArgumentParser(description="What a fleet asks of an object store, and what that costs.")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/scale.md")
    text = "\n".join(tables()) + "\n"
    if parser.parse_args().write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}{text}{END}{rest.partition(END)[2]}", encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
