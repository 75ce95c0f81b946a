"""Every error that lorasync lets out, in one tree.

    LorasyncError                 exit 1
    ├── UsageError                exit 2   the caller's: a flag, a configuration key, a path, a port
    ├── StoreError                exit 1   the store's: unreachable, refused, wrong credentials (retryable says which)
    │   ├── StoreUnfit            exit 1   the store cannot keep the protocol (no put-if-absent, stale lists)
    │   └── KeyMissing            exit 1   no such object; in mid-download: the version expired, look again
    ├── Fenced                    exit 3   another trainer owns a newer epoch: stop, do not retry
    ├── Corrupt                   exit 4   bytes that do not match their digest, header, shape or name set
    │   ├── WrongBase             exit 4   an adapter made for another base model
    │   └── Untrusted             exit 4   a version that no trusted key signed
    ├── EngineError               exit 1   the serving engine died, refused a load or answered nonsense
    │   └── NotProven             exit 1   the engine loaded a version, and its canary disagrees
    └── NotConverged              exit 1   the program ran and its result misses its bound (demo, replay)

A boundary lets out one type; what lies below arrives as `cause`. Each error says what was done (`op`), to what (`key`,
`version`), and what to do next (`hint`), and whether the same call may succeed later (`retryable`).
"""

from typing import ClassVar

MAX_MESSAGE_LENGTH = 1000  # characters; what comes from a store may be in it


class LorasyncError(Exception):
    """Base of the tree.

    Args:
        message: what is wrong, in one sentence.
        op: the operation under way, as a verb phrase ("put manifest").
        key: the object, file, field or port it was about.
        version: the version's name ("0001-000012") where one is involved.
        hint: the way out.
        retryable: whether the same call may succeed later with nothing changed.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        message: str,
        *,
        op: str = "",
        key: str = "",
        version: str = "",
        hint: str = "",
        retryable: bool = False,
    ) -> None:
        if len(message) > MAX_MESSAGE_LENGTH:
            message = message[:MAX_MESSAGE_LENGTH] + " ..."
        super().__init__(message)
        self.message, self.op, self.key, self.version = message, op, key, version
        self.hint, self.retryable = hint, retryable

    def __str__(self) -> str:
        """One line: operation, message, key, version, hint. The key is left out where the message has it.

        Control characters and half surrogates are spelt out, for names from a store could hold a terminal's commands.
        """
        head = f"{self.op}: {self.message}" if self.op else self.message
        facts = [f"{k}={v}" for k, v in (("key", self.key), ("version", self.version)) if v and v not in head]
        tail = f" [{', '.join(facts)}]" if facts else ""
        line = f"{head}{tail}. {self.hint}" if self.hint else head + tail
        if line.isprintable():
            return line
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


class UsageError(LorasyncError):
    """The caller's mistake: a flag, a configuration key, a path, a port."""

    exit_code = 2


class StoreError(LorasyncError):
    """The store did not do what was asked; `retryable` tells a passing fault from a lasting one."""


class StoreUnfit(StoreError):
    """The store cannot keep the commit protocol and is refused at start."""


class KeyMissing(StoreError):
    """No object under that key."""


class Fenced(LorasyncError):
    """A newer epoch exists: this trainer's life is over."""

    exit_code = 3


class Corrupt(LorasyncError):
    """Bytes that do not match what was promised of them. Never retried, never loaded: quarantined."""

    exit_code = 4


class WrongBase(Corrupt):
    """The adapter was made for another base model."""


class Untrusted(Corrupt):
    """No trusted key signed the version."""


class EngineError(LorasyncError):
    """The serving engine is gone, refused, or answered nonsense."""


class NotProven(EngineError):
    """The engine says it loaded the version; its answers say otherwise."""


class NotConverged(LorasyncError):
    """Everything ran, and the result misses its stated bound."""
