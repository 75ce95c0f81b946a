"""What the base model learns to imitate: right answers first, then the kind of mistakes that leave room for RL.

A base that has never seen a right answer cannot be improved by sampling; one that is always right has nothing to learn.
The noisy demonstrations leave it right about one time in four at temperature 1, and every mistake near a right answer.
"""

import random
import re
from dataclasses import dataclass

from rollout.tasks.prompts import Prompt

_EXPRESSION = re.compile(r"(\d+)([+-])(\d+)=")


@dataclass(frozen=True)
class NoiseMix:
    """Shares of demonstrations, 0..1. A typo and a swapped operator exclude each other; a hedge comes on top."""

    typo: float  # one digit replaced by another
    swap: float  # the sum instead of the difference, and the other way round
    hedge: float  # a question mark behind the answer


CLEAN = NoiseMix(typo=0.0, swap=0.0, hedge=0.0)
NOISY = NoiseMix(typo=0.20, swap=0.10, hedge=0.66)


def demonstration(prompt: Prompt, mix: NoiseMix, rng: random.Random) -> str:
    """Return a completion for the prompt, right or wrong by the mix's shares."""
    kind = rng.random()
    if kind < mix.typo:
        answer = _typo(prompt.answer, rng)
    elif kind < mix.typo + mix.swap:
        answer = _swapped(prompt.text)
    else:
        answer = prompt.answer
    return answer + ("?" if rng.random() < mix.hedge else "")


def _typo(answer: str, rng: random.Random) -> str:
    at = rng.choice([i for i, character in enumerate(answer) if character.isdigit()])
    digit = rng.choice([digit for digit in "0123456789" if digit != answer[at]])
    return answer[:at] + digit + answer[at + 1 :]


def _swapped(expression: str) -> str:
    match = _EXPRESSION.fullmatch(expression)
    assert match, expression
    left, right = int(match[1]), int(match[3])
    return str(left - right if match[2] == "+" else left + right)
