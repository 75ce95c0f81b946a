"""Which base model an adapter belongs to: its config and the bytes of its weights, on both sides of the store.

The identity is a digest over the model's numbers, not its path or name, so a trainer and an engine on different
hosts agree exactly when they hold the same files. It reads every weight once (1 GB/s a thread); ask once per process.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shared.errors import Corrupt, UsageError, WrongBase

READ_BYTES = 16 << 20

# What changes no number: where it came from, and by which library version.
_IGNORED = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "use_cache")


@dataclass(frozen=True)
class BaseIdentity:
    """model_type for people, two sha256 hex digests for machines."""

    model_type: str
    config_sha256: str
    weights_sha256: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def demand(self, other: "BaseIdentity", *, version: str) -> None:
        """Check that an adapter made for `other` fits this base.

        Raises:
            WrongBase: says which part differs.
        """
        for part in ("model_type", "config_sha256", "weights_sha256"):
            ours, theirs = getattr(self, part), getattr(other, part)
            if ours != theirs:
                raise WrongBase(
                    f"adapter made for another base model: {part} is {theirs[:16]}, ours is {ours[:16]}",
                    op="check base model",
                    version=version,
                    hint="Point model.path at the trainer's base model",
                )


def read_base_config(path: str | Path) -> dict[str, Any]:
    """The base model's config.json.

    Raises:
        UsageError: no such directory or file.
        Corrupt: not a JSON object.
    """
    file = Path(path) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = "model.path must be a Hugging Face model directory"
        raise UsageError("no config.json in the base model", op="read base model", key=str(path), hint=hint) from None
    except OSError as error:
        raise UsageError(f"cannot read config.json: {error.strerror}", op="read base model", key=str(path)) from error
    except ValueError as error:
        raise Corrupt(f"config.json is not JSON: {error}", op="read base model", key=str(file)) from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise Corrupt("config.json has no model_type", op="read base model", key=str(file))
    if "num_local_experts" in config:  # transformers 5 saves num_experts of a Qwen3-MoE under this name
        config.setdefault("num_experts", config["num_local_experts"])
    return config


def identify(path: str | Path) -> BaseIdentity:
    """Digest a base model directory.

    Raises:
        UsageError: no config.json or no *.safetensors there, or one that can't be read.
    """
    config = read_base_config(path)
    kept = {k: v for k, v in config.items() if k not in _IGNORED}
    files = sorted(Path(path).glob("*.safetensors"))
    if not files:
        raise UsageError("no *.safetensors in the base model", op="read base model", key=str(path))
    digest = hashlib.sha256()
    for file in files:
        try:
            with file.open("rb") as stream:
                while chunk := stream.read(READ_BYTES):
                    digest.update(chunk)
        except OSError as error:
            problem = f"cannot read {file.name}: {error.strerror or error}"
            raise UsageError(problem, op="read base model", key=str(file)) from error
    config_digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    return BaseIdentity(str(config["model_type"]), config_digest, digest.hexdigest())
