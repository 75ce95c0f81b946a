"""Publishes the synthetic adapter in a process of its own, a version every so often; damages some on their way.

python fleet_publisher.py FOLDER '{"readers": ...}'       # reader_fleet.Plan; waits for FOLDER/ready
"""

import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from reader_fleet import Plan
from synthetic import BASE, factors, open_publisher, write_base

from publisher.convert import convert
from publisher.publisher import Published
from shared.layout import version_of
from shared.local_store import LocalStore


class Damaging(LocalStore):
    """Flips a bit in the last chunk of some versions' shards: what arrives is not what was digested."""

    numbers: frozenset[int] = frozenset()

    def put_stream(self, key: str, chunks: Iterable[bytes | memoryview], size: int) -> None:
        version = version_of(key)
        if version is not None and version.number in self.numbers:
            content = bytearray(b"".join(chunks))
            content[-3] ^= 4
            chunks = [bytes(content)]
        super().put_stream(key, chunks, size)


def main() -> None:
    folder, plan = Path(sys.argv[1]), Plan(**json.loads(sys.argv[2]))
    store = Damaging(f"file://{folder / 'store'}")
    store.numbers = frozenset(plan.damaged_numbers())
    at: dict[int, float] = {}

    def note(published: Published) -> None:
        at[published.version.number] = time.monotonic()

    publisher = open_publisher(store, write_base(folder / "base"), on_published=note)
    slices = [list(convert(BASE, factors(number))) for number in range(plan.versions)]
    while not (folder / "ready").exists():
        time.sleep(0.01)
    began = time.monotonic()
    for number, pieces in enumerate(slices):
        time.sleep(max(0.0, began + number * plan.interval_s - time.monotonic()))
        publisher.submit(number, pieces, training={"step": number})
    publisher.close()
    aside = folder / ".published.json"
    aside.write_text(json.dumps({"at": at, "seconds": at[plan.versions - 1] - began}))
    aside.replace(folder / "published.json")


if __name__ == "__main__":
    main()
