"""Trajectories: what a sampler puts on the store and a trainer takes, one Parquet row per completion.

A file holds whole groups (all completions of a prompt), so a group is never split between takers. Log-probabilities
are the behaviour policy's, in nats, one per generated token; the version that made every token stands beside it.

`decode` trusts nothing: names, types and sizes are checked in the footer before a column is read (1 kB of Parquet may
hold 50 million equal tokens), nulls and lengths before a row becomes a `Sample`. Columns that it does not know are
ignored. Does not: judge values; which groups are fit to train on is the taker's rule.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shared.errors import Corrupt
from shared.versions import Version

MAX_FILE_BYTES = 256 << 20
MAX_ROWS = 1 << 16
MAX_VALUES = 1 << 24  # of one column, over all rows
MAX_TEXT_BYTES = 1 << 10  # of one name

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
    """Samples of a Parquet file, in order.

    Raises:
        Corrupt: not Parquet; a column missing, twice there or of another type; a null; more rows, values or text than
            the limits; no tokens, or lists of unequal lengths in a row.
    """
    try:
        if len(content) > MAX_FILE_BYTES:
            raise ValueError(f"{len(content)} bytes, more than the {MAX_FILE_BYTES} allowed")
        _demand_readable(pq.ParquetFile(pa.BufferReader(content)))
        texts = [field.name for field in SCHEMA if field.type == pa.string()]
        table = pq.read_table(pa.BufferReader(content), columns=SCHEMA.names, read_dictionary=texts)
        _demand_whole(table)
        return [_sample(row) for row in table.to_pylist()]
    except (pa.ArrowException, TypeError, ValueError, OSError) as error:
        raise Corrupt(f"not a trajectory file: {error}", op="read trajectories", key=key) from error


def _demand_readable(file: Any) -> None:
    """Check a pq.ParquetFile's footer: our columns, and no more than the limits.

    Raises:
        ValueError: says which column.
    """
    schema, footer = file.schema_arrow, file.metadata
    for field in SCHEMA:
        found = [other.type for other in schema if other.name == field.name]
        if found != [field.type]:
            said = ", ".join(map(str, found)) or "missing"
            raise ValueError(f"column {field.name} must be {field.type}, is {said}")
    if footer.num_rows > MAX_ROWS:
        raise ValueError(f"{footer.num_rows} rows, more than the {MAX_ROWS} allowed")
    values, sizes = dict.fromkeys(SCHEMA.names, 0), dict.fromkeys(SCHEMA.names, 0)
    for group in map(footer.row_group, range(footer.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            name = column.path_in_schema.split(".")[0]
            if name in values:
                values[name] += column.num_values
                sizes[name] += column.total_uncompressed_size
    for name in values:
        if values[name] > MAX_VALUES or sizes[name] > MAX_FILE_BYTES:
            raise ValueError(f"{values[name]} values in {sizes[name]} bytes of column {name}, more than allowed")


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


def _sample(row: dict[str, Any]) -> Sample:
    return Sample(
        group=row["group"],
        prompt_id=row["prompt_id"],
        prompt_tokens=tuple(row["prompt_tokens"]),
        tokens=tuple(row["tokens"]),
        logprobs=tuple(row["logprobs"]),
        token_versions=tuple(map(Version, row["token_epochs"], row["token_numbers"])),
        reward=row["reward"],
        finished=row["finished"],
        node=row["node"],
    )
