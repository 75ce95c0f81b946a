"""Are the log-probabilities in trajectories those of the version that stands beside them?

Each version is fetched from the store again, loaded under a name that the run never used, and asked to score the very
tokens. A token that another version made, or a mix of two, would be off by far more than rounding.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from engine_fixtures import loaded

from rollout.engine import Engine
from shared.base_model import read_base_config
from shared.catalog import Catalog
from shared.fetch import fetch
from shared.peft_names import expected_tensors
from shared.trajectories import Sample
from shared.versions import Version

ROUNDING = 1e-3  # nats, in fp32; measured: 2e-6 to 2e-5


def score_under(
    version: Version, catalog: Catalog, engine: Engine, base: str, scratch: Path, sequences: Sequence[Sequence[int]]
) -> list[list[float]]:
    """Log-probabilities of all tokens but the first of every sequence, under a version read from the store."""
    manifest = catalog.manifest(version)
    expected = expected_tensors(read_base_config(base), manifest.lora.targets, manifest.lora.rank)
    directory = fetch(catalog.store, manifest, expected, scratch / str(version), base_name="base")
    with loaded(engine, directory) as name:
        return engine.score(name, sequences)


def largest_gap(given: Sequence[Sequence[float]], scored: Sequence[Sequence[float]]) -> float:
    """In nats, between log-probabilities of completions and the ends of whole sequences' scores."""
    gaps = [np.abs(np.subtract(row, whole[-len(row) :])).max() for row, whole in zip(given, scored, strict=True)]
    return float(max(gaps))


def gap_by_version(
    samples: Sequence[Sample], catalog: Catalog, engine: Engine, base: str, scratch: Path
) -> dict[Version, float]:
    """For every version that made a token: the largest gap between recorded and scored log-probabilities, in nats."""
    by_version: dict[Version, list[Sample]] = {}
    for sample in samples:
        [version] = set(sample.token_versions)
        by_version.setdefault(version, []).append(sample)
    return {
        version: largest_gap(
            [sample.logprobs for sample in made],
            score_under(version, catalog, engine, base, scratch, [[*s.prompt_tokens, *s.tokens] for s in made]),
        )
        for version, made in sorted(by_version.items())
    }
