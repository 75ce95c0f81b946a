"""The policy: a Megatron-Core GPTModel built from a Hugging Face config.json, and its per-token log-probabilities.

Promises: every number comes from config.json; an architecture or a layout that is not carried is refused by name. The
same code runs on GPUs with nccl and on the CPU with gloo. Does not: load weights (trainer.hf_weights), add LoRA
(trainer.lora).

Shapes: B sequences, T tokens each, S = T - 1 predicted positions, V vocabulary.
"""

from collections.abc import Mapping
from datetime import timedelta
from types import ModuleType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

from shared.errors import UsageError
from trainer import qwen3_moe
from trainer.megatron_cpu import prepare
from trainer.parallel_layout import ParallelLayout, Placement

FAMILIES: Mapping[str, ModuleType] = {"qwen3_moe": qwen3_moe}
DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def family_of(hf_config: Mapping[str, Any]) -> ModuleType:
    """Find the mapping for a model type.

    Raises:
        UsageError: names the types that are known.
    """
    model_type = str(hf_config.get("model_type"))
    if model_type not in FAMILIES:
        raise UsageError(
            f"unknown model_type {model_type!r}",
            op="read base model",
            hint=f"Known: {', '.join(sorted(FAMILIES))}",
        )
    return FAMILIES[model_type]


def start_process_group(layout: ParallelLayout, timeout_s: float = 600.0) -> None:
    """Join torchrun's process group, or make one of a single rank; then Megatron's groups. Again is a no-op.

    Raises:
        UsageError: the ranks started cannot form the layout, or the layout is not carried by this release.
    """
    from megatron.core import parallel_state, tensor_parallel

    prepare()
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        timeout = timedelta(seconds=timeout_s)
        if dist.is_torchelastic_launched():
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    started = dist.get_world_size()
    if started > 1:
        raise UsageError(
            f"this release trains on one rank, and {started} were started",
            op="check layout",
            hint="Start lorasync train by itself, not under torchrun",
        )
    layout.check(started)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.etp,
        )
        # Dropout is 0 and every weight is loaded, so this state is asked for but never drawn from.
        tensor_parallel.model_parallel_cuda_manual_seed(0)


def stop_process_group() -> None:
    """Leave the process group, if there is one; Megatron's groups go with it."""
    if dist.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def build_model(
    hf_config: Mapping[str, Any], layout: ParallelLayout, dtype: Literal["float32", "bfloat16"]
) -> nn.Module:
    """Build this rank's part of the model, weights unset, on its device.

    `start_process_group` comes first.

    Raises:
        UsageError: unknown model_type, or a setting that is not carried over.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    family = family_of(hf_config)
    on_gpu, params_dtype = torch.cuda.is_available(), DTYPES[dtype]
    config = TransformerConfig(
        **family.settings(hf_config),
        activation_func=nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=params_dtype,
        pipeline_dtype=params_dtype,
        autocast_dtype=params_dtype,
        bf16=params_dtype == torch.bfloat16,
        use_cpu_initialization=True,
        perform_initialization=False,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        moe_token_dispatcher_type="alltoall" if on_gpu else "allgather",
        moe_grouped_gemm=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
    )
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization=config.normalization
    )
    model: nn.Module = GPTModel(
        config,
        spec,
        vocab_size=hf_config["vocab_size"],
        max_sequence_length=hf_config["max_position_embeddings"],
        position_embedding_type="rope",
        rotary_base=family.rotary_base(hf_config),
        share_embeddings_and_output_weights=hf_config.get("tie_word_embeddings", False),
    )
    return model.to("cuda") if on_gpu else model


def placement(model: nn.Module) -> Placement:
    """Ask Megatron where this rank stands."""
    from megatron.core import parallel_state

    layers: Any = model.get_submodule("decoder.layers")
    experts = parallel_state.get_expert_model_parallel_rank() * layers[0].mlp.experts.num_local_experts
    return Placement(
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        etp_rank=parallel_state.get_expert_tensor_parallel_rank(),
        etp_size=parallel_state.get_expert_tensor_parallel_world_size(),
        first_layer=layers[0].layer_number - 1,
        first_expert=experts,
    )


def token_logp(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    """Score every token given those before it.

    Args:
        tokens_BT: int64, padded on the right: attention is causal, so padding reaches no token before it.

    Returns:
        logp_BS, float32: entry [b, s] is log p(tokens[b, s + 1] | tokens[b, : s + 1]).
    """
    from megatron.core import tensor_parallel

    B, T = tokens_BT.shape
    position_BT = torch.arange(T, device=tokens_BT.device).expand(B, T)
    hidden_11TT = torch.ones(T, T, dtype=torch.bool, device=tokens_BT.device).triu(1)[None, None]
    logits_BTV: Tensor = model(tokens_BT, position_BT, hidden_11TT)
    logits_SBV = logits_BTV[:, :-1].float().transpose(0, 1).contiguous()
    loss_SB: Tensor = tensor_parallel.vocab_parallel_cross_entropy(logits_SBV, tokens_BT[:, 1:].T.contiguous())
    return -loss_SB.T
