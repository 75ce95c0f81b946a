"""Which tensors an adapter of a base model must have: names, shapes and order, from the base's config alone.

Publisher and rollout node both compare against this, so a name can't be dropped, added or misspelt in between: vLLM
answers 200 to most such mistakes and serves the base model.

Order is the wire order: by layer, then projection, then factor, then expert ascending, so that all experts of one
(layer, projection, factor) lie next to each other and map as one [experts, rows, columns] block.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from shared.config import ALL_LINEAR
from shared.errors import UsageError

PREFIX = "base_model.model.model.layers."

# Megatron-Core linear -> the Hugging Face projections that it holds, in wire order.
ATTENTION = {"linear_qkv": ("q_proj", "k_proj", "v_proj"), "linear_proj": ("o_proj",)}
MLP = {"linear_fc1": ("gate_proj", "up_proj"), "linear_fc2": ("down_proj",)}

PROJECTIONS = tuple(name for target in ALL_LINEAR for name in ATTENTION.get(target, ()) + MLP.get(target, ()))

_NAME = re.compile(
    re.escape(PREFIX) + r"(?P<layer>\d{1,6})\.(self_attn|mlp(\.experts\.(?P<expert>\d{1,6}))?)"
    r"\.(?P<projection>\w+)\.lora_(?P<factor>[AB])\.weight"
)

Shape = tuple[int, int]


def attention_name(layer: int, projection: str, factor: str) -> str:
    """PEFT name of an attention factor; `factor` is "A" or "B"."""
    return f"{PREFIX}{layer}.self_attn.{projection}.lora_{factor}.weight"


def expert_name(layer: int, expert: int, projection: str, factor: str) -> str:
    """PEFT name of one expert's factor."""
    return f"{PREFIX}{layer}.mlp.experts.{expert}.{projection}.lora_{factor}.weight"


def expected_tensors(base_config: Mapping[str, Any], targets: Sequence[str], rank: int) -> dict[str, Shape]:
    """Every tensor of an adapter, in wire order, with its shape.

    Args:
        base_config: the base model's config.json.
        targets: Megatron-Core linear names, a subset of `shared.config.ALL_LINEAR`.
        rank: LoRA rank r. lora_A is [r, in], lora_B is [out, r].

    Raises:
        UsageError: unknown model_type or target.
    """
    unknown = [target for target in targets if target not in ALL_LINEAR]
    if unknown or not targets:
        valid = ", ".join(ALL_LINEAR)
        raise UsageError(f"unknown lora.targets {unknown or '(none)'}", op="name tensors", hint=f"Valid: {valid}")
    model_type = str(base_config["model_type"])
    if model_type not in FAMILIES:
        raise UsageError(
            f"no adapter names for model_type {model_type!r}",
            op="name tensors",
            hint=f"Known: {', '.join(FAMILIES)}",
        )
    try:
        return dict(FAMILIES[model_type](base_config, targets, rank))
    except KeyError as error:
        raise UsageError(f"config.json of the base model has no {error}", op="name tensors") from error


def _qwen3_moe(base: Mapping[str, Any], targets: Sequence[str], r: int) -> Iterator[tuple[str, Shape]]:
    """Qwen3-MoE: grouped-query attention, every layer sparse."""
    if base.get("mlp_only_layers") or base.get("decoder_sparse_step", 1) != 1:
        raise UsageError("qwen3_moe with dense layers is not supported", op="name tensors", key="mlp_only_layers")
    hidden, inter, head = base["hidden_size"], base["moe_intermediate_size"], base["head_dim"]
    q, kv = base["num_attention_heads"] * head, base["num_key_value_heads"] * head
    sizes = {  # projection: (in, out)
        "q_proj": (hidden, q),
        "k_proj": (hidden, kv),
        "v_proj": (hidden, kv),
        "o_proj": (q, hidden),
        "gate_proj": (hidden, inter),
        "up_proj": (hidden, inter),
        "down_proj": (inter, hidden),
    }
    for layer in range(base["num_hidden_layers"]):
        for target in targets_in_order(targets):
            for projection in ATTENTION.get(target, ()) + MLP.get(target, ()):
                n_in, n_out = sizes[projection]
                for factor, shape in (("A", (r, n_in)), ("B", (n_out, r))):
                    if target in ATTENTION:
                        yield attention_name(layer, projection, factor), shape
                    else:
                        for expert in range(base["num_experts"]):
                            yield expert_name(layer, expert, projection, factor), shape


def wire_order(names: Iterable[str]) -> list[str]:
    """Names in wire order, from the names alone, for when the base model is not at hand; unknown ones last."""

    def place(name: str) -> tuple[bool, int, int, str, int, str]:
        match = _NAME.fullmatch(name)
        if not match or match["projection"] not in PROJECTIONS:
            return True, 0, 0, "", 0, name
        projection = PROJECTIONS.index(match["projection"])
        return False, int(match["layer"]), projection, match["factor"], int(match["expert"] or 0), name

    return sorted(names, key=place)


def targets_in_order(targets: Sequence[str]) -> list[str]:
    """Targets in wire order, whatever order they were asked in."""
    return [target for target in ALL_LINEAR if target in targets]


def peft_target_modules(targets: Sequence[str]) -> list[str]:
    """The `target_modules` of adapter_config.json."""
    return [name for target in targets_in_order(targets) for name in ATTENTION.get(target, ()) + MLP.get(target, ())]


FAMILIES: dict[str, Callable[[Mapping[str, Any], Sequence[str], int], Iterator[tuple[str, Shape]]]] = {
    "qwen3_moe": _qwen3_moe,
}
