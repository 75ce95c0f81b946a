"""Run seeds, and show the first one that breaks a promise. Exit codes: 0 every promise held, 1 one was broken."""

import argparse
import contextlib
import multiprocessing
import time
from collections.abc import Iterable, Iterator, Sequence

from .bugs import BUGS
from .stage import Stage
from .world import Result, run_seed

SAY_EVERY_S = 10.0
SEEDS_A_TASK = 10


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    arguments = _parser().parse_args(argv)
    if arguments.seed is not None:
        result, stage = _run(arguments.seed, arguments.bug)
        if arguments.trace or result.violation:
            _show(stage)
        print(f"seed {result.seed}: {_outcome(result)}")
        return 1 if result.violation else 0
    return _run_all(arguments.seeds, arguments.bug, arguments.jobs)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--seeds", type=_seeds, default=range(500), metavar="A..B", help="B excluded; 0..500 by default")
    which.add_argument("--seed", type=int, help="one seed")
    parser.add_argument("--trace", action="store_true", help="show every step of --seed")
    parser.add_argument("--bug", choices=sorted(BUGS), help="plant a deliberate bug")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    return parser


def _seeds(text: str) -> range:
    first, _, end = text.partition("..")
    return range(int(first), int(end))


def _run(seed: int, bug: str | None) -> tuple[Result, Stage]:
    with BUGS[bug].planted() if bug else contextlib.nullcontext():
        return run_seed(seed)


def _result(task: tuple[int, str | None]) -> Result:
    return _run(*task)[0]


def _run_all(seeds: range, bug: str | None, jobs: int) -> int:
    began, said_at, done, steps, simulated_s = time.monotonic(), time.monotonic(), 0, 0, 0.0
    with _results([(seed, bug) for seed in seeds], jobs) as results:
        for result in results:
            done, steps, simulated_s = done + 1, steps + result.steps, simulated_s + result.simulated_s
            if result.violation:
                _show(_run(result.seed, bug)[1])
                print(f"seed {result.seed}: {_outcome(result)}")
                print(
                    f"replay: python -m tests.simulation --seed {result.seed} --trace{f' --bug {bug}' if bug else ''}"
                )
                return 1
            if time.monotonic() - said_at > SAY_EVERY_S or done == len(seeds):
                said_at = time.monotonic()
                rate = f"{done / (said_at - began):.1f} seeds/s, {steps / (said_at - began):,.0f} steps/s"
                print(f"{done}/{len(seeds)} seeds hold: {rate}, {simulated_s / 3600:,.0f} h simulated", flush=True)
    return 0


@contextlib.contextmanager
def _results(tasks: list[tuple[int, str | None]], jobs: int) -> Iterator[Iterable[Result]]:
    """Results of all seeds, as they come."""
    if jobs == 1:
        yield map(_result, tasks)
        return
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield pool.imap_unordered(_result, tasks, chunksize=SEEDS_A_TASK)


def _show(stage: Stage) -> None:
    for at, actor, what, about, outcome in stage.scheduler.trace:
        print(f"{at:9.2f} s  {actor:<16} {what:<16} {about}  {outcome}".rstrip())


def _outcome(result: Result) -> str:
    outcome = f"{result.violation.invariant}: {result.violation.problem}" if result.violation else "every promise held"
    return f"{outcome} ({result.steps} steps, {result.simulated_s:.0f} s simulated, trace {result.trace_digest[:16]})"


if __name__ == "__main__":
    raise SystemExit(main())
