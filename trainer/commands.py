"""`lorasync train`: the trainer's arguments. Light at import: torch and Megatron come with the run."""

import argparse
import json
import warnings
from typing import Any

from shared.arguments import add_config_arguments, add_sign_argument, read_config
from shared.stores import demand_shared


def add_train(subparsers: Any) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "train",
        help="train the adapter and publish every version of it",
        description="Train the adapter, publish a version every [train] publish_every steps, and resume from the "
        "newest checkpoint where there is one. This release trains on one rank.",
    )
    add_config_arguments(parser)
    add_sign_argument(parser)
    parser.add_argument("--steps", type=int, metavar="N", help="instead of [train] steps")
    parser.add_argument("--frozen", action="store_true", help="negative control: publish nothing after version 0")
    parser.add_argument("--json", action="store_true", help="print the final progress as JSON")
    parser.set_defaults(run=run_train)


def run_train(options: argparse.Namespace) -> int:
    """Train; the exit code."""
    config = read_config(options, {"train.steps": options.steps})
    demand_shared(config.store.url)
    # Megatron warns of every accelerated package that a CPU host rightly lacks.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\..*")
    from trainer.loop import train
    from trainer.model import stop_process_group

    try:
        outcome = train(config, frozen=options.frozen)
    finally:
        stop_process_group()
    if options.json:
        print(json.dumps(outcome))
    else:
        print(
            f"trained {outcome['step']} steps, last version {outcome['epoch']:04d}-{outcome['number']:06d}, "
            f"mean reward {outcome['mean_reward'] or 0.0:.3f}, base model unchanged: {outcome['base_model_unchanged']}"
        )
    return 0
