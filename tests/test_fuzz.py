"""The fuzzers' targets in the normal run: every kept input again, and some hundred drawn ones, always the same.

For longer: make fuzz MINUTES=10.
"""

from pathlib import Path

import pytest
from fuzz.properties import PROFILE, run
from fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "fuzz" / "corpus"
KEPT = sorted(CORPUS.glob("*/*"))
EXAMPLES = 60


def test_the_corpus_is_small_and_each_target_has_seeds():
    assert len(KEPT) < 300 and sum(path.stat().st_size for path in KEPT) < 1_000_000
    assert {path.parent.name for path in KEPT if path.name.startswith("seed-")} == set(TARGETS)


@pytest.mark.parametrize("target", TARGETS)
def test_every_kept_input_is_read_or_corrupt_and_nothing_else(target: str):
    for path in (path for path in KEPT if path.parent.name == target):
        try:
            TARGETS[target](path.read_bytes())
        except Exception as error:
            error.add_note(f"input: {path}")
            raise


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_nearly_right_is_read_or_corrupt_and_nothing_else(target: str):
    run(target, EXAMPLES, PROFILE)
