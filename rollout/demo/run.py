"""The demo's course: learn, control, replay, verify, report. Every part is a `lorasync` command of its own."""

import json
import shlex
import time
from pathlib import Path

from rich.console import Console

from rollout.demo.processes import Child
from rollout.demo.progress import RunReader, RunState
from rollout.demo.report import plot, shortfalls, summarise, unmatched
from rollout.demo.settings import DemoOptions, frozen_config, main_config, write_config
from rollout.demo.view import View, rewards_table
from shared.catalog import Catalog
from shared.config import Config
from shared.errors import KeyMissing, LorasyncError, NotConverged, StoreError, UsageError
from shared.layout import Layout
from shared.store import Store
from shared.stores import demand_shared, open_store, probe

POLL_S = 0.5  # of a child's log
LOOK_S = 1.0  # at the store: six requests a look, and an S3 server on loopback has the same two cores
RUN_TIMEOUT_S = 1800.0
# Expected seconds, measured on two cores; the live view corrects them by the run's own rate.
LEARN, CONTROL, REPLAY, VERIFY = "train and serve", "control: publishing frozen", "replay every version", "verify"
PHASES = ((LEARN, 95.0), (CONTROL, 60.0), (REPLAY, 80.0), (VERIFY, 3.0))


def run_demo(options: DemoOptions, console: Console) -> None:
    """Run it all, print the table, write plot and summary.json.

    Raises:
        UsageError: the store holds a run under this adapter, or is no store that processes share.
        NotConverged: it ran, and a claim does not hold.
        LorasyncError: a process ended with an error.
    """
    began = time.monotonic()
    config = main_config(options)
    demand_shared(config.store.url)
    store = open_store(config.store.url, config.store.options, config.store.client)
    for adapter in (config.store.adapter, frozen_config(options).store.adapter):
        demand_unused(store, adapter)
    probe(store, Layout(config.store.adapter).probes)
    out = options.out
    main_file = write_config(config, out / "main.toml")
    frozen_file = write_config(frozen_config(options), out / "frozen.toml")
    where = f"store {config.store.url}, adapter {config.store.adapter}; logs in {out / 'logs'}"
    console.print(where, highlight=False, soft_wrap=True)
    view = View(console, PHASES)
    with view.showing():
        view.phase(LEARN)
        main = _run(config, main_file, out / "logs" / "main", view)
        view.phase(CONTROL)
        frozen = _run(frozen_config(options), frozen_file, out / "logs" / "frozen", view, frozen=True)
        view.phase(REPLAY)
        replayed = out / "replay" / "replay.parquet"
        replayed.unlink(missing_ok=True)  # an earlier demo's
        replay_failure = _command(
            ["replay", "--config", str(main_file), "--versions", "all", "--out", str(replayed.parent)], view, out
        )
        if missed := unmatched(main.served, replayed):
            replay_failure = replay_failure or f"replay: no matching record of {', '.join(map(str, missed))}"
        view.phase(VERIFY)
        arguments = ["verify", "--config", str(main_file), "--all", "--base", config.model.path]
        verify_failure = _command(arguments, view, out)
    summary = summarise(
        main,
        frozen,
        verified=not verify_failure,
        replay_matches=not replay_failure,
        wall_s=time.monotonic() - began,
        store_url=config.store.url,
        adapter=config.store.adapter,
        seed=options.seed,
    )
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    plot(out / "rewards.png", main, frozen, config.train.publish_every)
    console.print(rewards_table(main.rewards))
    lines = (
        f"reward {summary['base_reward']:.3f} -> {summary['final_reward']:.3f}",
        f"frozen control stays at {summary['frozen_final_reward']:.3f}",
        f"{summary['versions_published']} versions published, {summary['versions_served']} served",
        f"publish to served p50 {summary['publish_to_served_s']['p50']:.2f} s, "
        f"p99 {summary['publish_to_served_s']['p99']:.2f} s",
        f"wall {summary['wall_s']:.0f} s",
    )
    written = f"wrote {out / 'summary.json'} and {out / 'rewards.png'}"
    console.print("\n".join((*lines, written, *_further(options, config, main_file))), highlight=False, soft_wrap=True)
    problems = [*shortfalls(summary), *filter(None, (replay_failure, verify_failure))]
    if problems:
        raise NotConverged("; ".join(problems), op="demo", hint=f"See {out / 'logs'}")


def demand_unused(store: Store, adapter: str) -> None:
    """Check that an adapter has no run yet: a second one would go on from it and report its rewards as its own.

    Raises:
        UsageError: it has.
        StoreError: the store failed.
    """
    try:
        store.get(Layout(adapter).layout)
    except KeyMissing:
        return
    hint = "Choose another --adapter, or leave it out for a name of its own"
    raise UsageError(f"the store already holds a run of adapter {adapter}", op="demo", key=store.url, hint=hint)


def _further(options: DemoOptions, config: Config, main_file: Path) -> list[str]:
    """Commands to look at what the demo left. Options of the store may be secrets: then by the file that has them."""
    store = f"--store {shlex.quote(config.store.url)} --adapter {config.store.adapter}"
    where = f"--config {shlex.quote(str(main_file))}" if options.store_options else store
    return [
        "look further:",
        f"  lorasync versions {where}",
        f"  lorasync export latest {where} --out {shlex.quote(str(options.out / 'adapter'))}",
        f"  lorasync replay {where} --versions 0..3",
    ]


def _run(config: Config, file: Path, logs: Path, view: View, *, frozen: bool = False) -> RunState:
    """A trainer and a rollout node, until training has ended and its last version is evaluated."""
    progress = RunReader(
        Catalog(open_store(config.store.url, config.store.options, config.store.client), config.store.adapter)
    )
    train = ["train", "--config", str(file), *(["--frozen"] if frozen else [])]
    deadline = time.monotonic() + RUN_TIMEOUT_S
    state = RunState()
    with (
        Child(["rollout", "--config", str(file)], logs / "rollout.log") as node,
        Child(train, logs / "train.log") as trainer,
    ):
        while not state.done:
            trainer.running()
            if not node.running():
                raise LorasyncError("the rollout node stopped before the run was done", hint=f"See {node.log}")
            if state.given_up:
                raise LorasyncError("the last version was quarantined", version=state.given_up, hint=f"See {node.log}")
            if time.monotonic() > deadline:
                raise LorasyncError(f"the run was not done after {RUN_TIMEOUT_S:.0f} s", hint=f"See {logs}")
            try:
                state = progress.read()
            except StoreError as error:
                if not error.retryable:
                    raise
            view.update(state)
            time.sleep(LOOK_S)
    return state


def _command(arguments: list[str], view: View, out: Path) -> str:
    """Run a command to its end, showing its last line; how it failed, or nothing."""
    log = out / "logs" / f"{arguments[0]}.log"
    with Child(arguments, log) as child:
        try:
            while child.running():
                lines = log.read_text(errors="replace").strip().splitlines()
                view.update(note=lines[-1] if lines else f"lorasync {arguments[0]}: starting")
                time.sleep(POLL_S)
        except LorasyncError as error:
            return error.message
    return ""
