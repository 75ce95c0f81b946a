"""What a Parquet file will unfold to, by its pages' own headers: the footer's sums are only the writer's claim.

A reader allocates by page headers and by the footer's counts, decompresses each page into what its header declares, and
decodes as many values as it says; a few hundred bytes may so hold billions. `measure` adds the headers up before
anything is decompressed, and demands that the footer tells the same and hangs together: pyarrow ends the process
(SIGABRT) at some that do not.

Does not: read values; guard against what the headers don't bound, so pages that spell each text as a beginning of the
one before (DELTA_BYTE_ARRAY), which may unfold without limit, are refused, and so is encryption.

Format: https://parquet.apache.org/docs/file-format/ and parquet.thrift, whose field numbers stand here.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from shared.thrift_compact import Fields, read_struct

MAGIC = b"PAR1"
TAIL_BYTES = 8  # the footer's length, and the magic

_DATA_PAGE, _INDEX_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2 = range(4)
_HEADER_OF = {_DATA_PAGE: 5, _DICTIONARY_PAGE: 7, _DATA_PAGE_V2: 8}  # page type -> field with its own header
_ENCODING_OF = {_DATA_PAGE: 2, _DICTIONARY_PAGE: 2, _DATA_PAGE_V2: 4}  # page type -> field of that header
_DELTA_BYTE_ARRAY = 7
_MAX_COUNT = 1 << 31
_MAX_DEPTH = 8


@dataclass(frozen=True)
class Limits:
    """What is allowed: bytes of the footer, rows and pages in all, and of each column values and decompressed bytes."""

    footer_bytes: int
    rows: int
    pages: int
    values: int
    column_bytes: int


def demand_bounded(content: bytes, columns: Collection[str], limits: Limits) -> None:
    """Check that these columns of a file, read by pyarrow, stay within the limits.

    Args:
        columns: names at the top of the schema; what else the file has is not read.

    Raises:
        ValueError: they do not, or the footer tells otherwise than the pages, or it is malformed.
    """
    footer = _footer(content, limits)
    groups = _structs(footer, 4)
    rows = [_count(group, 3) for group in groups]
    if sum(rows) != _count(footer, 3):
        raise ValueError("rows that do not add up")
    if sum(rows) > limits.rows:
        raise ValueError(f"{sum(rows)} rows, more than the {limits.rows} allowed")
    paths = list(_leaves(_structs(footer, 2)))
    pages, values, sizes = 0, dict.fromkeys(columns, 0), dict.fromkeys(columns, 0)
    for group in groups:
        for path, chunk in zip(paths, _chunks(group, paths), strict=True):
            name = path[0].decode(errors="replace")
            if name not in values or _count(chunk, 5) == 0:  # not read; without rows its offsets mean nothing
                continue
            found, counted, unfolded = _measure(content, chunk, limits.pages - pages)
            if counted != _count(chunk, 5):
                raise ValueError(f"{counted} values in column {name}, its footer says {_count(chunk, 5)}")
            pages += found
            values[name] += counted
            sizes[name] += unfolded
            if values[name] > limits.values or sizes[name] > limits.column_bytes:
                raise ValueError(f"{values[name]} values in {sizes[name]} bytes of column {name}, more than allowed")


def _footer(content: bytes, limits: Limits) -> Fields:
    if len(content) < len(MAGIC) + TAIL_BYTES or content[-4:] != MAGIC:
        raise ValueError("not the end of a Parquet file")
    length = int.from_bytes(content[-8:-4], "little")
    if length > limits.footer_bytes:
        raise ValueError(f"a footer of {length} bytes, more than the {limits.footer_bytes} allowed")
    end = len(content) - TAIL_BYTES
    if length > end:
        raise ValueError("a footer longer than the file")
    footer, _ = read_struct(content, end - length, end)
    if 8 in footer:
        raise ValueError("an encrypted file")
    return footer


def _leaves(schema: list[Fields]) -> Iterator[tuple[bytes, ...]]:
    """The paths of a schema's columns: its elements are a tree, root first, children after their parent."""
    elements = iter(schema)

    def below(path: tuple[bytes, ...], count: int) -> Iterator[tuple[bytes, ...]]:
        if len(path) > _MAX_DEPTH:
            raise ValueError("a schema nested too deep")
        for _ in range(count):
            element = next(elements, {})
            name, children = element.get(4), element.get(5, 0)
            if not isinstance(name, bytes) or not isinstance(children, int) or children < 0:
                raise ValueError("a schema that is no tree of names")
            yield from below((*path, name), children) if children else ((*path, name),)

    yield from below((), _count(next(elements, {}), 5))
    if next(elements, None) is not None:
        raise ValueError("a schema with elements left over")


def _chunks(group: Fields, paths: list[tuple[bytes, ...]]) -> Iterator[Fields]:
    """The metadata of a row group's columns, each of which must be the schema's."""
    chunks = _structs(group, 1)
    if len(chunks) != len(paths):
        raise ValueError(f"{len(chunks)} columns in a row group, {len(paths)} in the schema")
    for path, chunk in zip(paths, chunks, strict=True):
        metadata = chunk.get(3)
        if not isinstance(metadata, dict) or chunk.keys() & {1, 8, 9}:
            raise ValueError("a column that is encrypted or lies in another file")
        if metadata.get(3) != list(path):
            raise ValueError(f"column {path[0].decode(errors='replace')} is called otherwise in a row group")
        yield metadata


def _measure(content: bytes, chunk: Fields, max_pages: int) -> tuple[int, int, int]:
    """(pages, values, decompressed bytes) of a column chunk, by its pages' headers."""
    start, size = _count(chunk, 9), _count(chunk, 7)
    if 0 < _count(chunk, 11, default=0) < start:  # the dictionary comes first
        start = _count(chunk, 11)
    position, end = start, start + size
    if end > len(content):
        raise ValueError("a column outside of the file")
    pages = values = unfolded = 0
    while position < end:
        pages += 1
        if pages > max_pages:
            raise ValueError("more pages than allowed")
        header, position = read_struct(content, position, end)
        kind = _count(header, 1)
        unfolded += _count(header, 2)
        position += _count(header, 3)
        if kind == _INDEX_PAGE:
            continue
        own = header.get(_HEADER_OF.get(kind, 0))
        if not isinstance(own, dict):
            raise ValueError(f"a page of an unknown kind {kind}")
        if _count(own, _ENCODING_OF[kind]) == _DELTA_BYTE_ARRAY:
            raise ValueError("a page of texts that repeat the one before")
        values += _count(own, 1) if kind != _DICTIONARY_PAGE else 0
    if position != end:
        raise ValueError("pages that do not fill their column")
    return pages, values, unfolded


def _count(fields: Fields, field: int, default: int | None = None) -> int:
    value = fields.get(field, default)
    if type(value) is not int or not 0 <= value < _MAX_COUNT:
        raise ValueError(f"field {field} is no count")
    return value


def _structs(fields: Fields, field: int) -> list[Fields]:
    value = fields.get(field)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"field {field} is no list")
    return value
