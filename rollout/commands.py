"""`lorasync rollout` (a node) and `lorasync replay` (serve versions again, offline). Light to import."""

import argparse
from pathlib import Path
from typing import Any


def add_rollout(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    from shared.arguments import add_config_arguments

    parser = subparsers.add_parser(
        "rollout",
        help="run a rollout node: vLLM, its agent, sampler and held-out evaluation",
        description="Starts vLLM's OpenAI server (or uses the one at --engine), keeps it on the latest proven version, "
        "samples trajectories and evaluates every version on held-out prompts. SIGTERM drains and stops.",
    )
    add_config_arguments(parser, required=True)
    parser.add_argument("--node", help="this node's name (rollout.node)")
    parser.add_argument("--engine", metavar="URL", help="use a running vLLM server (rollout.engine_url)")
    parser.add_argument("--port", type=int, help="port for vLLM's server (rollout.port)")
    parser.add_argument("--no-sample", action="store_true", help="serve and evaluate only")
    parser.set_defaults(run=_rollout)


def add_replay(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    from shared.arguments import add_config_arguments

    parser = subparsers.add_parser(
        "replay",
        help="serve versions again without a trainer and compare with what was recorded",
        description="Serves each version again on the same held-out prompts and seeds. Exits 1 if a recorded version "
        "does not come out the same: greedy completions token for token, reward at temperature 1 within its error.",
    )
    add_config_arguments(parser, required=True)
    parser.add_argument("--versions", default="all", metavar="RANGE", help="all, latest, 7, 0..12 (default: all)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write replay.parquet and replay.png there")
    parser.add_argument("--engine", metavar="URL", help="use a running vLLM server (rollout.engine_url)")
    parser.add_argument("--port", type=int, help="port for vLLM's server (rollout.port)")
    parser.set_defaults(run=_replay)


def _flags(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "rollout.node": getattr(options, "node", None),
        "rollout.engine_url": options.engine,
        "rollout.port": options.port,
    }


def _rollout(options: argparse.Namespace) -> int:
    from rollout.serve import serve
    from shared.arguments import read_config

    serve(read_config(options, _flags(options)), sample=not options.no_sample)
    return 0


def _replay(options: argparse.Namespace) -> int:
    from rollout.replay_report import replay_and_report
    from shared.arguments import read_config

    matches = replay_and_report(read_config(options, _flags(options)), options.versions, options.out)
    return 0 if matches else 1
