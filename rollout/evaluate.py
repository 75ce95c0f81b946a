"""Held-out reward of one version, as the engine serves it: greedily, and sampled at temperature 1 with fixed seeds.

The same prompts, seeds and engine give the same greedy tokens and sampled ones that differ at most by rounding, so a
recorded evaluation can be replayed and compared. One Parquet row per prompt.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rollout.engine import Completion, Engine
from rollout.tasks.prompts import Prompt
from rollout.tasks.reward import Reward
from shared.errors import Corrupt, UsageError
from shared.parquet_bounds import Limits, demand_bounded

MAX_FILE_BYTES = 64 << 20
LIMITS = Limits(footer_bytes=256 << 10, rows=1 << 16, pages=1 << 14, values=1 << 22, column_bytes=MAX_FILE_BYTES)

SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("greedy_tokens", pa.list_(pa.int32())),
        ("greedy_text", pa.string()),
        ("greedy_reward", pa.float32()),
        ("sampled_tokens", pa.list_(pa.int32())),
        ("sampled_text", pa.string()),
        ("sampled_reward", pa.float32()),
        ("seed", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Outcome:
    """One held-out prompt's two completions and their rewards."""

    prompt_id: str
    greedy_tokens: tuple[int, ...]
    greedy_text: str
    greedy_reward: float
    sampled_tokens: tuple[int, ...]
    sampled_text: str
    sampled_reward: float
    seed: int


@dataclass(frozen=True)
class Evaluation:
    """All outcomes of one version."""

    outcomes: tuple[Outcome, ...]

    @property
    def greedy_reward(self) -> float:
        """Mean over prompts."""
        return sum(o.greedy_reward for o in self.outcomes) / len(self.outcomes)

    @property
    def sampled_reward(self) -> float:
        """Mean over prompts."""
        return sum(o.sampled_reward for o in self.outcomes) / len(self.outcomes)

    @property
    def sampled_error(self) -> float:
        """Standard error of `sampled_reward`."""
        mean, count = self.sampled_reward, len(self.outcomes)
        variance = sum((o.sampled_reward - mean) ** 2 for o in self.outcomes) / max(1, count - 1)
        return math.sqrt(variance / count)

    def to_parquet(self) -> bytes:
        """Parquet bytes."""
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist([vars(o) for o in self.outcomes], schema=SCHEMA), buffer)
        return buffer.getvalue()

    @classmethod
    def from_parquet(cls, content: bytes, *, key: str) -> "Evaluation":
        """The inverse of `to_parquet`.

        Raises:
            Corrupt: not such a file.
        """
        try:
            demand_bounded(content, SCHEMA.names, LIMITS)
            texts = [field.name for field in SCHEMA if field.type == pa.string()]
            table = pq.ParquetFile(pa.BufferReader(content), read_dictionary=texts).read(columns=SCHEMA.names)
            for name in texts:
                _demand_short(table.column(name))
            table = table.select(SCHEMA.names).cast(SCHEMA)
            if any(column.null_count for column in table.columns):
                raise ValueError("a null")
            lists = ("greedy_tokens", "sampled_tokens")
            rows = table.to_pylist()
            outcomes = tuple(Outcome(**{**row, **{name: tuple(row[name]) for name in lists}}) for row in rows)
        except (pa.ArrowException, LookupError, OSError, TypeError, ValueError) as error:
            raise Corrupt(f"not an evaluation file: {error}", op="read evaluation", key=key) from error
        if not outcomes:
            raise Corrupt("an evaluation without outcomes", op="read evaluation", key=key)
        return cls(outcomes)


def _demand_short(column: pa.ChunkedArray) -> None:
    """Check texts that are still dictionaries, in which a long one may stand for every row.

    Raises:
        ValueError: MAX_FILE_BYTES would not hold them, written out.
    """
    written_out = 0
    for chunk in column.chunks:
        lengths = pc.take(pc.binary_length(chunk.dictionary), chunk.indices)
        written_out += pc.sum(lengths).as_py() or 0
    if written_out > MAX_FILE_BYTES:
        raise ValueError(f"{written_out} bytes of text in one column")


def evaluate(
    engine: Engine, name: str, prompts: Sequence[Prompt], reward: Reward, *, max_tokens: int, seed: int
) -> Evaluation:
    """Ask the engine for both completions of every prompt.

    Args:
        name: the served name of the version.
        seed: prompt i samples with seed + i, independently of the others.

    Raises:
        UsageError: no prompts; a reward without outcomes says nothing.
        EngineError: the engine failed.
    """
    if not prompts:
        raise UsageError("no held-out prompts to evaluate", op="evaluate", hint="Raise rollout.heldout_limit")
    token_ids = [list(prompt.token_ids) for prompt in prompts]
    seeds = [seed + number for number in range(len(prompts))]
    greedy = engine.complete(name, token_ids, n=1, max_tokens=max_tokens, temperature=0.0)
    sampled = engine.complete_seeded(name, token_ids, seeds, max_tokens=max_tokens, temperature=1.0)
    return Evaluation(
        tuple(
            _outcome(prompt, reward, one[0], other, number)
            for prompt, one, other, number in zip(prompts, greedy, sampled, seeds, strict=True)
        )
    )


def _outcome(prompt: Prompt, reward: Reward, greedy: Completion, sampled: Completion, seed: int) -> Outcome:
    return Outcome(
        prompt_id=prompt.id,
        greedy_tokens=tuple(greedy.token_ids),
        greedy_text=greedy.text,
        greedy_reward=reward(prompt, greedy.text, greedy.finish_reason == "stop"),
        sampled_tokens=tuple(sampled.token_ids),
        sampled_text=sampled.text,
        sampled_reward=reward(prompt, sampled.text, sampled.finish_reason == "stop"),
        seed=seed,
    )
