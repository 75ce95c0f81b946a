"""JSON as the protocol writes and reads it: canonical bytes out; no surprises in.

Canonical: UTF-8, keys sorted, no spaces, no NaN, so equal values give equal bytes on every host. Reading refuses
duplicate keys, NaN, Infinity and numbers too large for a double, lone surrogates, nesting beyond the parser's depth,
more than `max_bytes`, and more than MAX_VALUES, whose objects would take thirty times the bytes that spell them.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from shared.errors import Corrupt

MAX_VALUES = 6_000_000  # counted with the brackets around them; a slice has nine, and 100 MB hold 600,000 slices

_DIGITS = bytes.maketrans(b"123456789", b"0" * 9)
_TOO_LONG = b"0" * 309  # digits, so that no integer is too large for a double


def dumps(value: Any) -> bytes:
    """Canonical bytes of a JSON value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def join(fields: Mapping[str, bytes]) -> bytes:
    """Canonical bytes of an object, from those of its fields' values."""
    return b"{%s}" % b",".join(dumps(name) + b":" + fields[name] for name in sorted(fields))


def load_object(content: bytes, *, key: str, max_bytes: int) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        Corrupt: too large, not JSON, not an object, a duplicate key, NaN or Infinity, nested too deep.
    """
    _demand_bounded(content, key, max_bytes)

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("duplicate key")
        return found

    def no_constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    def finite(text: str) -> float:
        number = float(text)
        if not math.isfinite(number):
            raise ValueError(f"{text[:40]} is too large")
        return number

    try:
        value = json.loads(
            content.decode(), object_pairs_hook=no_duplicates, parse_constant=no_constant, parse_float=finite
        )
        if b"\\u" in content:  # an escape may spell half a surrogate pair, which no UTF-8 can
            dumps(value)
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"not valid JSON: {error}", op="read json", key=key) from error
    if not isinstance(value, dict):
        raise Corrupt("not a JSON object", op="read json", key=key)
    return value


def load_canonical(content: bytes, *, key: str, max_bytes: int) -> dict[str, Any]:
    """Read a large object that the caller writes again and compares with the content: twice as fast as `load_object`.

    Duplicate keys, NaN and all else that is not canonical pass here, and cannot survive that comparison.

    Raises:
        Corrupt: too large, not JSON, not an object, nested too deep.
    """
    _demand_bounded(content, key, max_bytes)
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"not valid JSON: {error}", op="read json", key=key) from error
    if not isinstance(value, dict):
        raise Corrupt("not a JSON object", op="read json", key=key)
    return value


def _demand_bounded(content: bytes, key: str, max_bytes: int) -> None:
    """Check what can be checked before a single value is made.

    Raises:
        Corrupt: too many bytes, values or digits.
    """
    if len(content) > max_bytes:
        raise Corrupt(f"{len(content)} bytes, more than the {max_bytes} allowed", op="read json", key=key)
    if len(content) > MAX_VALUES:  # each value but the first has a comma, a bracket or a brace before it
        values = sum(map(content.count, (b",", b"[", b"{")))
        if values > MAX_VALUES:
            raise Corrupt(f"{values} values, more than the {MAX_VALUES} allowed", op="read json", key=key)
    if _TOO_LONG in content.translate(_DIGITS):
        raise Corrupt("a number too large for a double", op="read json", key=key)
