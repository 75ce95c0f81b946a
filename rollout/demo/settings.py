"""What the demo runs: one configuration per run, from the files that come with the package."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.config import Config, LoraConfig, ModelConfig, RolloutConfig, StoreConfig, TaskConfig, TrainConfig, to_toml

ASSETS = Path(__file__).parent / "assets"

FINAL_REWARD_AT_LEAST = 0.90
BASE_REWARD_AT_MOST = 0.30
FROZEN_GAIN_AT_MOST = 0.10


@dataclass(frozen=True)
class DemoOptions:
    """What a person may choose.

    Attributes:
        out: folder for logs, cache, plot and summary.json.
        store_url: any fsspec URL; empty for a folder inside `out`.
        adapter: name of the adapter; the control's is this with `-frozen` behind it.
    """

    out: Path
    adapter: str
    store_url: str = ""
    store_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    steps: int = 40
    frozen_steps: int = 20
    seed: int = 0
    port: int = 8000


def main_config(options: DemoOptions) -> Config:
    """The run that learns."""
    url = options.store_url or f"file://{options.out.absolute() / 'store'}"
    return Config(
        store=StoreConfig(url=url, adapter=options.adapter, options=options.store_options, poll_interval_s=0.25),
        model=ModelConfig(path=str(ASSETS / "base_model")),
        task=TaskConfig(
            train_prompts=str(ASSETS / "train.jsonl"),
            heldout_prompts=str(ASSETS / "heldout.jsonl"),
            reward="rollout.tasks.chain_sum:reward",
            max_new_tokens=6,
        ),
        lora=LoraConfig(rank=8, alpha=16),
        train=TrainConfig(steps=options.steps, publish_every=2, max_staleness=1, seed=options.seed),
        rollout=RolloutConfig(
            cache_dir=str(options.out.absolute() / "cache"),
            port=options.port,
            seed=options.seed,
            max_lora_rank=8,
            max_model_len=128,
            hint_interval_s=2.0,
        ),
    )


def frozen_config(options: DemoOptions) -> Config:
    """The negative control: the same, but nothing is published after version 0, and shorter."""
    config = main_config(options)
    return dataclasses.replace(
        config,
        store=dataclasses.replace(config.store, adapter=f"{options.adapter}-frozen"),
        train=dataclasses.replace(config.train, steps=options.frozen_steps),
    )


def write_config(config: Config, path: Path) -> Path:
    """Write the TOML file, readable by its owner only: it may hold the store's credentials."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(to_toml(config))
    return path
