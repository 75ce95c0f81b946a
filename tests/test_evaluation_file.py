"""Held-out evaluations as files: what is written comes back; what another hand wrote is read in full or corrupt."""

import contextlib
import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout import evaluate
from rollout.evaluate import SCHEMA, Evaluation, Outcome
from shared.errors import Corrupt

OUTCOME = Outcome("p", (1, 2), "ab", 1.0, (3,), "c", 0.5, 7)
FILE = Evaluation((OUTCOME, OUTCOME)).to_parquet()
ROW = vars(OUTCOME)


def file_of(rows: list[dict[str, Any]], **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), buffer, compression="zstd", **options)
    return buffer.getvalue()


def test_what_is_written_reads_back_equal():
    other = Outcome("q", (), "", float("-inf"), (), "\N{SNOWMAN}", 0.0, -1)
    assert Evaluation.from_parquet(Evaluation((OUTCOME, other)).to_parquet(), key="k").outcomes == (OUTCOME, other)
    assert Evaluation.from_parquet(FILE, key="k").outcomes == (OUTCOME, OUTCOME)


@pytest.mark.parametrize("column", SCHEMA.names)
def test_a_null_or_a_missing_column_is_corrupt(column: str):
    dropped = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([ROW], schema=SCHEMA).drop_columns([column]), dropped)
    for content in (file_of([{**ROW, column: None}, ROW]), dropped.getvalue()):
        with pytest.raises(Corrupt, match="not an evaluation file"):
            Evaluation.from_parquet(content, key="k")


@pytest.mark.parametrize("content", [b"", b"PAR1" * 9, FILE[:-1], FILE[1:], file_of([])])
def test_what_is_no_evaluation_is_corrupt_and_names_the_key(content: bytes):
    with pytest.raises(Corrupt) as caught:
        Evaluation.from_parquet(content, key="policy/evaluations/x")
    assert caught.value.key == "policy/evaluations/x"


def test_small_files_that_would_grow_without_bound_are_refused(monkeypatch: pytest.MonkeyPatch):
    count = evaluate.LIMITS.values + 1
    same = pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), pa.array(np.zeros(count, np.int32)))
    table = pa.Table.from_pylist([ROW], schema=SCHEMA).set_column(1, SCHEMA.field(1), same)
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    monkeypatch.setattr(evaluate, "MAX_FILE_BYTES", 1_000_000)
    texts = file_of([{**ROW, "greedy_text": "x" * 10_000}] * 101)
    for content, says in ((buffer.getvalue(), "values in"), (texts, "1010000 bytes of text")):
        assert len(content) < 50_000
        with pytest.raises(Corrupt, match=says):
            Evaluation.from_parquet(content, key="k")


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(FILE) - 1), st.integers(0, 255))
def test_a_file_with_one_changed_byte_is_read_or_corrupt_and_nothing_else(position: int, value: int):
    content = bytearray(FILE)
    content[position] = value
    with contextlib.suppress(Corrupt):
        Evaluation.from_parquet(bytes(content), key="k")
