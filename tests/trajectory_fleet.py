"""A stand-in for a rollout fleet: watches an adapter's versions and puts trajectories for each, like a sampler.

Completions, log-probabilities and rewards depend on the version's number, the sequence and the seed alone, so two runs
over the same numbers are fed the same bytes. Everything goes through the real store and catalog.
"""

import random
import threading
from dataclasses import dataclass, field
from typing import Any

from shared.catalog import Catalog
from shared.store import Store
from shared.trajectories import Sample, encode
from shared.versions import Version

GOOD_TOKEN = 7  # the reward is its share among the generated tokens


def make_group(version: Version, name: str, rng: random.Random, size: int = 4, **changes: Any) -> list[Sample]:
    """One group of random completions over a vocabulary of 128."""
    prompt = tuple(rng.randrange(3, 98) for _ in range(rng.randrange(3, 7)))
    samples = []
    for _ in range(size):
        tokens = tuple(rng.choice((GOOD_TOKEN, rng.randrange(3, 98))) for _ in range(rng.randrange(2, 6)))
        values: dict[str, Any] = {
            "group": name,
            "prompt_id": name,
            "prompt_tokens": prompt,
            "tokens": tokens,
            "logprobs": tuple(-4.0 - rng.random() for _ in tokens),
            "token_versions": (version,) * len(tokens),
            "reward": tokens.count(GOOD_TOKEN) / len(tokens),
            "finished": True,
            "node": "node-0",
        }
        samples.append(Sample(**(values | changes)))
    return samples


def put_groups(store: Store, adapter: str, version: Version, file: str, groups: list[list[Sample]]) -> str:
    """Put one trajectory file; its key."""
    key = f"{Catalog(store, adapter).layout.trajectories(version)}/{file}-g{len(groups)}.parquet"
    store.put_if_absent(key, encode([sample for group in groups for sample in group]))
    return key


@dataclass
class Fleet:
    """Feeds every new version of an adapter with `groups_per_version` groups, until it leaves the `with` block."""

    store: Store
    adapter: str
    groups_per_version: int
    group_size: int = 4
    seed: int = 0
    last_number: int | None = None  # feeds no version of a higher number
    seen: list[Version] = field(default_factory=list)

    def __enter__(self) -> "Fleet":
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        catalog = Catalog(self.store, self.adapter)
        while not self._stopping.is_set():
            for version in catalog.versions():
                if version not in self.seen:
                    self.seen.append(version)
                    if self.last_number is None or version.number <= self.last_number:
                        self.feed(version)
            self._stopping.wait(0.02)

    def feed(self, version: Version) -> None:
        """Put the groups that belong to a version's number."""
        rng = random.Random(f"{self.seed}/{version.number}")
        names = [f"{version.number}-{i}" for i in range(self.groups_per_version)]
        groups = [make_group(version, name, rng, self.group_size) for name in names]
        put_groups(self.store, self.adapter, version, "node-0-life-000000", groups)
