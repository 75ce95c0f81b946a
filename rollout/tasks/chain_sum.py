"""The demo's task: sums and differences of two two-digit numbers, from reasoning-gym's `chain_sum`.

A prompt is the bare expression with an equals sign, `42-25=`; there are 16,200 of them. Train and held-out prompts
never share an expression.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import reasoning_gym

from rollout.tasks.prompts import Prompt

TASK = {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2, "allow_negation": False}
N_EXPRESSIONS = 2 * 90 * 90
HELDOUT_SEED_OFFSET = 10_000_000  # chain_sum draws entry i from random.Random(seed + i): far apart, no stream in common
MAX_PROMPT_TOKENS = 7  # begin-of-sequence, 42-25=
MAX_NEW_TOKENS = 6  # -12 or 123 and end-of-sequence, with room for a mistake

_PLAIN_INTEGER = re.compile(r"-?\d+", re.ASCII)


def make_prompts(n_train: int, n_heldout: int, seed: int = 0) -> tuple[list[Prompt], list[Prompt]]:
    """Draw distinct expressions; a longer train set begins with the shorter one.

    Returns:
        train and held-out prompts, as text without token ids, with no expression in both.

    Raises:
        ValueError: more prompts asked for than there are expressions.
    """
    if n_train + n_heldout > N_EXPRESSIONS:
        raise ValueError(f"{n_train} + {n_heldout} prompts asked for, {N_EXPRESSIONS} exist")
    heldout = _draw("heldout", n_heldout, HELDOUT_SEED_OFFSET + seed, frozenset())
    train = _draw("train", n_train, seed, frozenset(prompt.text for prompt in heldout))
    return train, heldout


def reward(prompt: Prompt, completion: str, finished: bool) -> float:
    """Give 1 for a finished completion that is a plain integer with reasoning-gym's own full score, else 0.

    The raw scorer alone is lenient: it gives "17?" two thirds, and unfinished answers pass.
    """
    if not finished or not _PLAIN_INTEGER.fullmatch(completion):
        return 0.0
    return 1.0 if _scorer()(completion, {"answer": prompt.answer}) >= 1.0 else 0.0


def _draw(name: str, n: int, seed: int, excluded: frozenset[str]) -> list[Prompt]:
    dataset = reasoning_gym.create_dataset("chain_sum", size=1_000_000, seed=seed, **TASK)  # lazy: size costs nothing
    texts: dict[str, str] = {}
    index = 0
    while len(texts) < n:
        entry = dataset[index]
        index += 1
        text = entry["metadata"]["expression"].replace(" ", "") + "="
        if text not in excluded:
            texts.setdefault(text, entry["answer"])
    return [Prompt(id=f"{name}-{i:05d}", text=text, answer=answer) for i, (text, answer) in enumerate(texts.items())]


@functools.cache
def _scorer() -> Callable[[str, dict[str, Any]], float]:
    scorer: Callable[[str, dict[str, Any]], float] = reasoning_gym.get_score_answer_fn("chain_sum")
    return scorer
