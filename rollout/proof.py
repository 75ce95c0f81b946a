"""Proof of delivery: does the engine really serve this version?

HTTP 200 to a load proves nothing: vLLM has answered it for adapters whose names match no module, and serves the base
model. So the trainer's canary sequences are scored by the engine, teacher-forced, and three things must hold:

    1. under the new name, every token's log-probability agrees with the trainer's own, in the manifest, within its
       tolerance: the right tensors sit in the right places, scaled once;
    2. under the new name they differ from the base model's, where the trainer's do by more than the tolerance (an early
       version may change less than two engines differ by; without a canary, where lora_B is not all zero);
    3. under the base's name they are what they were before any adapter was loaded: nothing leaks.

The tolerance is the trainer's, for its dtype, and stands in the manifest beside the canary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rollout.engine import Engine
from shared.adapter_files import read_tensors
from shared.errors import NotProven
from shared.fetch import WEIGHTS
from shared.manifest import Canary, Manifest

DEFAULT_TOLERANCE = 1e-3  # nats, where a manifest carries no canary
DEFAULT_SEQUENCE = tuple(range(3, 19))  # scored where a manifest carries no canary

Rows = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Proof:
    """What the engine showed, in nats: largest gaps per token to the trainer, to the base, of the base to itself."""

    trainer_gap: float | None
    effect: float
    base_drift: float


def prove(engine: Engine, name: str, base_name: str, manifest: Manifest, directory: Path, before: Rows) -> Proof:
    """Prove a loaded version.

    Args:
        name: under which the engine serves it.
        base_name: under which the engine serves the base model.
        directory: the version's PEFT directory, to learn whether its effect is exactly zero.
        before: `base_scores` of the same manifest's sequences, taken before this version was loaded.

    Raises:
        NotProven: says which of the three failed, and by how much.
        EngineError: the engine failed to answer.
    """
    sequences = canary_sequences(manifest.canary)
    served = engine.score(name, sequences)
    base = engine.score(base_name, sequences)
    canary = manifest.canary
    tolerance = canary.tolerance if canary else DEFAULT_TOLERANCE
    proof = Proof(
        trainer_gap=gap(served, canary.logprobs) if canary else None,
        effect=gap(served, base),
        base_drift=gap(base, before),
    )
    if canary:
        trainers_effect = gap(canary.logprobs, base)
        missing = trainers_effect > tolerance and proof.effect < trainers_effect / 10
    else:
        missing = proof.effect == 0.0 and not _is_zero(directory / WEIGHTS)
    if proof.base_drift > tolerance / 2:
        problem = f"the base model's answers moved by {proof.base_drift:.2e} nats when it was loaded"
    elif missing:
        problem = "the adapter changes nothing: the engine answers as the base model does"
    elif proof.trainer_gap is not None and not proof.trainer_gap <= tolerance:
        problem = f"canary is {proof.trainer_gap:.2e} nats off the trainer's, {tolerance:.0e} allowed"
    else:
        return proof
    raise NotProven(problem, op="prove", key=name, version=str(manifest.version))


def canary_sequences(canary: Canary | None) -> list[list[int]]:
    """The token sequences to score."""
    return [list(sequence) for sequence in canary.sequences] if canary else [list(DEFAULT_SEQUENCE)]


def gap(a: Rows, b: Rows) -> float:
    """The largest absolute difference; NaN anywhere makes it infinite, as does a different shape."""
    if [len(row) for row in a] != [len(row) for row in b]:
        return float("inf")
    differences = np.abs(np.concatenate([np.subtract(x, y, dtype=np.float64) for x, y in zip(a, b, strict=True)]))
    largest = float(differences.max(initial=0.0))
    return largest if np.isfinite(largest) else float("inf")


def _is_zero(path: Path) -> bool:
    """Whether every lora_B is zero (-0.0 included), so that the adapter has no effect."""
    for spec, content in read_tensors(path.read_bytes(), key=str(path)):
        if ".lora_B." in spec.name:
            words = np.frombuffer(content, dtype="<u4" if spec.dtype == "F32" else "<u2").astype(np.int64)
            if bool((words & (0x7FFFFFFF if spec.dtype == "F32" else 0x7FFF)).any()):
                return False
    return True
