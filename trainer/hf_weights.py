"""The base model's weights: Hugging Face safetensors into Megatron-Core, and a digest that proves they never change.

Promises: every parameter of the model is set exactly once and every tensor of the checkpoint is one the model type has;
anything missing, extra or of another shape is an error before training starts. Reads safetensors only, never pickle.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from shared.errors import Corrupt, UsageError
from trainer.model import family_of, placement

_OP = "load base model"


class HfCheckpoint:
    """The tensors of a directory, one file or many behind an index, read one at a time.

    checkpoint = HfCheckpoint(hf_dir)
    checkpoint.read("model.norm.weight")
    """

    def __init__(self, hf_dir: str | Path) -> None:
        folder, index = Path(hf_dir), Path(hf_dir) / "model.safetensors.index.json"
        try:
            if index.exists():
                file_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                files = {name: folder / name for name in sorted(set(file_of.values()))}
                self._open = {name: safe_open(path, framework="pt") for name, path in files.items()}
                self._file_of: dict[str, Any] = {name: self._open[file] for name, file in file_of.items()}
            else:
                single: Any = safe_open(folder / "model.safetensors", framework="pt")
                self._file_of = dict.fromkeys(single.keys(), single)
        except FileNotFoundError as error:
            raise UsageError("no safetensors checkpoint", op=_OP, key=str(hf_dir), hint=str(error)) from error
        except OSError as error:
            problem = f"cannot read the checkpoint: {error.strerror or error}"
            raise UsageError(problem, op=_OP, key=str(error.filename or hf_dir)) from error
        except (SafetensorError, ValueError, KeyError, AttributeError) as error:
            raise Corrupt(f"unreadable checkpoint: {error}", op=_OP, key=str(hf_dir)) from error

    def names(self) -> set[str]:
        """List the tensors."""
        return set(self._file_of)

    def read(self, name: str) -> Tensor:
        """Read one tensor, in its own dtype, on the CPU.

        Raises:
            Corrupt: the index names a file that does not hold it.
        """
        try:
            tensor: Tensor = self._file_of[name].get_tensor(name)
        except (SafetensorError, KeyError) as error:
            raise Corrupt("tensor is missing", op=_OP, key=name) from error
        return tensor


@torch.no_grad()
def load_base(model: nn.Module, hf_config: Mapping[str, Any], hf_dir: str | Path) -> None:
    """Fill a model fresh from `build_model`, before LoRA is attached; values are cast to the model's dtype.

    Raises:
        UsageError: no checkpoint in the directory.
        Corrupt: a tensor is missing, extra, of another shape, or unreadable.
    """
    family, checkpoint, place = family_of(hf_config), HfCheckpoint(hf_dir), placement(model)
    expected = family.tensor_names(hf_config)
    if wrong := sorted(expected ^ checkpoint.names()):
        what = "missing" if wrong[0] in expected else "not part of this model type"
        raise Corrupt(f"tensor {what} ({len(wrong)} such names)", op=_OP, key=wrong[0])
    for name, parameter in model.named_parameters():
        value = family.parameter(name, hf_config, place, checkpoint.read)
        if value.shape != parameter.shape:
            raise Corrupt(f"shape {tuple(value.shape)}, config.json says {tuple(parameter.shape)}", op=_OP, key=name)
        parameter.copy_(value)


def base_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the base model's parameters under their names without LoRA, in name order."""
    plain = ((name.replace(".base.", "."), p) for name, p in model.named_parameters() if ".lora_" not in name)
    return iter(sorted(plain, key=lambda item: item[0]))


def base_digest(model: nn.Module) -> str:
    """Digest this rank's base parameters: sha256 over names and raw bytes in name order. LoRA changes nothing in it."""
    digest = hashlib.sha256()
    for name, parameter in base_parameters(model):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
