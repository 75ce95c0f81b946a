"""What a Parquet file will unfold to, by its pages' own headers: the footer's sums are only the writer's claim.

A reader allocates by page headers and by the footer's counts, decompresses each page into what its header declares, and
decodes as many values as it says; a few hundred bytes may so hold billions. `walk` adds the headers up before anything
is decompressed, and demands that the footer tells the same.

Does not: read values; guard against what the headers don't bound, so pages that spell each text as a beginning of the
one before (DELTA_BYTE_ARRAY), which may unfold without limit, are refused.

Format: https://parquet.apache.org/docs/file-format/ (page headers) in Thrift's compact protocol.
"""

from dataclasses import dataclass

FOOTER_TAIL_BYTES = 8  # the footer's length, and the magic
MAGIC = b"PAR1"

_DATA_PAGE, _INDEX_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2 = range(4)
_HEADER_OF = {_DATA_PAGE: 5, _DICTIONARY_PAGE: 7, _DATA_PAGE_V2: 8}  # page type -> field with its own header
_ENCODING_OF = {_DATA_PAGE: 2, _DICTIONARY_PAGE: 2, _DATA_PAGE_V2: 4}  # page type -> field of that header
_DELTA_BYTE_ARRAY = 7

_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
_MAX_DEPTH = 8
_MAX_VARINT_BYTES = 10

Fields = dict[int, "int | Fields"]


@dataclass(frozen=True)
class Pages:
    """The pages of a column chunk, added up."""

    count: int
    values: int
    bytes: int  # decompressed


def footer_bytes(content: bytes) -> int:
    """The length that a file declares for its footer.

    Raises:
        ValueError: no end of a Parquet file, or one whose footer is encrypted.
    """
    if len(content) < 2 * FOOTER_TAIL_BYTES or content[-4:] != MAGIC:
        raise ValueError("not the end of a Parquet file")
    return int.from_bytes(content[-8:-4], "little")


def walk(content: bytes, start: int, size: int, *, max_pages: int) -> Pages:
    """Add up the pages of a column chunk.

    Args:
        start: offset of its first page, and `size` its bytes in all, as the footer says.

    Raises:
        ValueError: they don't fill it exactly, more than `max_pages`, a malformed header, an encoding that is refused.
    """
    end, position = start + size, start
    if not 0 <= start <= end <= len(content):
        raise ValueError("a column outside of the file")
    count = values = total = 0
    while position < end:
        count += 1
        if count > max_pages:
            raise ValueError(f"more than {max_pages} pages")
        header, position = _struct(content, position, end, 0)
        kind, unfolded, stored = (_number(header, field) for field in (1, 2, 3))
        position += stored
        total += unfolded
        if kind == _INDEX_PAGE:
            continue
        own = header.get(_HEADER_OF.get(kind, 0))
        if not isinstance(own, dict):
            raise ValueError(f"a page of an unknown kind {kind}")
        if _number(own, _ENCODING_OF[kind]) == _DELTA_BYTE_ARRAY:
            raise ValueError("a page of texts that repeat the one before")
        values += _number(own, 1) if kind != _DICTIONARY_PAGE else 0
    if position != end:
        raise ValueError("pages that do not fill their column")
    return Pages(count, values, total)


def _number(fields: Fields, field: int) -> int:
    """A required 32-bit count."""
    value = fields.get(field)
    if not isinstance(value, int) or not 0 <= value < 1 << 31:
        raise ValueError(f"a page header whose field {field} is no count")
    return value


def _struct(content: bytes, position: int, end: int, depth: int) -> tuple[Fields, int]:
    """A Thrift struct's integers and structs by field number, and where it ends. The rest is skipped."""
    if depth > _MAX_DEPTH:
        raise ValueError("a page header nested too deep")
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
            field, position = _zigzag(content, position, end)
        if field <= last:  # or one field could be told twice, and readers differ in which they believe
            raise ValueError("a page header whose fields are out of order")
        last = field
        if kind == _STRUCT:
            fields[field], position = _struct(content, position, end, depth + 1)
        elif kind in (_I16, _I32, _I64):
            fields[field], position = _zigzag(content, position, end)
        else:
            position = _skip(content, position, end, kind)


def _skip(content: bytes, position: int, end: int, kind: int) -> int:
    """Where a field that nobody asks for ends: statistics, flags."""
    if kind in (_TRUE, _FALSE):
        return position
    if kind == _BYTE:
        return position + 1
    if kind == _DOUBLE:
        return position + 8
    if kind == _BINARY:
        length, position = _varint(content, position, end)
        return position + length
    raise ValueError(f"a page header with a field of type {kind}")


def _byte(content: bytes, position: int, end: int) -> tuple[int, int]:
    if position >= end:
        raise ValueError("a page header that does not end")
    return content[position], position + 1


def _varint(content: bytes, position: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 7 * _MAX_VARINT_BYTES, 7):
        byte, position = _byte(content, position, end)
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a page header with a number that does not end")


def _zigzag(content: bytes, position: int, end: int) -> tuple[int, int]:
    value, position = _varint(content, position, end)
    return (value >> 1) ^ -(value & 1), position
