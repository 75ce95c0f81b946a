"""Qwen3-MoE in Megatron-Core's terms: the settings its config.json means, and where each parameter comes from.

Source of the format: Hugging Face transformers' Qwen3MoeConfig and its checkpoints' tensor names (experts one by one).
Promises: a setting that this mapping does not carry over is refused, never ignored. Does not: build anything.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from shared.errors import Corrupt, UsageError
from trainer.parallel_layout import Placement

_OP = "read config.json"

# Settings whose other values would need other layers: name -> (the one value that fits, what absence means).
_FIXED: Mapping[str, tuple[Any, Any]] = {
    "hidden_act": ("silu", "silu"),
    "attention_bias": (False, False),
    "use_sliding_window": (False, False),
    "decoder_sparse_step": (1, 1),
    "mlp_only_layers": ([], []),
    "rope_scaling": (None, None),
}


def settings(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate config.json into TransformerConfig's keyword arguments that depend on the architecture.

    Raises:
        UsageError: a key is missing, or has a value that this mapping does not carry over.
    """
    for name, (only, absent) in _FIXED.items():
        if (value := hf_config.get(name, absent)) not in (only, None):
            raise UsageError(f"{name}={value!r} is not supported, only {only!r}", op=_OP, key=name)
    top_k, normalised = _need(hf_config, "num_experts_per_tok"), hf_config.get("norm_topk_prob", False)
    if top_k == 1 and normalised:
        raise UsageError("norm_topk_prob with one expert per token gives the router no gradient", op=_OP)
    return {
        "num_layers": _need(hf_config, "num_hidden_layers"),
        "hidden_size": _need(hf_config, "hidden_size"),
        "num_attention_heads": _need(hf_config, "num_attention_heads"),
        "num_query_groups": _need(hf_config, "num_key_value_heads"),
        "kv_channels": _need(hf_config, "head_dim"),
        "ffn_hidden_size": _need(hf_config, "intermediate_size"),
        "moe_ffn_hidden_size": _need(hf_config, "moe_intermediate_size"),
        "num_moe_experts": _need(hf_config, "num_experts"),
        "moe_router_topk": top_k,
        # Softmax after top-k equals Hugging Face's softmax, top-k, renormalise; before it, the same unnormalised.
        "moe_router_pre_softmax": not normalised,
        "layernorm_epsilon": hf_config.get("rms_norm_eps", 1e-6),
        "normalization": "RMSNorm",
        "qk_layernorm": True,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
    }


def rotary_base(hf_config: Mapping[str, Any]) -> float:
    """Read rope theta, from `rope_parameters` (transformers 5) or `rope_theta` (before).

    Raises:
        UsageError: missing, or a rope type other than the plain one.
    """
    rope = hf_config.get("rope_parameters") or {}
    if (kind := rope.get("rope_type", "default")) != "default":
        raise UsageError(f"rope type {kind!r} is not supported, only 'default'", op=_OP, key="rope_parameters")
    return float(rope["rope_theta"] if "rope_theta" in rope else _need(hf_config, "rope_theta"))


def tensor_names(hf_config: Mapping[str, Any]) -> set[str]:
    """List the tensors of the whole checkpoint, all layers and experts."""
    names = {"model.embed_tokens.weight", "model.norm.weight"}
    if not hf_config.get("tie_word_embeddings", False):
        names.add("lm_head.weight")
    for layer in range(hf_config["num_hidden_layers"]):
        block = f"model.layers.{layer}."
        names |= {f"{block}{norm}_layernorm.weight" for norm in ("input", "post_attention")}
        names |= {f"{block}self_attn.{p}_proj.weight" for p in "qkvo"}
        names |= {f"{block}self_attn.{p}_norm.weight" for p in "qk"}
        names.add(f"{block}mlp.gate.weight")
        for expert in range(hf_config["num_experts"]):
            names |= {f"{block}mlp.experts.{expert}.{p}_proj.weight" for p in ("gate", "up", "down")}
    return names


_OUTSIDE_LAYERS = {
    "embedding.word_embeddings.weight": ("model.embed_tokens.weight", True),
    "output_layer.weight": ("lm_head.weight", True),
    "decoder.final_layernorm.weight": ("model.norm.weight", False),
}
_UNSPLIT = {
    "input_layernorm": "input_layernorm",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "self_attention.q_layernorm": "self_attn.q_norm",
    "self_attention.k_layernorm": "self_attn.k_norm",
    "mlp.router": "mlp.gate",
}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)\.weight")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.linear_(fc1|fc2)")


def parameter(name: str, hf_config: Mapping[str, Any], place: Placement, read: Callable[[str], Tensor]) -> Tensor:
    """Assemble this rank's slice of one Megatron parameter.

    Args:
        name: the parameter's name in the GPTModel, layers and experts counted from 0 on this rank.
        place: where this rank stands.
        read: gives a checkpoint tensor by its name.

    Raises:
        Corrupt: a parameter that this family does not have.
    """
    if name in _OUTSIDE_LAYERS:
        source, split = _OUTSIDE_LAYERS[name]
        return _part(read(source), place.tp_size, place.tp_rank) if split else read(source)
    if match := _LAYER.fullmatch(name):
        block, module = f"model.layers.{place.first_layer + int(match[1])}.", match[2]
        if module in _UNSPLIT:
            return read(f"{block}{_UNSPLIT[module]}.weight")
        if module == "self_attention.linear_qkv":
            q, k, v = (read(f"{block}self_attn.{p}_proj.weight") for p in "qkv")
            return _part(interleave_qkv(q, k, v, settings(hf_config)), place.tp_size, place.tp_rank)
        if module == "self_attention.linear_proj":
            return _part(read(f"{block}self_attn.o_proj.weight"), place.tp_size, place.tp_rank, dim=1)
        if expert := _EXPERT.fullmatch(module):
            mlp = f"{block}mlp.experts.{place.first_expert + int(expert[1])}."
            if expert[2] == "fc2":
                return _part(read(f"{mlp}down_proj.weight"), place.etp_size, place.etp_rank, dim=1)
            halves = (read(f"{mlp}{p}_proj.weight") for p in ("gate", "up"))
            return torch.cat([_part(half, place.etp_size, place.etp_rank) for half in halves])
    raise Corrupt("a parameter with no counterpart in a Qwen3-MoE checkpoint", op="load base model", key=name)


def interleave_qkv(q: Tensor, k: Tensor, v: Tensor, numbers: Mapping[str, Any]) -> Tensor:
    """Fuse q, k, v [rows, columns] in the order of linear_qkv: by query group its queries, its key, its value."""
    groups, head = numbers["num_query_groups"], numbers["kv_channels"]
    per_group = [part.reshape(groups, -1, head, part.shape[-1]) for part in (q, k, v)]
    return torch.cat(per_group, dim=1).reshape(-1, q.shape[-1])


def _part(whole: Tensor, size: int, rank: int, dim: int = 0) -> Tensor:
    return whole.chunk(size, dim)[rank]


def _need(hf_config: Mapping[str, Any], name: str) -> Any:
    if hf_config.get(name) is None:
        raise UsageError(f"{name} is missing", op=_OP, key=name)
    return hf_config[name]
