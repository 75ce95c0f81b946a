"""Makes the demo's base model and prompt files from nothing but a seed.

    python examples/chain_sum/pretrain.py --out DIR

takes about twelve minutes on two busy cores. DIR gets base_model/ (Hugging Face format, bf16), train.jsonl and
heldout.jsonl; the ones in rollout/demo/assets were made this way. Promises: held-out expressions are in no
demonstration; the rewards printed at the end are of the rounded weights that were written; seeds and deterministic
algorithms throughout, so that a second run on the same machine and threads should give the same bytes (seen for the
first steps, never for a whole run). Does not: give them on another CPU, torch or number of threads.
"""

import argparse
import itertools
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from demonstrations import CLEAN, NOISY, NoiseMix, demonstration
from export import rounded, write_model
from model import RouterTrace, Weights, forward, generate, initial_weights, left_padded
from tokenizer import BOS, EOS, PAD, decode, encode
from torch import Tensor
from torch.nn import functional

from rollout.tasks.chain_sum import MAX_NEW_TOKENS, MAX_PROMPT_TOKENS, make_prompts, reward
from rollout.tasks.prompts import Prompt, write_prompts

DEMONSTRATED_PROMPTS, TRAIN_PROMPTS, HELDOUT_PROMPTS = 12_000, 4_000, 512
IGNORED = -100  # cross_entropy's mark for positions that count nothing


@dataclass(frozen=True)
class Recipe:
    """Pre-training: clean steps, then noisy ones, under one cosine from `lr` down to a twentieth of it."""

    clean_steps: int = 1000
    noisy_steps: int = 250
    batch: int = 512
    lr: float = 3e-3
    warmup_steps: int = 50
    balance: float = 0.01
    seed: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)  # else threads race in adding up the embedding's gradient
    demonstrated, heldout = make_prompts(DEMONSTRATED_PROMPTS, HELDOUT_PROMPTS)
    weights = rounded(pretrain(Recipe(seed=arguments.seed), demonstrated, heldout))
    write_model(weights, arguments.out / "base_model")
    write_prompts(arguments.out / "train.jsonl", demonstrated[:TRAIN_PROMPTS])
    write_prompts(arguments.out / "heldout.jsonl", heldout)
    greedy, sampled = heldout_reward(weights, heldout, 0.0), heldout_reward(weights, heldout, 1.0, repeats=8)
    print(f"written to {arguments.out}: held-out reward greedy {greedy:.3f}, temperature 1 {sampled:.3f}")


def pretrain(recipe: Recipe, demonstrated: Sequence[Prompt], heldout: Sequence[Prompt]) -> Weights:
    """Return fp32 weights; prints a line every 50 steps."""
    weights = {name: w.requires_grad_() for name, w in initial_weights(recipe.seed).items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.01)
    rng = random.Random(recipe.seed)
    steps, started = recipe.clean_steps + recipe.noisy_steps, time.monotonic()
    for step in range(steps):
        mix = CLEAN if step < recipe.clean_steps else NOISY
        optimizer.param_groups[0]["lr"] = _learning_rate(recipe, step, steps)
        ids_NL, n_pad_N, labels_NL = _batch(rng.sample(demonstrated, recipe.batch), mix, rng)
        trace = RouterTrace()
        logits_NLV = forward(weights, ids_NL, n_pad_N, trace=trace)[:, MAX_PROMPT_TOKENS - 1 :]
        entropy = functional.cross_entropy(logits_NLV.flatten(0, 1), labels_NL.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        (entropy + recipe.balance * trace.balance_loss()).backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            sampled = heldout_reward(rounded(weights), heldout, 1.0)
            print(
                f"step {step + 1}/{steps} {'clean' if mix is CLEAN else 'noisy'}: cross-entropy {entropy.item():.4f}, "
                f"held-out reward at temperature 1 {sampled:.3f}, {time.monotonic() - started:.0f} s",
                flush=True,
            )
    return weights


def heldout_reward(
    weights: Weights, prompts: Sequence[Prompt], temperature: float, repeats: int = 1, seed: int = 0
) -> float:
    """Return the mean reward of `repeats` completions per prompt (temperature 0: greedy)."""
    generator = torch.Generator().manual_seed(seed)
    asked = list(itertools.chain.from_iterable([prompts] * repeats))
    token_ids = [[BOS, *encode(prompt.text)] for prompt in asked]
    completions = generate(weights, token_ids, MAX_NEW_TOKENS, temperature, EOS, generator)
    rewards = [reward(p, decode(ids), ids[-1] == EOS) for p, ids in zip(asked, completions, strict=True)]
    return sum(rewards) / len(rewards)


def _learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / recipe.warmup_steps)
    return recipe.lr * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _batch(prompts: Sequence[Prompt], mix: NoiseMix, rng: random.Random) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids_NL = prompt and completion, n_pad_N, and the labels of the completion's positions."""
    ids_NL, n_pad_N = left_padded([[BOS, *encode(p.text)] for p in prompts], MAX_PROMPT_TOKENS, PAD)
    inputs_NL = torch.full((len(prompts), MAX_NEW_TOKENS), PAD)
    labels_NL = torch.full((len(prompts), MAX_NEW_TOKENS), IGNORED)
    for row, prompt in enumerate(prompts):
        completion = torch.tensor([*encode(demonstration(prompt, mix, rng)), EOS])
        inputs_NL[row, : len(completion)] = completion
        labels_NL[row, : len(completion)] = completion
    return torch.cat([ids_NL, inputs_NL[:, :-1]], 1), n_pad_N, labels_NL


if __name__ == "__main__":
    main()
