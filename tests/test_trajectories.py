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
from shared.errors import Corrupt, UsageError
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
POOLS: list[pa.MemoryPool] = []  # never freed: an error that is still held may hold what was allocated from one


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


def bounded(content: bytes, says: str) -> None:
    """Refused, without having allocated a megabyte beyond the file."""
    usual = pa.default_memory_pool()
    counting = pa.proxy_memory_pool(usual)
    POOLS.append(counting)
    pa.set_memory_pool(counting)
    tracemalloc.start()
    try:
        with pytest.raises(Corrupt, match=says):
            decode(content, key="k")
        python_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(usual)
    assert max(counting.max_memory(), python_bytes) < (1 << 20) + len(content)


def with_tokens(count: int, column: str = "tokens", **options: Any) -> bytes:
    """A file of one row with so many equal tokens."""
    same = pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), pa.array(np.zeros(count, np.int32)))
    field = SCHEMA.field(column)
    return file_of(table_of(ROW).set_column(SCHEMA.names.index(column), field, same.cast(field.type)), **options)


def varint(number: int, length: int = 0) -> bytes:
    """A number as Thrift's compact protocol writes it, in so many bytes: it reads the same."""
    number, octets = 2 * number, bytearray()
    while number or not octets or len(octets) < length:
        octets.append(number & 0x7F | 0x80)
        number >>= 7
    octets[-1] &= 0x7F
    return bytes(octets)


def footer_saying(content: bytes, changes: dict[int, int]) -> bytes:
    """A file whose footer tells other numbers, in as many bytes."""
    at = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    footer = content[at:]
    for old, new in changes.items():
        assert varint(old) in footer
        footer = footer.replace(varint(old), varint(new, len(varint(old))))
    return content[:at] + footer


def test_a_small_file_that_would_grow_without_bound_is_refused_before_it_is_read():
    many = with_tokens(MAX_VALUES + 1)
    assert len(many) < 10_000
    bounded(many, "values in")
    bounded(file_of(pa.concat_tables([table_of(ROW)] * (MAX_ROWS + 1))), "rows, more than")


@pytest.mark.parametrize("column", ["tokens", "prompt_tokens", "token_numbers"])
def test_a_footer_that_tells_fewer_values_than_the_pages_hold_is_refused_before_they_are_read(column: str):
    lying = footer_saying(with_tokens(MAX_VALUES + 1, column), {MAX_VALUES + 1: 2})
    chunk = pq.ParquetFile(pa.BufferReader(lying)).metadata.row_group(0).column(SCHEMA.names.index(column))
    assert (chunk.num_values, len(lying) < 10_000) == (2, True)
    bounded(lying, f"{MAX_VALUES + 1} values in column {column}, its footer says 2")


def test_a_footer_that_tells_smaller_sizes_than_the_pages_have_is_refused_before_they_are_unfolded(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(trajectories, "MAX_FILE_BYTES", 1 << 20)
    content = with_tokens(MAX_VALUES, use_dictionary=False)
    chunk = pq.ParquetFile(pa.BufferReader(content)).metadata.row_group(0).column(SCHEMA.names.index("tokens"))
    assert chunk.total_uncompressed_size > 4 * MAX_VALUES
    bounded(footer_saying(content, {chunk.total_uncompressed_size: 100}), "bytes of column tokens, more than")


def test_a_footer_that_gives_a_chunk_another_name_does_not_hide_its_values():
    content = with_tokens(MAX_VALUES + 1)
    at = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    path = b"\x06tokens\x04list\x07element"  # as a chunk spells it; the schema has its names elsewhere
    assert content[at:].count(path) == 1
    bounded(
        content[:at] + content[at:].replace(path, b"\x06tomens\x04list\x07element"), "column tokens is called otherwise"
    )


def test_texts_spelt_as_beginnings_of_the_ones_before_are_refused():
    long = ["x" * 1000] * 1000
    table = pa.concat_tables([table_of(ROW)] * 1000)
    table = table.set_column(SCHEMA.names.index("node"), SCHEMA.field("node"), pa.array(long))
    content = file_of(table, use_dictionary=False, column_encoding={"node": "DELTA_BYTE_ARRAY"})
    with pytest.raises(Corrupt, match="texts that repeat the one before"):
        decode(content, key="k")


def test_a_large_footer_is_refused_before_it_is_parsed():
    table = table_of(ROW).replace_schema_metadata({"comment": "x" * trajectories.MAX_FOOTER_BYTES})
    bounded(file_of(table), "a footer of")
    claimed = FILE[:-8] + (1 << 31).to_bytes(4, "little") + b"PAR1"
    bounded(claimed, "a footer of")


def test_row_groups_that_point_at_the_same_pages_count_each_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trajectories, "MAX_PAGES", 10)
    with pytest.raises(Corrupt, match="more pages than allowed"):
        decode(file_of(table_of(*[ROW] * 20), row_group_size=1), key="k")


def test_pages_of_every_usual_kind_are_read():
    encodings = {"tokens": "DELTA_BINARY_PACKED", "logprobs": "BYTE_STREAM_SPLIT"}
    options: dict[str, Any]
    for options in (
        {"data_page_version": "2.0"},
        {"use_dictionary": False},
        {"use_dictionary": False, "column_encoding": encodings},
        {"write_statistics": False, "store_schema": False},
        {"write_page_checksum": True, "write_page_index": True},
    ):
        assert decode(file_of(table_of(*[ROW] * 300), **options), key="k") == [SAMPLE] * 300


def test_more_than_is_read_is_not_written():
    many = Sample("g", "p", (), (1,) * (MAX_VALUES + 1), (), (), 0.0, True, "n")
    with pytest.raises(UsageError, match=r"Lower rollout\.groups_per_request"):
        encode([many])


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
