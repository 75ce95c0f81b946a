"""`lorasync rollout` (a node) and `lorasync replay` (serve versions again, offline). Light to import."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shared.catalog import Catalog
    from shared.config import Config


def add_rollout(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    from shared.arguments import add_config_arguments, add_trust_argument

    parser = subparsers.add_parser(
        "rollout",
        help="run a rollout node: vLLM, its agent, sampler and held-out evaluation",
        description="Starts vLLM's OpenAI server (or uses the one at --engine), keeps it on the latest proven version, "
        "samples trajectories and evaluates every version on held-out prompts. SIGTERM drains and stops.",
    )
    add_config_arguments(parser, required=True)
    add_trust_argument(parser)
    parser.add_argument("--node", help="this node's own name (rollout.node; default: the host's)")
    parser.add_argument("--engine", metavar="URL", help="use a running vLLM server (rollout.engine_url)")
    parser.add_argument("--port", type=int, help="port for vLLM's server (rollout.port)")
    parser.add_argument("--no-sample", action="store_true", help="serve and evaluate only")
    parser.set_defaults(run=_rollout)


def add_replay(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    from shared.arguments import add_config_arguments, add_trust_argument

    parser = subparsers.add_parser(
        "replay",
        help="serve versions again without a trainer and compare with what was recorded",
        description="Serves each version again on the same held-out prompts and seeds. Exits 1 if a recorded version "
        "does not come out the same (greedy completions token for token, reward at temperature 1 within its error), or "
        "if there was nothing to compare with. The store alone will do: it says what the run was made of.",
    )
    add_config_arguments(parser)
    add_trust_argument(parser)
    parser.add_argument("--model", metavar="DIR", help="where the base model is on this machine (model.path)")
    parser.add_argument("--heldout-prompts", metavar="URL", help="the held-out prompts (task.heldout_prompts)")
    parser.add_argument("--reward", metavar="MODULE:FUNCTION", help="the reward function (task.reward)")
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

    return 0 if replay_and_report(_replay_config(options), options.versions, options.out) else 1


def _replay_config(options: argparse.Namespace) -> "Config":
    """What the flags and the file say, and beneath them what the run's own nodes left on the store.

    Raises:
        UsageError: no such adapter; or neither the store nor the caller says what the run was made of.
    """
    from shared.arguments import read_config, read_store_config
    from shared.catalog import Catalog, check_layout
    from shared.errors import UsageError
    from shared.run_record import recorded_run
    from shared.stores import open_store

    store = read_store_config(options)
    catalog = Catalog(open_store(store.url, store.options, store.client), store.adapter)
    check_layout(catalog.store, catalog.layout)
    if not catalog.versions():
        problem = f"no version of adapter {store.adapter}"
        raise UsageError(problem, op="replay", key=store.url, hint=_adapters(catalog))
    recorded = recorded_run(catalog)
    if not recorded and not options.config:
        problem = "the store does not say what the run was made of"
        raise UsageError(problem, op="replay", key=catalog.layout.run, hint="Give --config FILE")
    flags = {
        "model.path": options.model,
        "task.heldout_prompts": options.heldout_prompts,
        "task.reward": options.reward,
    }
    config = read_config(options, {**_flags(options), **flags}, beneath=recorded)
    made_of = f"model {config.model.path}, prompts {config.task.heldout_prompts}, reward {config.task.reward}"
    print(f"replaying {store.adapter} with {made_of}", file=sys.stderr)
    return config


def _adapters(catalog: "Catalog") -> str:
    """The adapters that a store holds, for who named none of them. One listing of it all."""
    keys = (entry.key.split("/") for entry in catalog.store.list(""))
    found = sorted({parts[0] for parts in keys if parts[1:2] == ["manifests"]})
    return f"--adapter is one of: {', '.join(found)}" if found else "That store holds no versions at all"
