"""A real vLLM server for the whole session, and adapters to load into it.

The server takes 20-40 s to start, so tests share it: each loads under names of its own and unloads what it loaded.
"""

import itertools
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from safetensors.torch import save_file
from tiny_model import random_adapter

from rollout.engine import Engine, VllmEngine
from rollout.vllm_server import VllmServer
from shared.config import LoraConfig, ModelConfig, RolloutConfig

_numbers = itertools.count()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], bool], deadline_s: float) -> None:
    """Return as soon as the condition holds."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"not within {deadline_s} s"
        time.sleep(0.05)


def group_members(group: int) -> list[str]:
    """Command lines of the living processes of a process group."""
    members = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                members.append(" ".join(process.cmdline())[:80])
        except (psutil.Error, ProcessLookupError):
            continue
    return members


@pytest.fixture(scope="session")
def vllm_server(tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    """A healthy server of the tiny model in fp32, LoRA on, on a free port.

    Its model "recommends" greedy decoding, as real ones recommend top_k = 20: what we sample must not heed that.
    """
    log_path = tmp_path_factory.mktemp("vllm") / "vllm.log"
    recommended = ("--override-generation-config", '{"top_k": 1}')  # as if it stood in generation_config.json
    rollout = RolloutConfig(
        port=free_port(), start_timeout_s=240, max_model_len=128, max_num_seqs=64, engine_args=recommended
    )
    with VllmServer(ModelConfig(str(tiny_hf)), LoraConfig(), rollout, log_path) as server:
        server.start()
        yield server


@pytest.fixture(scope="session")
def vllm_engine(vllm_server: VllmServer) -> VllmEngine:
    """A client to the session's server."""
    return vllm_server.engine()


def write_adapter(
    directory: Path, tiny_hf: Path, targets: tuple[str, ...], *, seed: int, rank: int = 8, alpha: int = 16
) -> Path:
    """Save a random adapter as a PEFT directory with one tensor per expert."""
    directory.mkdir(parents=True)
    tensors = {name: value.clone() for name, value in random_adapter(tiny_hf, targets, rank, seed).items()}
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": ["q_proj"], "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


@contextmanager
def loaded(engine: Engine, directory: Path) -> Iterator[str]:
    """Load a directory under a name that no other test has; unload it at the end."""
    name = f"test@{next(_numbers):04d}"
    engine.load(name, str(directory))
    try:
        yield name
    finally:
        if name in engine.models():
            engine.unload(name)
