"""The store protocol under a seeded scheduler: 500 seeds hold, and every deliberate bug is found, by its own promise.

Replay a seed: python -m tests.simulation --seed N --trace [--bug NAME]
"""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from simulation.__main__ import main
from simulation.bugs import ALL as ALL_BUGS
from simulation.bugs import Bug
from simulation.invariants import ALL as ALL_INVARIANTS
from simulation.scheduler import Scheduler
from simulation.sim_store import Bucket, SimStore
from simulation.world import Result, run_seed

from shared.stores import probe

ROOT = Path(__file__).parent.parent
BATCH_SEEDS, BATCHES = 50, 10
MAX_SEEDS_TO_FIND = 400


@pytest.mark.parametrize("batch", range(BATCHES))
def test_every_promise_holds_in_seeds(batch: int, capsys: pytest.CaptureFixture[str]) -> None:
    first = batch * BATCH_SEEDS
    exit_code = main(["--seeds", f"{first}..{first + BATCH_SEEDS}"])
    assert exit_code == 0, capsys.readouterr().out  # names the seed, its trace and the command that replays it


@pytest.mark.parametrize("bug", ALL_BUGS, ids=lambda bug: bug.name)
def test_the_simulation_finds_each_deliberate_bug(bug: Bug) -> None:
    """By the promise that it breaks; a bug may break another one in other seeds."""
    with bug.planted():
        results = map(_result, range(MAX_SEEDS_TO_FIND))
        found = next((result for result in results if _broken(result) == bug.breaks.__name__), None)
        assert found is not None, f"no seed below {MAX_SEEDS_TO_FIND} finds: {bug.does}"
        assert _result(found.seed) == found, f"seed {found.seed} does not replay"
    assert _broken(_result(found.seed)) == "", f"seed {found.seed} breaks a promise without the bug too"


def test_every_promise_has_a_bug_that_breaks_it() -> None:
    assert {bug.breaks for bug in ALL_BUGS} == set(ALL_INVARIANTS)


def test_a_seed_replays_exactly_in_another_process() -> None:
    here = run_seed(7)[0]
    program = [sys.executable, "-m", "tests.simulation", "--seed", "7"]
    environment = {**os.environ, "PYTHONHASHSEED": "99"}
    there = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert there.returncode == 0, there.stderr
    assert here.trace_digest[:16] in there.stdout


def test_a_broken_promise_ends_the_program_with_one_its_trace_and_the_command_that_replays_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--seeds", "0..50", "--bug", "data-before-void"]) == 1
    said = capsys.readouterr().out
    command = next(line for line in said.splitlines() if line.startswith("replay: "))
    seed = command.split()[command.split().index("--seed") + 1]
    assert "NothingInUseDeleted" in said and "VIOLATION" in said
    assert main(["--seed", seed, "--bug", "data-before-void"]) == 1
    assert f"seed {seed}: NothingInUseDeleted" in capsys.readouterr().out


def test_the_seeds_reach_what_the_promises_are_about() -> None:
    """A simulation in which nothing happens holds every promise."""
    reached: Counter[str] = Counter()
    for seed in range(BATCH_SEEDS):
        stage = run_seed(seed)[1]
        facts = stage.facts
        reached.update(line[2] for line in stage.scheduler.trace)
        reached["collected"] += len(facts.voided & facts.committed.keys())
        reached["orphan voided"] += len(facts.voided - facts.committed.keys())
        reached["rolled back"] += len(facts.sources)
        reached["pinned"] += sum("pinned" in log for log in facts.fates.values())
    events = ("committed", "serves", "fenced", "collected", "orphan voided", "rolled back", "pinned")
    faults = ("killed", "stopped", "bit flipped", "engine restarts", "late put", "late delete", "list on")
    assert not [event for event in events + faults if reached[event] < 3], f"of {dict(reached)}"


def test_the_simulated_store_keeps_the_protocol() -> None:
    scheduler = Scheduler(Random(0), pace_s=0.1)
    store = SimStore(Bucket(scheduler, skew_s=0.0), "prober")
    passed: list[bool] = []
    scheduler.spawn("prober", lambda: passed.append(probe(store, "probes") is None))
    while scheduler.step():
        pass
    assert passed == [True]


def test_a_killed_actor_reaches_the_store_no_more() -> None:
    scheduler = Scheduler(Random(0), pace_s=0.1)
    bucket = Bucket(scheduler, skew_s=0.0)
    store = SimStore(bucket, "writer")

    def write() -> None:
        try:
            store.put("a", b"1")
        finally:
            store.put("b", b"2")

    writer = scheduler.spawn("writer", write)
    scheduler.step()  # up to before the first put's effect
    scheduler.kill(writer)
    assert bucket.objects == {} and not scheduler.step()


def _result(seed: int) -> Result:
    return run_seed(seed)[0]


def _broken(result: Result) -> str:
    return result.violation.invariant if result.violation else ""
