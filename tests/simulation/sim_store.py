"""A store over a dict: strongly consistent, as the protocol demands, and faulty in every way that the protocol allows.

Each actor has its own `SimStore`, its connection to the one `Bucket`. What a call does to the bucket happens in one
step; between the call and its effect, and between the effect and its answer, others go on.
"""

import math
import random
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from typing import Protocol, TypeVar

from shared.errors import Corrupt, KeyMissing, StoreError
from shared.manifest import VOID
from shared.store import Entry, Fetched, check_key

from .scheduler import EPOCH_S, Scheduler
from .weather import CALM

Result = TypeVar("Result")

STALL_S = 60.0  # that a hanging request takes at most
LATE_S = 60.0  # seconds after which a request that timed out may still be carried out
HISTORY = 5  # writes by which a replayed LATEST may lag


@dataclass(frozen=True)
class Object:
    """What stands under a key."""

    content: bytes
    tag: str
    modified: float  # as the store tells it, by its own clock


class Observer(Protocol):
    """Told of every change of the bucket and of every manifest read, in the step in which it happens."""

    def wrote(self, actor: str, key: str, before: Object | None, after: Object) -> None: ...

    def deleted(self, actor: str, key: str, before: Object) -> None: ...

    def read(self, actor: str, key: str, content: bytes) -> None: ...


class Bucket:
    """The objects, and what every connection shares."""

    def __init__(self, scheduler: Scheduler, skew_s: float) -> None:
        self.scheduler, self.skew_s = scheduler, skew_s
        self.weather = CALM
        self.observer: Observer | None = None
        self.objects: dict[str, Object] = {}
        self.unfinished: dict[str, float] = {}  # what killed writers left, and since when
        self.hints: list[Object] = []  # LATEST's past
        self.reply_s = 0.2  # that a request or an answer takes at most
        self.whole_seconds = False  # whether it tells the times of objects in whole seconds, as S3 does
        self.in_pages = True  # whether a listing goes in the order of keys
        self._writes = 0

    def clock(self) -> float:
        return EPOCH_S + self.scheduler.now + self.skew_s

    def write(self, actor: str, key: str, content: bytes) -> None:
        self._writes += 1
        modified = math.floor(self.clock()) if self.whole_seconds else self.clock()
        before, after = self.objects.get(key), Object(content, str(self._writes), modified)
        self.objects[key] = after
        if key.endswith("/LATEST"):
            self.hints = [*self.hints[-HISTORY:], after]
        if self.observer:
            self.observer.wrote(actor, key, before, after)

    def delete(self, actor: str, key: str) -> None:
        before = self.objects.pop(key, None)
        if before is not None and self.observer:
            self.observer.deleted(actor, key, before)


