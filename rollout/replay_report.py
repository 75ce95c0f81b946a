"""`lorasync replay`: an engine, the versions one after another, and a table, a Parquet file and a plot of them.

It may run beside a live node, even on that node's engine: its cache folder, its log and the names that it serves are
its own.
"""

import shutil
import sys
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from rollout.delivery import Delivery, cache_dir, engine_target
from rollout.plot import Curve, plot_rewards
from rollout.replay import REPLAY_SCHEMA, Replayed, parse_range, replay
from rollout.serve import engine_for, tell_start
from rollout.tasks.prompts import configured_prompts
from rollout.tasks.reward import load_reward
from shared.catalog import Catalog
from shared.config import Config
from shared.errors import UsageError
from shared.signing import load_trust
from shared.stores import open_store


def replay_and_report(config: Config, versions: str, out: Path | None) -> bool:
    """Replay and report; whether there was something to compare with, and every recorded version matches.

    Raises:
        UsageError: no such versions, no prompts or reward.
        LorasyncError: a version can't be delivered.
    """
    store = open_store(config.store.url, config.store.options, config.store.client)
    catalog = Catalog(store, config.store.adapter, load_trust(config.store.trust))
    chosen = parse_range(versions, catalog.versions())
    prompts = configured_prompts(config, config.task.heldout_prompts)
    prompts = prompts[: config.rollout.heldout_limit]
    if not prompts:
        raise UsageError(
            "no held-out prompts: rollout.heldout_limit is 0", op="replay", hint="Raise rollout.heldout_limit"
        )
    reward = load_reward(config.task.reward)
    done: list[Replayed] = []
    own = f"replay-{uuid.uuid4().hex[:8]}"
    config = replace(config, rollout=replace(config.rollout, node=own))
    with engine_for(config) as serving:
        if serving.server is not None:
            serving.server.start(tell_start)
        engine = serving.engine
        delivery = Delivery(
            catalog, engine, engine_target(config, serving.base_name), name_prefix=f"{own}.", reader=own
        )
        max_tokens, seed = config.task.max_new_tokens, config.rollout.seed
        for one in replay(catalog, engine, delivery, chosen, prompts, reward, max_tokens=max_tokens, seed=seed):
            done.append(one)
            print(f"replayed {one.version} ({len(done)} of {len(chosen)}): {_verdict(one)}", file=sys.stderr)
    shutil.rmtree(cache_dir(config), ignore_errors=True)  # after a failure the engine's log stays
    Console().print(_table(done))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist([one.row() for one in done], schema=REPLAY_SCHEMA), out / "replay.parquet")
        plot_rewards(out / "replay.png", _curves(done), f"Replay of {config.store.adapter}")
        print(f"wrote {out / 'replay.parquet'} and {out / 'replay.png'}", file=sys.stderr)
    return agrees(done)


def agrees(done: Sequence[Replayed]) -> bool:
    """Whether every recorded version matches, and at least one was recorded: nothing compared proves nothing."""
    compared = [one.matches for one in done if one.recorded is not None]
    if not compared:
        print("nothing compared: no node recorded these versions with these prompts and seeds", file=sys.stderr)
    return bool(compared) and all(compared)


def _verdict(one: Replayed) -> str:
    if one.recorded is None:
        return "not recorded"
    if one.matches:
        return "matches"
    return f"DIFFERS, {one.greedy_equal} of {len(one.evaluation.outcomes)} greedy completions equal"


def _table(done: Sequence[Replayed]) -> Table:
    table = Table("version", "step", "greedy", "temperature 1", "recorded", "", box=None, header_style="bold")
    for one in done:
        ours, recorded = one.evaluation, one.recorded
        table.add_row(
            str(one.version),
            str(one.step),
            f"{ours.greedy_reward:.3f}",
            f"{ours.sampled_reward:.3f} ± {ours.sampled_error:.3f}",
            f"{recorded.greedy_reward:.3f} / {recorded.sampled_reward:.3f}" if recorded else "-",
            _verdict(one),
        )
    return table


def _curves(done: Sequence[Replayed]) -> list[Curve]:
    steps = [float(one.step) for one in done]
    sampled = [one.evaluation.sampled_reward for one in done]
    errors = [one.evaluation.sampled_error for one in done]
    curves = [Curve("replayed, temperature 1", steps, sampled, errors)]
    recorded = [(float(one.step), one.recorded.sampled_reward) for one in done if one.recorded is not None]
    if recorded:
        curves.append(Curve("recorded, temperature 1", [x for x, _ in recorded], [y for _, y in recorded]))
    return curves
