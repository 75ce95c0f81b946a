"""Many readers as real processes, some killed as they read, versions faster than they can follow (reader_fleet.py)."""

import hashlib
import itertools
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from reader_fleet import ADAPTER, Outcome, Plan
from synthetic import BASE, EXPECTED, factors, open_publisher, write_base

from publisher.convert import convert
from shared.catalog import Catalog
from shared.fetch import WEIGHTS, fetch
from shared.stores import open_store

HERE = Path(__file__).parent
CONVERGED_S = 5.0
MAX_BYTES = 6 << 30
RUN_S = 300.0


@dataclass(frozen=True)
class Line:
    """One line of a reader's log."""

    life: int
    what: str
    number: int
    at: float
    digest: str


@dataclass(frozen=True)
class Run:
    """A fleet's run: what was published when, what each reader did, what it cost."""

    plan: Plan
    published_at: dict[int, float]
    published_s: float
    logs: dict[int, list[Line]]
    outcome: Outcome

    def converged_s(self) -> list[float]:
        """For each reader, how long after the last version was out it served it."""
        last = self.plan.versions - 1
        at = {reader: min(line.at for line in lines if line.number == last) for reader, lines in self.logs.items()}
        return sorted(served - self.published_at[last] for served in at.values())


def run_fleet(folder: Path, plan: Plan) -> Run:
    """Run publisher and fleet to the end.

    Raises:
        AssertionError: one of them failed, or they take too long.
    """
    write_base(folder / "base")
    arguments = [str(folder), json.dumps(asdict(plan))]
    fleet = subprocess.Popen([sys.executable, str(HERE / "reader_fleet.py"), *arguments])
    publisher = subprocess.Popen([sys.executable, str(HERE / "fleet_publisher.py"), *arguments])
    try:
        assert publisher.wait(RUN_S) == 0
        assert fleet.wait(RUN_S) == 0
    finally:
        for process in (publisher, fleet):
            process.kill()
            process.wait()
    published = json.loads((folder / "published.json").read_text())
    logs: dict[int, list[Line]] = defaultdict(list)
    for path in sorted((folder / "logs").iterdir()):
        for text in path.read_text().splitlines():
            life, what, number, at, digest = text.split()
            logs[int(path.stem[-3:])].append(Line(int(life), what, int(number), float(at), digest))
    outcome = Outcome(**json.loads((folder / "fleet.json").read_text()))
    published_at = {int(number): at for number, at in published["at"].items()}
    return Run(plan, published_at, published["seconds"], dict(logs), outcome)


def true_digests(folder: Path, versions: int) -> dict[int, str]:
    """The sha256 of each version's file, from its values, past every process of the run."""
    store, base = open_store(str(folder / "truth")), write_base(folder / "base")
    publisher = open_publisher(store, base)
    for number in range(versions):
        publisher.submit(number, convert(BASE, factors(number)), training={"step": number})
    publisher.close()
    catalog = Catalog(store, ADAPTER)
    digests = {}
    for version in catalog.versions():
        place = fetch(store, catalog.manifest(version), EXPECTED, folder / "true" / str(version), base_name="base")
        digests[version.number] = hashlib.sha256((place / WEIGHTS).read_bytes()).hexdigest()
    return digests


def demand_sound(run: Run, folder: Path) -> None:
    """No reader went back or activated what was not published, and all came to the last version."""
    plan, truth = run.plan, true_digests(folder, run.plan.versions)
    again = f"again: run_fleet(folder, {plan})"
    assert len(run.logs) == plan.readers and run.outcome.deaths == plan.killed, again
    for reader, lines in run.logs.items():
        activated = [line for line in lines if line.what == "activated"]
        assert [line for line in activated if line.digest != truth[line.number]] == [], f"reader {reader}, {again}"
        assert not {line.number for line in activated} & plan.damaged_numbers(), f"reader {reader}, {again}"
        for before, after in itertools.pairwise(activated):
            is_on = before.number < after.number or (before.number == after.number and before.life < after.life)
            assert is_on, f"reader {reader} went from {before} to {after}, {again}"
        assert {line.number for line in lines if line.what == "refused"} <= plan.damaged_numbers(), again
    assert set(run.outcome.last.values()) == {plan.versions - 1}, again
    assert run.outcome.most_bytes < MAX_BYTES, again


def told(run: Run) -> str:
    """The run's figures."""
    late, outcome, plan = run.converged_s(), run.outcome, run.plan
    cuts = statistics.quantiles(late, n=100, method="inclusive")
    lines = [line for reader in run.logs.values() for line in reader]
    counts = {what: sum(line.what == what for line in lines) for what in ("activated", "refused")}
    asked, looks = outcome.asked["get"] + outcome.asked["list"], outcome.asked["look"]
    return (
        f"{plan.readers} readers, {outcome.deaths} killed, {plan.versions} versions in {run.published_s:.1f} s:"
        f" converged p50 {cuts[49]:.2f} s, p99 {cuts[98]:.2f} s, max {late[-1]:.2f} s after the last version;"
        f" {counts['activated']} activations, {counts['refused']} refusals of {plan.damaged} damaged versions;"
        f" {asked} requests ({outcome.asked['list']} listings) in {looks} looks; {outcome.cpu_s:.1f} s of CPU"
        f" in {outcome.seconds:.1f} s; {outcome.most_bytes >> 20} MiB"
    )


def test_a_fleet_of_32_follows_20_versions_at_10_a_second_while_some_are_killed(tmp_path: Path) -> None:
    run = run_fleet(tmp_path, Plan(readers=32, versions=20, killed=4, damaged=2, seed=1))
    print(told(run))
    demand_sound(run, tmp_path)


@pytest.mark.soak
def test_a_fleet_of_128_follows_50_versions_at_10_a_second_while_a_tenth_is_killed(tmp_path: Path) -> None:
    """Alone on its machine: the only test that asks how soon."""
    run = run_fleet(tmp_path, Plan(readers=128, versions=50, killed=13, damaged=4, seed=1))
    print(told(run))
    demand_sound(run, tmp_path)
    assert run.converged_s()[-1] < CONVERGED_S
