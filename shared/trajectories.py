"""Trajectories: what a sampler puts on the store and a trainer takes, one Parquet row per completion.

A file holds whole groups (all completions of a prompt), so a group is never split between takers. Log-probabilities
are the behaviour policy's, in nats, one per generated token; the version that made every token stands beside it.

`decode` trusts nothing: names, types and sizes are checked before a column is read (1 kB of Parquet may hold 50 million
equal tokens, and its footer may say that it holds ten), nulls and lengths before a row becomes a `Sample`. Columns that
it does not know are ignored. Memory: at most 1.5 GiB, where every column is filled to its limit.
Does not: judge values; which groups are fit to train on is the taker's rule.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shared.errors import Corrupt, UsageError
from shared.parquet_bounds import Limits, demand_bounded
from shared.versions import Version

MAX_FILE_BYTES = 256 << 20  # and of one column, decompressed
MAX_FOOTER_BYTES = 256 << 10  # unfolds to 200 times as much
MAX_ROWS = 1 << 16
MAX_VALUES = 1 << 22  # of one column, over all rows: 64 completions of 65,536 tokens
MAX_PAGES = 1 << 14
MAX_TEXT_BYTES = 1 << 10  # of one name
ROWS_AT_ONCE = 8

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
    """Parquet bytes of samples, in order.

    Raises:
        UsageError: more tokens or rows than `decode` takes.
    """
    tokens = max(sum(len(s.tokens) for s in samples), sum(len(s.prompt_tokens) for s in samples))
    if tokens > MAX_VALUES or len(samples) > MAX_ROWS:
        problem = f"{len(samples)} completions of {tokens} tokens, more than {MAX_ROWS} of {MAX_VALUES}"
        hint = "Lower rollout.groups_per_request or train.group_size"
        raise UsageError(problem, op="write trajectories", hint=hint)
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
    """Samples of a Parquet file, in order.

    Raises:
        Corrupt: not Parquet; a column missing, twice there or of another type; a null; more rows, values or text than
            the limits; no tokens, or lists of unequal lengths in a row.
    """
    try:
        _demand_readable(content)
        # Texts stay dictionaries: a long one that is repeated in every row is refused before it is repeated.
        texts = [field.name for field in SCHEMA if field.type == pa.string()]
        table = pq.ParquetFile(pa.BufferReader(content), read_dictionary=texts).read(columns=SCHEMA.names)
        _demand_whole(table)
        versions: dict[Version, Version] = {}
        batches = table.select(SCHEMA.names).to_batches(max_chunksize=ROWS_AT_ONCE)
        return [_sample(row, versions) for batch in batches for row in batch.to_pylist()]
    except (pa.ArrowException, LookupError, TypeError, ValueError, OSError) as error:
        raise Corrupt(f"not a trajectory file: {error}", op="read trajectories", key=key) from error


def _demand_readable(content: bytes) -> None:
    """Check that a file holds our columns and no more than the limits, before anything of it is decompressed.

    Raises:
        ValueError: says which column.
    """
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"{len(content)} bytes, more than the {MAX_FILE_BYTES} allowed")
    limits = Limits(MAX_FOOTER_BYTES, MAX_ROWS, MAX_PAGES, MAX_VALUES, MAX_FILE_BYTES)
    demand_bounded(content, SCHEMA.names, limits)
    schema = pq.read_schema(pa.BufferReader(content))
    for field in SCHEMA:
        found = [other.type for other in schema if other.name == field.name]
        if found != [field.type]:
            said = ", ".join(map(str, found)) or "missing"
            raise ValueError(f"column {field.name} must be {field.type}, is {said}")


def _demand_whole(table: pa.Table) -> None:
    """Check what the footer cannot tell: no nulls, no long names, lists of equal lengths.

    Raises:
        ValueError: says which column.
    """
    for field in SCHEMA:
        column = table.column(field.name)
        is_list = pa.types.is_list(field.type)
        if column.null_count or (is_list and pc.list_flatten(column).null_count):
            raise ValueError(f"a null in column {field.name}")
        if field.type == pa.string():
            for chunk in column.chunks:
                longest = pc.max(pc.binary_length(chunk.dictionary)).as_py() or 0
                if longest > MAX_TEXT_BYTES:
                    raise ValueError(f"{longest} bytes of text in column {field.name}")
    lengths = pc.list_value_length(table.column("tokens"))
    if pc.any(pc.equal(lengths, 0)).as_py():
        raise ValueError("a row without tokens")
    for name in ("logprobs", "token_epochs", "token_numbers"):
        if not pc.list_value_length(table.column(name)).equals(lengths):
            raise ValueError(f"lists of tokens and {name} of unequal lengths")


def _sample(row: dict[str, Any], versions: dict[Version, Version]) -> Sample:
    """A row as a `Sample`. Equal versions become one object: most tokens of a file share a few."""
    made_by = map(Version, row["token_epochs"], row["token_numbers"])
    return Sample(
        group=row["group"],
        prompt_id=row["prompt_id"],
        prompt_tokens=tuple(row["prompt_tokens"]),
        tokens=tuple(row["tokens"]),
        logprobs=tuple(row["logprobs"]),
        token_versions=tuple(versions.setdefault(version, version) for version in made_by),
        reward=row["reward"],
        finished=row["finished"],
        node=row["node"],
    )