class SimStore:
    """See `shared.store.Store`. `flipped` has the keys whose bytes came damaged since the reader cleared it."""

    def __init__(self, bucket: Bucket, actor: str, *, reads_flip: bool = False) -> None:
        self.url = "sim://bucket"
        self.flipped: list[str] = []
        self._bucket, self._actor, self._reads_flip = bucket, actor, reads_flip
        self._scheduler = bucket.scheduler
        self._rng: random.Random = bucket.scheduler.rng

    def get(self, key: str, max_bytes: int | None = None) -> bytes:
        def read() -> bytes:
            content = self._limited(key, max_bytes).content
            if self._bucket.observer:
                self._bucket.observer.read(self._actor, key, content)
            return content

        return self._read("get", key, read)

    def get_range(self, key: str, start: int, end: int) -> bytes:
        return self._read("get range", key, lambda: self._object(key).content[start:end])

    def get_if_changed(self, key: str, tag: str, max_bytes: int | None = None) -> Fetched | None:
        def read() -> Fetched | None:
            found = self._limited(key, max_bytes)
            if key.endswith("/LATEST") and self._happens(self._bucket.weather.old_hint):
                found = self._rng.choice(self._bucket.hints)
            return None if found.tag == tag else Fetched(found.content, found.tag)

        return self._call("get if changed", key, read)

    def put(self, key: str, content: bytes) -> None:
        self._write("put", key, lambda: self._bucket.write(self._actor, key, content))

    def put_if_absent(self, key: str, content: bytes) -> bool:
        def write() -> bool:
            standing = self._bucket.objects.get(key)
            if standing is None:
                self._bucket.write(self._actor, key, content)
            return standing is None or standing.content == content

        return self._write("put if absent", key, write)

    def put_stream(self, key: str, chunks: Iterable[bytes | memoryview], size: int) -> None:
        content = b"".join(chunks)
        if len(content) != size:
            raise StoreError(f"{len(content)} bytes of {size}", op="put", key=key)
        aside = f"{key}.{self._rng.random()}"
        self._bucket.unfinished[aside] = self._bucket.clock()
        self._scheduler.switch(self._rng.random() * self._bucket.reply_s)

        def write() -> None:
            self._bucket.unfinished.pop(aside, None)
            self._bucket.write(self._actor, key, content)

        try:
            self._write("put stream", key, write)
        except StoreError:
            self._bucket.unfinished.pop(aside, None)
            raise

    def list(self, prefix: str, after: str = "") -> list[Entry]:
        def look() -> dict[str, Entry]:
            found = [item for item in self._bucket.objects.items() if item[0] > after and item[0].startswith(folder)]
            return {key: Entry(key, len(object_.content), object_.modified) for key, object_ in found}

        folder = f"{prefix}/" if prefix else ""
        seen = self._call("list", prefix, look)
        if self._happens(self._bucket.weather.tear_listing):
            later = self._call("list on", prefix, look)
            from_later = self._torn(seen.keys() | later.keys())
            seen = {key: entry for key, entry in seen.items() if key not in from_later}
            seen |= {key: entry for key, entry in later.items() if key in from_later}
        return [seen[key] for key in sorted(seen)]

    def _torn(self, keys: Set[str]) -> Set[str]:
        """The keys that a listing came to later: those of its second page, or any, as readdir may."""
        ordered = sorted(keys)
        if self._bucket.in_pages:
            return set(ordered[self._rng.randint(0, len(ordered)) :])
        return {key for key in ordered if self._rng.random() < 0.5}

    def delete(self, key: str) -> None:
        self._write("delete", key, lambda: self._bucket.delete(self._actor, key))

    def sweep(self, prefix: str, older_than_s: float) -> int:
        def remove() -> int:
            now, unfinished = self._bucket.clock(), self._bucket.unfinished
            old = [k for k, began in unfinished.items() if k.startswith(f"{prefix}/") and now - began > older_than_s]
            for key in old:
                del unfinished[key]
            return len(old)

        return self._write("sweep", prefix, remove)

    def _object(self, key: str) -> Object:
        found = self._bucket.objects.get(key)
        if found is None:
            raise KeyMissing("no such object", op="get", key=key)
        return found

    def _limited(self, key: str, max_bytes: int | None) -> Object:
        found = self._object(key)
        if max_bytes is not None and len(found.content) > max_bytes:
            raise Corrupt(f"more than the {max_bytes} bytes allowed", op="get", key=key)
        return found

    def _happens(self, probability: float) -> bool:
        return probability > 0.0 and self._rng.random() < probability

    def _read(self, op: str, key: str, effect: Callable[[], bytes]) -> bytes:
        content = self._call(op, key, effect)
        carries_version = "/data/" in key or "/manifests/" in key
        if self._reads_flip and carries_version and content and self._happens(self._bucket.weather.flip):
            at = self._rng.randrange(len(content))
            content = content[:at] + bytes([content[at] ^ 1 << self._rng.randrange(8)]) + content[at + 1 :]
            self.flipped.append(key)
            self._scheduler.note(self._actor, "bit flipped", key, str(at))
        return content

    def _write(self, op: str, key: str, effect: Callable[[], Result]) -> Result:
        if self._happens(self._bucket.weather.late):
            self._scheduler.switch()
            self._later(op, key, effect)
            self._scheduler.note(self._actor, op, key, "no answer, comes late")
            raise StoreError("timed out", op=op, key=key, retryable=True)
        if self._happens(self._bucket.weather.twice):
            result = self._call(op, key, effect)
            self._later(op, key, effect)
            return result
        return self._call(op, key, effect)

    def _later(self, op: str, key: str, effect: Callable[[], object]) -> None:
        """Let a request be carried out some time from now, whatever became of who sent it."""

        def carry_out() -> None:
            self._scheduler.note(self._actor, f"late {op}", key, str(effect()))

        delay_s = self._rng.random() * LATE_S
        self._scheduler.spawn(f"{self._actor}'s late {op}", carry_out, delay_s=delay_s)

    def _call(self, op: str, key: str, effect: Callable[[], Result]) -> Result:
        if key:
            check_key(key)
        weather = self._bucket.weather
        stalls = "/manifests/" in key and self._happens(weather.stall)
        self._scheduler.switch(self._rng.random() * (STALL_S if stalls else self._bucket.reply_s))
        if self._happens(weather.refuse):
            self._scheduler.note(self._actor, op, key, "refused")
            raise StoreError("503", op=op, key=key, retryable=True)
        try:
            result = effect()
        except (KeyMissing, Corrupt) as error:
            self._scheduler.note(self._actor, op, key, error.message)
            self._scheduler.switch(self._rng.random() * self._bucket.reply_s)
            raise
        lost = self._happens(weather.lose_reply)
        self._scheduler.note(self._actor, op, key, "answer lost" if lost else _said(result))
        self._scheduler.switch(self._rng.random() * self._bucket.reply_s)
        if lost:
            raise StoreError("connection reset", op=op, key=key, retryable=True)
        return result


def _said(result: object) -> str:
    if isinstance(result, dict):
        return f"{len(result)} listed"
    if isinstance(result, bytes):
        return "void" if result == VOID else "read"
    if isinstance(result, Fetched):
        return f"tag {result.tag}"
    return "done" if result is None else str(result)
