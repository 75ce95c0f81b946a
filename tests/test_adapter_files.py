"""Our safetensors writer against the stock reader, and our strict reader against everything else."""

import contextlib
import json
import mmap
import tracemalloc
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.adapter_files import (
    MAX_HEADER_BYTES,
    MAX_NAME_LENGTH,
    TensorSpec,
    demand_finite,
    header_bytes,
    parse_header,
    read_tensors,
)
from shared.errors import Corrupt

SPECS = [
    TensorSpec("experts.2", "F32", (2, 2)),
    TensorSpec("experts.10", "F32", (1, 3)),
    TensorSpec("a", "F32", (0, 4)),
]
FILE = header_bytes(SPECS) + np.arange(7, dtype=np.float32).tobytes()


def file_of(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def read(content: bytes) -> list[TensorSpec]:
    return [spec for spec, _ in read_tensors(content, key="k")]


def test_the_stock_reader_opens_our_file():
    found = safetensors.numpy.load(FILE)
    assert {name: array.shape for name, array in found.items()} == {spec.name: spec.shape for spec in SPECS}
    assert found["experts.10"].tolist() == [[4.0, 5.0, 6.0]]


def test_tensors_are_read_in_the_order_they_were_written_in_not_sorted_by_name():
    assert read(FILE) == SPECS


def test_we_open_the_stock_writers_file():
    arrays = {"b": np.ones((2, 3), np.float16), "a": np.zeros(5, np.float32)}
    assert {spec.name: spec.shape for spec in read(safetensors.numpy.save(arrays, metadata={"by": "them"}))} == {
        "a": (5,),
        "b": (2, 3),
    }


def test_the_data_starts_aligned_so_that_it_can_be_mapped():
    assert parse_header(FILE, len(FILE), key="k")[1] % 8 == 0


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changes}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "truncated"),
        (FILE[:7], "truncated"),
        (FILE[:40], "truncated inside the header"),
        (FILE[:-1], "header and data make"),
        (FILE + b"x", "header and data make"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "more than"),
        (b"\xff" * 16, "more than"),
        (file_of([]), "not a JSON object"),
        (file_of(b'{"a":{},"a":{}}'), "duplicate key"),
        (file_of({"a": entry(dtype="I64")}, b"1234"), "dtype"),
        (file_of({"a": entry(dtype=["F32"])}, b"1234"), "bad entry"),
        (file_of({"a": entry(shape={})}, b"1234"), "bad entry"),
        (file_of({"a": entry(shape="1")}, b"1234"), "bad entry"),
        (file_of({"a": entry(shape=[True])}, b"1234"), "out of range"),
        (file_of({"a": entry(shape=[-1])}, b"1234"), "out of range"),
        (file_of({"a": entry(shape=[10**300] * 8)}, b"1234"), "out of range"),
        (file_of({"a": entry(shape=[1] * 9)}, b"1234"), "bad entry"),
        (file_of({"a": entry(shape=[2])}, b"1234"), "its shape needs 8"),
        (file_of({"a": entry(data_offsets=[4, 0])}, b"1234"), "its shape needs"),
        (file_of({"a": entry(data_offsets=[4, 8])}, b"12345678"), "gap or overlap"),
        (file_of({"a": entry(), "b": entry()}, b"1234"), "gap or overlap"),
        (file_of({"a": entry(), "__metadata__": {"n": 1}}, b"1234"), "__metadata__"),
        (file_of({"a": "nothing"}), "bad entry"),
        (file_of({str(number): None for number in range(200_001)}), "more than 200000"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_format_forbids_is_corrupt(content: bytes, says: str):
    with pytest.raises(Corrupt, match=says):
        read(content)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../../etc/x", "/etc/x", "a/b", "a..b", ".a", "a.", "a\\b", "a b", "a\n", "é", "x" * 513]
)
def test_a_tensor_name_that_could_be_a_path_is_corrupt(name: str):
    with pytest.raises(Corrupt, match="not the name of a tensor"):
        read(file_of({name: entry()}, b"1234"))


def test_the_names_of_parts_and_the_longest_name_are_read():
    for name in ("model.layers.0.q_proj.lora_B.weight@8,0", "a-b", "x" * MAX_NAME_LENGTH):
        assert read(file_of({name: entry()}, b"1234")) == [TensorSpec(name, "F32", (1,))]


def test_a_header_that_claims_to_be_the_whole_file_is_not_copied_first():
    with mmap.mmap(-1, 3 * MAX_HEADER_BYTES) as file:
        file[:8] = (1 << 60).to_bytes(8, "little")
        tracemalloc.start()
        try:
            with pytest.raises(Corrupt, match="more than"):
                next(read_tensors(file, key="k"))
            assert tracemalloc.get_traced_memory()[1] < 2 * MAX_HEADER_BYTES
        finally:
            tracemalloc.stop()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_read_or_corrupt_and_nothing_else(content: bytes):
    with contextlib.suppress(Corrupt):
        read(content)


_NUMBERS = st.integers() | st.sampled_from([0, 1, 4, 2**63, 2**64, 10**30]) | st.booleans() | st.floats() | st.none()
_ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "I64", "", None]),
        "shape": st.lists(_NUMBERS, max_size=9) | st.text(max_size=3) | st.none(),
        "data_offsets": st.lists(_NUMBERS, max_size=3) | st.none(),
    },
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(max_size=5), _ENTRIES | st.none() | _NUMBERS, max_size=4), st.binary(max_size=16))
def test_arbitrary_headers_are_read_or_corrupt_and_nothing_else(header: dict[str, Any], data: bytes):
    with contextlib.suppress(Corrupt):
        read(file_of(header, data))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(FILE) - 1), st.integers(0, 255))
def test_a_file_with_one_changed_byte_is_read_or_corrupt_and_nothing_else(position: int, value: int):
    content = bytearray(FILE)
    content[position] = value
    with contextlib.suppress(Corrupt):
        read(bytes(content))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_found_in_every_dtype(dtype: str, poison: float):
    values = np.array([0.0, -1.5, 3e-5, poison], dtype=np.float32)
    words = {
        "F32": values,
        "F16": values.astype(np.float16),
        "BF16": (values.view(np.uint32) >> 16).astype(np.uint16),
    }[dtype]
    with pytest.raises(Corrupt, match="NaN or infinity in tensor t"):
        demand_finite(TensorSpec("t", dtype, (4,)), words.tobytes(), key="k")
    demand_finite(TensorSpec("t", dtype, (3,)), words[:3].tobytes(), key="k")
    demand_finite(TensorSpec("t", dtype, (0,)), b"", key="k")
