"""Run both fuzzers over every target for so many minutes in all. Exits 1 at the first fault, with its input saved.

    python -m tests.fuzz --minutes 10 [--target header ...] [--keep]

Half of the time goes to hypothesis, half to atheris. --keep adds to the corpus what reached new lines; then it is
minimised.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"
MAX_INPUT_BYTES = 8192
MAX_MEMORY_MB = 1024
MAX_SECONDS_OF_ONE = 10
START_S = 120.0  # that a fuzzer may take on top of its time, to start and to end


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz what parses a store's bytes.")
    parser.add_argument("--minutes", type=float, default=10.0, help="in all")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="only this one; may be repeated")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of hypothesis; libFuzzer takes it too")
    parser.add_argument("--out", type=Path, default=Path("fuzz_out"), help="where a failing input is saved")
    parser.add_argument("--keep", action="store_true", help="add what reached new lines to the corpus")
    options = parser.parse_args()
    targets = options.target or list(TARGETS)
    seconds = options.minutes * 60 / len(targets) / 2
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"seed {options.seed}; {seconds:.0f} s for each of 2 fuzzers on each of {len(targets)} targets", flush=True)
    failed = []
    for target in targets:
        if not _properties(target, seconds, options) or not _coverage_in_time(target, seconds, options):
            failed.append(target)
    print(f"{len(failed)} of {len(targets)} targets failed{': ' if failed else ''}{', '.join(failed)}")
    return 1 if failed else 0


def _properties(target: str, seconds: float, options: argparse.Namespace) -> bool:
    """Whether hypothesis found nothing."""
    words = [target, str(seconds), str(options.seed), str(options.out / f"{target}-hypothesis")]
    command = [sys.executable, "-m", "tests.fuzz.properties", *words]
    try:
        return subprocess.run(command, check=False, timeout=2 * seconds + START_S).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"{target}: hypothesis did not end", flush=True)
        return False


def _coverage_in_time(target: str, seconds: float, options: argparse.Namespace) -> bool:
    """Whether libFuzzer found nothing and ended."""
    try:
        return _coverage(target, seconds, options)
    except subprocess.TimeoutExpired:
        print(f"{target}: atheris did not end", flush=True)
        return False


def _coverage(target: str, seconds: float, options: argparse.Namespace) -> bool:
    """Whether libFuzzer found nothing. Its own lines are shown only where it did."""
    kept = CORPUS / target
    with tempfile.TemporaryDirectory(prefix="lorasync-fuzz-") as folder:
        found = subprocess.run(
            [
                *(sys.executable, "-m", "tests.fuzz.coverage", target, folder, str(kept)),
                f"-max_total_time={max(1, round(seconds))}",
                f"-seed={options.seed % 2**32}",
                f"-max_len={MAX_INPUT_BYTES}",
                f"-rss_limit_mb={MAX_MEMORY_MB}",
                f"-timeout={MAX_SECONDS_OF_ONE}",
                f"-artifact_prefix={options.out}/{target}-",
                "-print_final_stats=1",
            ],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=2 * seconds + START_S,
        )
        said = found.stdout + found.stderr
        executed = re.findall(r"number_of_executed_units: (\d+)", said) or re.findall(r"#(\d+)\s", said) or ["0"]
        covered = re.findall(r"cov: (\d+)", said) or ["0"]
        print(f"{target}: atheris {executed[-1]} inputs, {covered[-1]} branches, ", end="")
        if found.returncode:
            print(f"FAILED\n{said[-6000:]}", flush=True)
            return False
        print("no fault", flush=True)
        if options.keep:
            _minimise(target, Path(folder))
    return True


def _minimise(target: str, found: Path) -> None:
    """Keep in the corpus the smallest inputs that reach all that old and new ones reach together."""
    kept = CORPUS / target
    with tempfile.TemporaryDirectory(prefix="lorasync-fuzz-") as folder:
        words = [sys.executable, "-m", "tests.fuzz.coverage", target, "-merge=1", folder, str(kept), str(found)]
        subprocess.run([*words, "-max_len=2048"], capture_output=True, check=True)
        for old in kept.glob("*"):
            if not old.name.startswith("seed-"):
                old.unlink()
        seeds = {path.read_bytes() for path in kept.glob("seed-*")}
        for path in sorted(Path(folder).iterdir(), key=lambda path: path.stat().st_size):
            if path.read_bytes() not in seeds:
                (kept / path.name[:16]).write_bytes(path.read_bytes())


if __name__ == "__main__":
    sys.exit(main())
