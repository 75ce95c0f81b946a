"""A version's name: the pair (epoch, number), ordered as a pair, immutable, never reused.

Text form, everywhere the same: `0001-000012` (epoch, number). An engine serves it as `policy@0001-000012`.
"""

import re
from typing import NamedTuple

from shared.errors import UsageError

_TEXT = re.compile(r"(\d{1,8})-(\d{1,12})")
_SERVED = re.compile(r"([A-Za-z0-9_.\-]+)@(\d{1,8}-\d{1,12})")

ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}")


class Version(NamedTuple):
    """(epoch, number). `str(Version.parse(str(v))) == str(v)`."""

    epoch: int
    number: int

    def __str__(self) -> str:
        return f"{self.epoch:04d}-{self.number:06d}"

    @classmethod
    def parse(cls, text: str) -> "Version":
        """Read the text form.

        Raises:
            UsageError: not of the form EPOCH-NUMBER.
        """
        match = _TEXT.fullmatch(text)
        if not match:
            raise UsageError(f"not a version: {text!r}", hint="Write EPOCH-NUMBER, such as 0001-000012")
        return cls(int(match[1]), int(match[2]))


def served_name(adapter: str, version: Version) -> str:
    """The immutable name under which an engine serves a version."""
    return f"{adapter}@{version}"


def parse_served_name(name: str) -> tuple[str, Version] | None:
    """The inverse of `served_name`; None for any other name."""
    match = _SERVED.fullmatch(name)
    return (match[1], Version.parse(match[2])) if match else None
