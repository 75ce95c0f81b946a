"""`lorasync demo`: the main job on one machine."""

import argparse
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

SIGNALLED = 128  # and the signal's number: the exit code that shells know


def add_demo(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    from shared.arguments import add_store_arguments

    parser = subparsers.add_parser(
        "demo",
        help="train, publish, serve, score, learn and replay on this machine",
        description="Trains a small Qwen3-MoE with LoRA and GRPO in Megatron-Core, serves every version from vLLM, "
        "runs a frozen control, replays all versions, and exits 0 only if every claim in summary.json holds.",
    )
    add_store_arguments(parser, required=False)
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for logs, plot, summary.json")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of the run that learns")
    parser.add_argument("--frozen-steps", type=int, default=20, help="optimizer steps of the control")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=8000, help="port of vLLM's server")
    parser.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> int:
    from rich.console import Console

    from rollout.demo.processes import end_in_order
    from rollout.demo.run import run_demo
    from rollout.demo.settings import DemoOptions
    from shared.arguments import store_options

    demo = DemoOptions(
        out=options.out,
        adapter=options.adapter or time.strftime("demo-%Y%m%d-%H%M%S"),
        store_url=options.store or "",
        store_options=store_options(options),
        steps=options.steps,
        frozen_steps=options.frozen_steps,
        seed=options.seed,
        port=options.port,
    )
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)  # by an exception, so that the children are stopped on the way out
    end_in_order()
    run_demo(demo, Console())
    return 0


def _leave(number: int, _: FrameType | None) -> NoReturn:
    sys.exit(SIGNALLED + number)
