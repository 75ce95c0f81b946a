"""Writes the pre-trained model as a Hugging Face directory: bf16, one tensor per expert and projection.

Promises: the same weights give the same bytes; `read_model` gives back the weights as they were rounded.
"""

import json
from pathlib import Path

import torch
from model import SHAPE, Shape, Weights
from safetensors.torch import load_file, save_file
from tokenizer import BOS, EOS, PAD, write_tokenizer

STACKED = ("gate_proj", "up_proj", "down_proj")
MAX_POSITIONS = 128  # tokens


def rounded(weights: Weights) -> Weights:
    """Return the weights as they come back from bf16, in fp32."""
    return {name: tensor.detach().bfloat16().float() for name, tensor in weights.items()}


def write_model(weights: Weights, directory: Path, shape: Shape = SHAPE) -> None:
    """Write config.json, generation_config.json, model.safetensors and the tokenizer's files."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors: Weights = {}
    for name, tensor in weights.items():
        stem, _, projection = name.rpartition(".")
        if projection in STACKED:
            for expert, part in enumerate(tensor):
                tensors[f"{stem}.{expert}.{projection}.weight"] = part
        else:
            tensors[name] = tensor
    file = directory / "model.safetensors"
    contiguous = {name: tensor.detach().bfloat16().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors saves with 0600 whatever the umask
    _write_json(directory / "config.json", _config(shape))
    generation = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "do_sample": True}
    _write_json(directory / "generation_config.json", generation)
    write_tokenizer(directory)


def read_model(directory: Path, shape: Shape = SHAPE) -> Weights:
    """Read what `write_model` wrote, as fp32."""
    tensors = {name: t.float() for name, t in load_file(directory / "model.safetensors").items()}
    weights = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in range(shape.layers):
        at = f"model.layers.{layer}.mlp.experts."
        for projection in STACKED:
            parts = [tensors[f"{at}{expert}.{projection}.weight"] for expert in range(shape.experts)]
            weights[at + projection] = torch.stack(parts)
    return weights


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": 2 * shape.expert_width,  # of dense layers, of which there are none
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.experts_per_token,
        "moe_intermediate_size": shape.expert_width,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": 0.01,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,  # transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},  # transformers 5
        "max_position_embeddings": MAX_POSITIONS,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_sliding_window": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "dtype": "bfloat16",
    }


def _write_json(file: Path, content: dict[str, object]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
