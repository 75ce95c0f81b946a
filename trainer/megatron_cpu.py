"""What megatron-core 0.16.1 needs to run without a GPU and without Transformer Engine.

Promises: after `prepare()` a Megatron-Core model builds, runs forward and backward on the CPU with gloo; where CUDA is
available only the one import that megatron-core forgot is mended. Does not: make fused kernels, context parallelism or
Megatron's own optimizers run on the CPU (they name the device "cuda" in places that no stand-in reaches).

The MoE dispatcher matters here: the all-to-all one drives CUDA streams and hands gloo split sizes that it refuses, the
all-gather one is plain torch, so `trainer.model` takes the latter on the CPU.
"""

from typing import Any

import torch


def prepare() -> None:
    """Install the stand-ins; calling it again changes nothing."""
    _mend_router_gemm()
    if not torch.cuda.is_available():
        _stand_in_for_cuda()


def _mend_router_gemm() -> None:
    """Give `moe_utils` a name it uses; it is imported with Transformer Engine only, and the router raises NameError."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _stand_in_for_cuda() -> None:
    """Point random states and the current device at the CPU: all that building a model and running it ask of CUDA."""
    from megatron.core.tensor_parallel import random as megatron_random

    def current_device() -> torch.device:
        return torch.device("cpu")

    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    def get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        torch.set_rng_state(state)

    for name, stand_in in (
        ("current_device", current_device),
        ("manual_seed", manual_seed),
        ("get_rng_state", get_rng_state),
    ):
        setattr(torch.cuda, name, stand_in)
    megatron_random._get_cuda_rng_state = get_rng_state
    megatron_random._set_cuda_rng_state = set_rng_state
