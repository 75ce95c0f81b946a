"""Trajectory files: what is encoded comes back; what another hand wrote is read in full or refused as corrupt."""

import contextlib
import io
import tracemalloc
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import trajectories
from shared.errors import Corrupt
from shared.trajectories import MAX_ROWS, MAX_TEXT_BYTES, MAX_VALUES, SCHEMA, Sample, decode, encode
from shared.versions import Version

ROW: dict[str, Any] = {
    "group": "g",
    "prompt_id": "p",
    "prompt_tokens": [1],
    "tokens": [2, 3],
    "logprobs": [-0.5, -0.25],
    "token_epochs": [1, 1],
    "token_numbers": [4, 5],
    "reward": 1.0,
    "finished": True,
    "node": "n",
}
SAMPLE = Sample("g", "p", (1,), (2, 3), (-0.5, -0.25), (Version(1, 4), Version(1, 5)), 1.0, True, "n")
FILE = encode([SAMPLE, SAMPLE])


def file_of(table: pa.Table, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", **options)
    return buffer.getvalue()


def table_of(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=SCHEMA)


def test_what_is_encoded_reads_back_equal_and_in_order():
    other = Sample("h", "q", (), (9,), (float("-inf"),), (Version(2, 0),), float("inf"), False, "m")
    assert decode(encode([SAMPLE, other, SAMPLE]), key="k") == [SAMPLE, other, SAMPLE]
    assert decode(encode([]), key="k") == []


def test_a_file_of_another_writer_is_read_by_its_columns_in_any_order_and_unknown_ones_are_ignored():
    table = table_of(ROW, ROW).select(SCHEMA.names[::-1]).append_column("comment", pa.array(["x", None]))
    content = file_of(table, store_schema=False, row_group_size=1, use_dictionary=False)
    assert decode(content, key="k") == [SAMPLE, SAMPLE]


@pytest.mark.parametrize("column", SCHEMA.names)
def test_a_missing_column_a_null_and_another_type_are_corrupt_and_name_the_column(column: str):
    position = SCHEMA.names.index(column)
    bad = [table_of(ROW).drop_columns([column]), table_of(ROW, {**ROW, column: None})]
    if isinstance(ROW[column], list):
        bad.append(table_of({**ROW, column: [*ROW[column][1:], None]}))
    bad.append(table_of(ROW).set_column(position, column, pa.array([{"x": 1}])))
    bad.append(table_of(ROW).append_column(column, table_of(ROW).column(column)))
    for table in bad:
        with pytest.raises(Corrupt, match=rf"column {column}\b"):
            decode(file_of(table), key="k")


@pytest.mark.parametrize("column", ["tokens", "logprobs", "token_epochs", "token_numbers"])
def test_lists_of_unequal_lengths_are_corrupt(column: str):
    with pytest.raises(Corrupt, match="unequal lengths"):
        decode(file_of(table_of(ROW, {**ROW, column: ROW[column] * 2})), key="k")


def test_a_row_without_tokens_is_corrupt():
    empty = dict.fromkeys(("tokens", "logprobs", "token_epochs", "token_numbers"), ())
    with pytest.raises(Corrupt, match="without tokens"):
        decode(file_of(table_of(ROW, {**ROW, **empty})), key="k")


def test_a_small_file_that_would_grow_without_bound_is_refused_before_it_is_read():
    count = MAX_VALUES + 1
    same = pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), pa.array(np.zeros(count, np.int32)))
    many = file_of(table_of(ROW).set_column(SCHEMA.names.index("tokens"), SCHEMA.field("tokens"), same))
    rows = file_of(pa.concat_tables([table_of(ROW)] * (MAX_ROWS + 1)))
    assert len(many) < 10_000
    usual = pa.default_memory_pool()
    for content, says in ((many, "values in"), (rows, "rows, more than")):
        counting = pa.proxy_memory_pool(usual)
        pa.set_memory_pool(counting)
        tracemalloc.start()
        try:
            with pytest.raises(Corrupt, match=says):
                decode(content, key="k")
            python_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
            pa.set_memory_pool(usual)
        assert max(counting.max_memory(), python_bytes) < 1 << 20


def test_a_long_name_is_refused_once_and_not_once_a_row():
    rows = [{**ROW, "node": "n" * (MAX_TEXT_BYTES + 1)}] * 1000
    with pytest.raises(Corrupt, match="bytes of text in column node"):
        decode(file_of(table_of(*rows)), key="k")


def test_a_file_larger_than_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trajectories, "MAX_FILE_BYTES", len(FILE) - 1)
    with pytest.raises(Corrupt, match="bytes, more than"):
        decode(FILE, key="k")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" * 9, FILE[:-1], FILE[1:], FILE[: len(FILE) // 2]])
def test_what_is_no_parquet_is_corrupt_and_names_the_key(content: bytes):
    with pytest.raises(Corrupt, match="not a trajectory file") as caught:
        decode(content, key="policy/trajectories/x")
    assert caught.value.key == "policy/trajectories/x"


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(FILE) - 1), st.integers(0, 255))
def test_a_file_with_one_changed_byte_is_read_or_corrupt_and_nothing_else(position: int, value: int):
    content = bytearray(FILE)
    content[position] = value
    with contextlib.suppress(Corrupt):
        decode(bytes(content), key="k")
