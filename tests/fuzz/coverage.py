"""One target under libFuzzer, in a process of its own: `python -m tests.fuzz.coverage TARGET [libFuzzer's arguments]`.

Our parsers are instrumented, so an input that reaches another branch is kept and changed further. libFuzzer ends the
process itself, with the input that failed in its artifact file.
"""

import shlex
import sys

import atheris

INSTRUMENTED = [
    "shared.adapter_files",
    "shared.catalog",
    "shared.coverage",
    "shared.fates",
    "shared.leases",
    "shared.manifest",
    "shared.parquet_bounds",
    "shared.run_record",
    "shared.status",
    "shared.strict_json",
    "shared.tensor_table",
    "shared.thrift_compact",
    "shared.trajectories",
    "shared.versions",
    "json",  # the pure Python parts only; its scanner is in C
]

with atheris.instrument_imports(include=INSTRUMENTED):
    from .targets import TARGETS


def main() -> None:
    """Hand over to libFuzzer; does not return."""
    name = sys.argv[1]
    again = shlex.join([sys.executable, "-m", "tests.fuzz.coverage", name])  # a merge starts itself, through a shell
    atheris.Setup([again, *sys.argv[2:]], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
