"""docs/scale.md shows what benchmarks/fleet.py prints."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # benchmarks/ is no part of the distribution

from benchmarks.fleet import BEGIN, END, PAGE, tables


def test_the_documented_tables_are_what_the_benchmark_prints() -> None:
    documented = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert documented == "\n".join(tables()) + "\n", "write them anew: python -m benchmarks.fleet --write"
