"""Trajectories: what a sampler puts on the store and a trainer takes, one Parquet row per completion.

A file holds whole groups (all completions of a prompt), so a group is never split between takers. Log-probabilities
are the behaviour policy's, in nats, one per generated token; the version that made every token stands beside it.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shared.errors import Corrupt
from shared.versions import Version

SCHEMA = pa.schema(
    [
        ("group", pa.string()),
        ("prompt_id", pa.string()),
        ("prompt_tokens", pa.list_(pa.int32())),
        ("tokens", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("token_epochs", pa.list_(pa.int32())),
        ("token_numbers", pa.list_(pa.int64())),
        ("reward", pa.float32()),
        ("finished", pa.bool_()),
        ("node", pa.string()),
    ]
)


@dataclass(frozen=True)
class Sample:
    """One completion.

    Attributes:
        tokens: generated ids, the end-of-sequence id included where it was generated.
        logprobs: of each generated token under the version that made it, in nats.
        token_versions: the version that made each token.
        finished: whether it ended by itself (not by the length limit).
    """

    group: str
    prompt_id: str
    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    token_versions: tuple[Version, ...]
    reward: float
    finished: bool
    node: str


def encode(samples: Sequence[Sample]) -> bytes:
    """Parquet bytes of samples, in order."""
    rows = [
        {
            "group": s.group,
            "prompt_id": s.prompt_id,
            "prompt_tokens": s.prompt_tokens,
            "tokens": s.tokens,
            "logprobs": s.logprobs,
            "token_epochs": [v.epoch for v in s.token_versions],
            "token_numbers": [v.number for v in s.token_versions],
            "reward": s.reward,
            "finished": s.finished,
            "node": s.node,
        }
        for s in samples
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), buffer, compression="zstd")
    return buffer.getvalue()


def decode(content: bytes, *, key: str) -> list[Sample]:
    """Samples of a Parquet file.

    Raises:
        Corrupt: not Parquet, another schema, or lists of unequal lengths in a row.
    """
    try:
        rows = pq.read_table(io.BytesIO(content), schema=SCHEMA).to_pylist()
        return [_sample(row) for row in rows]
    except (pa.ArrowException, TypeError, ValueError, OSError) as error:
        raise Corrupt(f"not a trajectory file: {error}", op="read trajectories", key=key) from error


def _sample(row: dict[str, Any]) -> Sample:
    tokens, logprobs = tuple(row["tokens"]), tuple(row["logprobs"])
    versions = tuple(Version(e, n) for e, n in zip(row["token_epochs"], row["token_numbers"], strict=True))
    if not len(tokens) == len(logprobs) == len(versions) or not tokens:
        raise ValueError(f"{len(tokens)} tokens, {len(logprobs)} log-probabilities, {len(versions)} versions")
    return Sample(
        group=str(row["group"]),
        prompt_id=str(row["prompt_id"]),
        prompt_tokens=tuple(row["prompt_tokens"]),
        tokens=tokens,
        logprobs=logprobs,
        token_versions=versions,
        reward=float(row["reward"]),
        finished=bool(row["finished"]),
        node=str(row["node"]),
    )
