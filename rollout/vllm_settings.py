"""What a vLLM server is started with, and what is refused before that.

The child gets this process's environment, plus `environment`. On a CPU two settings matter more than all flags: without
VLLM_ENABLE_V1_MULTIPROCESSING=0 the engine core spins on a core of its own while its worker computes (start 34 s
instead of 17 s, twice the CPU a token); without TORCHDYNAMO_DISABLE=1 the first request compiles for 3-19 s, and needs
a C++ compiler, for code that then runs no faster.
"""

import errno
import hashlib
import json
import socket
from importlib import metadata, util
from pathlib import Path

from shared.config import LoraConfig, ModelConfig, RolloutConfig
from shared.errors import UsageError

BASE_NAME = "base"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
MIN_LORAS = 2  # the version that serves and the one that comes
CPU_BLOCK_TOKENS = 128
MAX_KV_CACHE_BYTES = 1024**3  # more only if one sequence needs it


def arguments(model: ModelConfig, rollout: RolloutConfig) -> list[str]:
    """vLLM's flags. `rollout.engine_args` come last, so they win."""
    flags = {
        "model": model.path,
        "served-model-name": BASE_NAME,
        "host": rollout.host,
        "port": rollout.port,
        "dtype": model.dtype,
        "max-model-len": rollout.max_model_len,
        "max-num-seqs": rollout.max_num_seqs,
        "max-loras": rollout.max_loras,
        "max-cpu-loras": rollout.max_cpu_loras,
        "max-lora-rank": rollout.max_lora_rank,
        "seed": sampling_seed(rollout),
    }
    if is_cpu_build():
        flags["kv-cache-memory-bytes"] = kv_cache_bytes(model, rollout)
    pairs = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    switches = ["--enable-lora", "--disable-uvicorn-access-log"]
    if is_cpu_build():
        switches.append("--enforce-eager")  # nothing to capture, and what would be compiled runs no faster
    return [*pairs, *switches, *rollout.engine_args]


def kv_cache_bytes(model: ModelConfig, rollout: RolloutConfig) -> int:
    """KV cache for max_num_seqs sequences of max_model_len, or as many as fit a bound; resident from the start.

    Formula: layers x (K and V) x KV heads x head size x bytes a number, for every token of every block of 128, and one
    block more that vLLM keeps for itself.
    """
    config = json.loads((Path(model.path) / "config.json").read_text(encoding="utf-8"))
    head_dim = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or config["num_attention_heads"])
    number_bytes = {"float32": 4, "bfloat16": 2}[model.dtype]
    token_bytes = int(config["num_hidden_layers"]) * 2 * kv_heads * head_dim * number_bytes
    block_bytes = token_bytes * CPU_BLOCK_TOKENS
    sequence_bytes = -(-rollout.max_model_len // CPU_BLOCK_TOKENS) * block_bytes
    return max(sequence_bytes, min(rollout.max_num_seqs * sequence_bytes, MAX_KV_CACHE_BYTES)) + block_bytes


def sampling_seed(rollout: RolloutConfig) -> int:
    """The seed of requests without one. vLLM's own default is 0 everywhere: all nodes would draw the same samples."""
    digest = hashlib.sha256(f"{rollout.seed}/{rollout.node}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def environment(rollout: RolloutConfig) -> dict[str, str]:
    """What vLLM reads from the environment; no network but the server's own port."""
    settings = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(rollout.threads),
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",  # a user's own rollout/ in the working directory must not shadow ours
    }
    if is_cpu_build():
        settings |= {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # bound threads of two processes land on the same core
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "TORCHDYNAMO_DISABLE": "1",
        }
    return settings


def is_cpu_build() -> bool:
    """Whether the installed vLLM is one for CPUs, without importing it."""
    try:
        metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        return "+cpu" in metadata.version("vllm")
    return True


def check_settings(model: ModelConfig, lora: LoraConfig, rollout: RolloutConfig) -> None:
    """Refuse what vLLM would die of, minutes later and less clearly.

    Raises:
        UsageError: names the key and the way out.
    """
    op = "start engine"
    if util.find_spec("vllm") is None:
        raise UsageError("vLLM is not installed", op=op, hint="pip install 'lorasync[cpu]' (or [rollout] beside a GPU)")
    if not (Path(model.path) / "config.json").is_file():
        raise UsageError(
            "no base model there: config.json is missing",
            op=op,
            key=model.path,
            hint="Set model.path to a HF directory",
        )
    if rollout.max_lora_rank not in VLLM_RANKS:
        raise UsageError(
            f"vLLM takes max_lora_rank {', '.join(map(str, VLLM_RANKS))}, not {rollout.max_lora_rank}",
            op=op,
            key="rollout.max_lora_rank",
        )
    if lora.rank > rollout.max_lora_rank:
        enough = min((rank for rank in VLLM_RANKS if rank >= lora.rank), default=VLLM_RANKS[-1])
        raise UsageError(
            f"adapters of rank {lora.rank} do not fit rollout.max_lora_rank {rollout.max_lora_rank}",
            op=op,
            key="lora.rank",
            hint=f"Set rollout.max_lora_rank = {enough}",
        )
    if rollout.max_loras < MIN_LORAS:
        raise UsageError(
            f"rollout.max_loras must be at least {MIN_LORAS}, not {rollout.max_loras}",
            op=op,
            key="rollout.max_loras",
            hint="One version serves while the next one comes",
        )
    if rollout.max_cpu_loras < rollout.max_loras:
        raise UsageError(
            f"rollout.max_cpu_loras {rollout.max_cpu_loras} is below rollout.max_loras {rollout.max_loras}",
            op=op,
            key="rollout.max_cpu_loras",
            hint="It must hold every version that is listed",
        )


def check_port(host: str, port: int) -> None:
    """Refuse a port that somebody has.

    Raises:
        UsageError: taken, or not ours to take.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        raise UsageError(
            f"port {port} on {host} is {'taken' if taken else f'not to be had: {error.strerror}'}",
            op="start engine",
            key=f"{host}:{port}",
            hint="Set another rollout.port, or stop the program that listens there",
        ) from error
