"""LoRA on Megatron-Core's linear layers: attention and every expert, the base frozen.

Megatron fuses q, k, v into linear_qkv and gate, up into linear_fc1, so each of those has one A [r, in] and one B over
the fused rows. Over tensor-parallel ranks, a column-parallel base has A whole and B cut by rows, a row-parallel base A
cut by columns and B whole.

Promises: initial values depend on the seed and the module's global name alone, so every layout starts from the same
adapter; factors are fp32 whatever the base; after `attach` only factors require a gradient. Does not: merge them, or
name them for anyone else (publisher.convert does).

    count = attach(model, targets=("linear_qkv", "linear_fc1"), rank=8, alpha=16, seed=0)
    for lora in named_lora(model): ...
"""

import hashlib
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from publisher.convert import MegatronLora
from shared.config import ALL_LINEAR
from shared.errors import UsageError
from trainer.model import placement


class LoraLinear(nn.Module):
    """base(x) + (alpha / r) B A x, in the place of a Megatron ColumnParallelLinear or RowParallelLinear.

    Args:
        base: the layer, kept as it is.
        name: the module's global name, from which A is drawn.
    """

    def __init__(self, base: nn.Module, name: str, rank: int, alpha: int, seed: int) -> None:
        super().__init__()
        width, height = int(base.input_size), int(base.output_size)  # type: ignore[arg-type]
        device = next(base.parameters()).device
        self.base, self.scale, self.enabled = base, alpha / rank, True
        self.lora_A = nn.Parameter(initial_factor(name, rank, width, seed).to(device))
        self.lora_B = nn.Parameter(torch.zeros(height, rank, device=device))

    def forward(self, x: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        """Return (output, bias) as Megatron's linear layers do."""
        y, bias = self.base(x, **options)
        if self.enabled:
            delta = nn.functional.linear(nn.functional.linear(x.to(self.lora_A.dtype), self.lora_A), self.lora_B)
            y = y + (self.scale * delta).to(y.dtype)
        return y, bias


def initial_factor(name: str, rank: int, width: int, seed: int) -> Tensor:
    """Draw A [rank, width] from the seed and the name: kaiming-uniform with a = sqrt(5), U(-1/sqrt(in), 1/sqrt(in)).

    The same law as PEFT's LoraLayer.reset_lora_parameters; B starts at zero.
    """
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    bound = 1 / math.sqrt(width)
    return torch.empty(rank, width).uniform_(-bound, bound, generator=generator)


def attach(model: nn.Module, targets: Collection[str], rank: int, alpha: int, seed: int) -> int:
    """Freeze the model and put LoRA on the targets.

    Returns:
        The number of parameters that are trained.

    Raises:
        UsageError: an unknown target, none at all, or a rank or alpha below 1.
    """
    if unknown := sorted(set(targets) - set(ALL_LINEAR)) or ([] if targets else [""]):
        raise UsageError(
            f"unknown LoRA target {unknown[0]!r}",
            op="attach LoRA",
            key="lora.targets",
            hint=f"Known: {', '.join(ALL_LINEAR)}",
        )
    if rank < 1 or alpha < 1:
        raise UsageError(f"rank {rank} and alpha {alpha} must be at least 1", op="attach LoRA", key="lora.rank")
    model.requires_grad_(False)
    count = 0
    for parent, target, layer, expert in list(_linears(model)):
        if target in targets:
            where = f"layers.{layer}" if expert is None else f"layers.{layer}.experts.{expert}"
            wrapped = LoraLinear(getattr(parent, target), f"{where}.{target}", rank, alpha, seed)
            setattr(parent, target, wrapped)
            count += wrapped.lora_A.numel() + wrapped.lora_B.numel()
    return count


def named_lora(model: nn.Module) -> Iterator[MegatronLora]:
    """Yield this rank's factors with their global coordinates; of replicas exactly one says that it writes."""
    from megatron.core import parallel_state

    place = placement(model)
    first_replica = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    first_expert_replica = parallel_state.get_expert_data_parallel_rank() == 0
    for parent, target, layer, expert in _linears(model):
        module = getattr(parent, target)
        if not isinstance(module, LoraLinear):
            continue
        dense = expert is None
        rank, size = (place.tp_rank, place.tp_size) if dense else (place.etp_rank, place.etp_size)
        writes = first_replica if dense else first_expert_replica
        row_parallel = target in ("linear_proj", "linear_fc2")
        yield MegatronLora(
            target=target,
            layer=layer,
            expert=expert,
            lora_A=module.lora_A.detach(),
            lora_B=module.lora_B.detach(),
            tp_rank=rank,
            tp_size=size,
            writes_A=writes and (row_parallel or rank == 0),
            writes_B=writes and (not row_parallel or rank == 0),
        )


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """Run the base model alone: the reference policy of the KL term."""
    modules = [m for m in model.modules() if isinstance(m, LoraLinear)]
    for module in modules:
        module.enabled = False
    try:
        yield
    finally:
        for module in modules:
            module.enabled = True


def _linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, int, int | None]]:
    """Walk (parent, target, global layer, global expert or None) in a fixed order."""
    layers: Any = model.get_submodule("decoder.layers")
    first_expert = placement(model).first_expert
    for block in layers:
        layer = block.layer_number - 1
        yield block.self_attention, "linear_qkv", layer, None
        yield block.self_attention, "linear_proj", layer, None
        for local, mlp in enumerate(block.mlp.experts.local_experts):
            yield mlp, "linear_fc1", layer, first_expert + local
            yield mlp, "linear_fc2", layer, first_expert + local
