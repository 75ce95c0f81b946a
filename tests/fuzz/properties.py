"""Bytes that are nearly right, for each target: what hypothesis draws, and running it for a number of seconds.

python -m tests.fuzz.properties TARGET SECONDS SEED FILE    the file: for an input that fails
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from .targets import TARGETS

Json = Any

GOLDEN = Path(__file__).parent.parent / "data" / "layout-1" / "store" / "policy"
EXAMPLES_AT_ONCE = 500

_NUMBERS = st.sampled_from([0, 1, 2, 4, -1, 2**31, 2**50, 2**50 + 1, 2**63, 10**30, 10**308, 10**309, 1.5, 1e308, True])
_TEXTS = st.sampled_from(
    ["", "BF16", "F32", "I64", "../x", "a", "0001-000001", "x" * 600, "\x1b[2J", "\ud800", "a" * 64]
)
_SCALARS = st.none() | st.booleans() | st.integers() | _NUMBERS | st.text(max_size=8) | _TEXTS
VALUES = st.recursive(
    _SCALARS | st.floats(), lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner)
)
_FIELDS = st.sampled_from(
    [
        *("layout", "uuid", "epoch", "version", "digest", "fate", "by", "reason", "at", "holder", "versions", "ttl_s"),
        *("node", "state", "served_since", "updated_at", "failures", "quarantined", "renew_s", "step", "steps"),
        *("training", "model", "path", "task", "lora", "rollout", "rolled_back_to", "mean_reward", "lineage"),
    ]
)


def _spelt(value: Json) -> bytes:
    """JSON with whatever surprises Python can write: NaN, half surrogates as escapes."""
    return json.dumps(value).encode()


def _changed(value: Json, path: list[int], new: Json) -> Json:
    """A copy in which what the numbers lead to is another value, or gone."""
    if not path or not isinstance(value, dict | list) or not value:
        return new
    step, rest = path[0] % len(value), path[1:]
    if isinstance(value, list):
        return [*value[:step], _changed(value[step], rest, new), *value[step + 1 :]]
    name = sorted(value)[step]
    if not rest and new == "gone":
        return {other: inner for other, inner in value.items() if other != name}
    return {**value, name: _changed(value[name], rest, new)}


@st.composite
def _manifests(draw: st.DrawFn) -> bytes:
    number = draw(st.sampled_from([0, 1]))
    body = json.loads((GOLDEN / f"manifests/00000001-{number:012d}.json").read_bytes())
    body["tensors"] = dict(sorted(body["tensors"].items())[:6])
    body["aliases"] = {alias: name for alias, name in body["aliases"].items() if name in body["tensors"]}
    for _ in range(draw(st.integers(0, 3))):
        path = draw(st.lists(st.integers(0, 200), min_size=1, max_size=5))
        body = _changed(body, path, draw(VALUES | st.just("gone")))
    return _spelt(body)


_ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F16", "I64", "", None]),
        "shape": st.lists(st.integers(0, 4) | _NUMBERS, max_size=9) | VALUES,
        "data_offsets": st.lists(st.integers(0, 16) | _NUMBERS, max_size=3) | VALUES,
    },
)


@st.composite
def _shards(draw: st.DrawFn) -> bytes:
    header: dict[str, Json] = {}
    start = 0
    for name in draw(st.lists(st.text("ab.@,0", max_size=6), max_size=4)):
        rows, columns = draw(st.integers(0, 3)), draw(st.integers(0, 3))
        header[name] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [start, start + 2 * rows * columns]}
        start += 2 * rows * columns
    header |= draw(st.dictionaries(st.text(max_size=5) | st.just("__metadata__"), _ENTRIES | VALUES, max_size=2))
    text = _spelt(header)
    length = draw(st.sampled_from([len(text)] * 6 + [0, len(text) + 1, 2**63, 2**64 - 1, 100_000_001]))
    return length.to_bytes(8, "little") + text + bytes(draw(st.sampled_from([start] * 4 + [0, start + 1])))


@st.composite
def _damaged(draw: st.DrawFn, whole: list[bytes]) -> bytes:
    content = bytearray(draw(st.sampled_from(whole)))
    for _ in range(draw(st.integers(1, 4))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.sampled_from([len(content)] * 5 + [len(content) // 2]))])


_OBJECTS = st.dictionaries(_FIELDS, VALUES, max_size=6).map(_spelt)


def inputs(target: str) -> st.SearchStrategy[bytes]:
    """What to draw for a target."""
    kept = [path.read_bytes() for path in sorted((Path(__file__).parent / "corpus" / target).iterdir())]
    return (
        _damaged(kept)
        | {
            "manifest": _manifests(),
            "sealed_manifest": _manifests(),
            "header": _shards(),
            "strict": _OBJECTS | st.binary(max_size=60),
            "small_objects": _OBJECTS,
            "trajectory": st.binary(max_size=60),
        }[target]
    )


def run(target: str, examples: int, profile: settings, number: int | None = None, failing: Path | None = None) -> None:
    """Hold a target against so many inputs.

    Args:
        number: a seed; None: the profile's own way, which is derandomized in the tests.
        failing: where an input that fails is written; the last one is the smallest.
    """

    @settings(profile, max_examples=examples)
    @given(inputs(target))
    def check(content: bytes) -> None:
        try:
            TARGETS[target](content)
        except BaseException:
            if failing is not None:
                failing.write_bytes(content)
            raise

    (seed(number)(check) if number is not None else check)()


PROFILE = settings(
    deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck), print_blob=False
)


def main(target: str, seconds: float, first_seed: int, failing: Path) -> None:
    """Run until the time is up; prints how many inputs there were and, before it fails, the seed."""
    profile = settings(PROFILE, derandomize=False, phases=[Phase.generate, Phase.shrink])
    until, done, number = time.monotonic() + seconds, 0, first_seed
    while time.monotonic() < until:
        try:
            run(target, EXAMPLES_AT_ONCE, profile, number, failing)
        except BaseException:
            print(f"{target}: hypothesis failed with seed {number}, input in {failing}", flush=True)
            raise
        done, number = done + EXAMPLES_AT_ONCE, number + 1
    print(f"{target}: hypothesis {done} inputs, seeds {first_seed}..{number - 1}, no fault", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
