"""Thrift's compact protocol, as far as reading goes: a struct's fields by their number. What Parquet's metadata is in.

Strict: fields come in ascending order, so that none is told twice (readers would differ in which one they believe);
nothing is longer than what is left; nesting is bounded. Memory is bounded by the bytes that are read, times a hundred.

Format: https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

from typing import Any

_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
_MAX_DEPTH = 12
_MAX_VARINT_BYTES = 10

Fields = dict[int, Any]


def read_struct(content: bytes, position: int, end: int) -> tuple[Fields, int]:
    """A struct's fields (bool, int, bytes, list or struct), and where it ends.

    Raises:
        ValueError: not a struct that ends before `end`.
    """
    return _struct(content, position, end, 0)


def _struct(content: bytes, position: int, end: int, depth: int) -> tuple[Fields, int]:
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deep")
    fields: Fields = {}
    last = 0
    while True:
        head, position = _byte(content, position, end)
        if head == 0:
            return fields, position
        kind, delta = head & 15, head >> 4
        if delta:
            field = last + delta
        else:
            field, position = _integer(content, position, end)
        if field <= last:
            raise ValueError("fields out of order")
        last = field
        if kind in (_TRUE, _FALSE):
            fields[field] = kind == _TRUE
        else:
            fields[field], position = _value(content, position, end, kind, depth)


def _value(content: bytes, position: int, end: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind == _STRUCT:
        return _struct(content, position, end, depth + 1)
    if kind in (_I16, _I32, _I64):
        return _integer(content, position, end)
    if kind == _BINARY:
        length, position = _varint(content, position, end)
        return _take(content, position, end, length)
    if kind == _LIST:
        return _list(content, position, end, depth)
    if kind in (_TRUE, _FALSE, _BYTE):  # in a list, a bool is a byte
        return _byte(content, position, end)
    if kind == _DOUBLE:
        return _take(content, position, end, 8)
    raise ValueError(f"a field of type {kind}")


def _list(content: bytes, position: int, end: int, depth: int) -> tuple[list[Any], int]:
    head, position = _byte(content, position, end)
    kind, count = head & 15, head >> 4
    if count == 15:
        count, position = _varint(content, position, end)
    if count > end - position:  # each item takes a byte at least
        raise ValueError("a list longer than what holds it")
    items = []
    for _ in range(count):
        item, position = _value(content, position, end, kind, depth + 1)
        items.append(item)
    return items, position


def _byte(content: bytes, position: int, end: int) -> tuple[int, int]:
    if position >= end:
        raise ValueError("it does not end")
    return content[position], position + 1


def _take(content: bytes, position: int, end: int, length: int) -> tuple[bytes, int]:
    if length > end - position:
        raise ValueError("a text longer than what holds it")
    return content[position : position + length], position + length


def _varint(content: bytes, position: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 7 * _MAX_VARINT_BYTES, 7):
        byte, position = _byte(content, position, end)
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number that does not end")


def _integer(content: bytes, position: int, end: int) -> tuple[int, int]:
    value, position = _varint(content, position, end)
    return (value >> 1) ^ -(value & 1), position
