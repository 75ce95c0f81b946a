"""A Qwen3-MoE small enough to pre-train on two cores, in plain torch.

Promises: the same logits as transformers' Qwen3MoeForCausalLM on the directory that `export.py` writes. Weights are a
flat dict under Hugging Face names, except that one projection's experts are stacked: "...mlp.experts.gate_proj" is
[E, I, H].

Shape suffixes: N sequences, L positions of this call, S positions seen so far, T = N*L tokens, V vocabulary, H hidden,
A attention heads, K key/value heads, D head dimension, E experts, C experts chosen per token, I expert width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """The base model's architecture; 1,021,312 parameters."""

    vocabulary: int = 128
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    experts: int = 8
    experts_per_token: int = 2
    expert_width: int = 64
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6


SHAPE = Shape()


@dataclass
class RouterTrace:
    """What every layer's router decided, for the load-balancing loss (Switch Transformer, equation 4)."""

    probability_TE: list[Tensor] = field(default_factory=list)
    choice_TC: list[Tensor] = field(default_factory=list)

    def balance_loss(self) -> Tensor:
        """Return 1.0 for perfect balance, up to the number of experts for none."""
        losses = []
        for probability_TE, choice_TC in zip(self.probability_TE, self.choice_TC, strict=True):
            experts = probability_TE.shape[1]
            load_E = functional.one_hot(choice_TC, experts).float().mean((0, 1))
            losses.append(experts * (probability_TE.mean(0) * load_E).sum())
        return torch.stack(losses).mean()


@dataclass
class KeyValueCache:
    """Keys and values of the positions seen so far, one [N, K, S, D] pair per layer."""

    keys_NKSD: list[Tensor] = field(default_factory=list)
    values_NKSD: list[Tensor] = field(default_factory=list)

    def extend(self, layer: int, k_NKLD: Tensor, v_NKLD: Tensor) -> tuple[Tensor, Tensor]:
        """Append this call's positions and return all of them."""
        if layer == len(self.keys_NKSD):
            self.keys_NKSD.append(k_NKLD)
            self.values_NKSD.append(v_NKLD)
        else:
            self.keys_NKSD[layer] = torch.cat([self.keys_NKSD[layer], k_NKLD], 2)
            self.values_NKSD[layer] = torch.cat([self.values_NKSD[layer], v_NKLD], 2)
        return self.keys_NKSD[layer], self.values_NKSD[layer]


def initial_weights(seed: int, shape: Shape = SHAPE) -> Weights:
    """Draw fp32 weights; projections into the residual stream are scaled down by the depth."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner = shape.hidden, shape.heads * shape.head_dim
    kv_inner, experts, width = shape.kv_heads * shape.head_dim, shape.experts, shape.expert_width

    def normal(*size: int, std: float) -> Tensor:
        return torch.randn(*size, generator=generator) * std

    into, depth = hidden**-0.5, 2 * shape.layers
    weights = {
        "model.embed_tokens.weight": normal(shape.vocabulary, hidden, std=0.02),
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": normal(shape.vocabulary, hidden, std=0.02),
    }
    for layer in range(shape.layers):
        at = f"model.layers.{layer}."
        weights |= {
            at + "input_layernorm.weight": torch.ones(hidden),
            at + "post_attention_layernorm.weight": torch.ones(hidden),
            at + "self_attn.q_norm.weight": torch.ones(shape.head_dim),
            at + "self_attn.k_norm.weight": torch.ones(shape.head_dim),
            at + "self_attn.q_proj.weight": normal(inner, hidden, std=into),
            at + "self_attn.k_proj.weight": normal(kv_inner, hidden, std=into),
            at + "self_attn.v_proj.weight": normal(kv_inner, hidden, std=into),
            at + "self_attn.o_proj.weight": normal(hidden, inner, std=(inner * depth) ** -0.5),
            at + "mlp.gate.weight": normal(experts, hidden, std=0.02),
            at + "mlp.experts.gate_proj": normal(experts, width, hidden, std=into),
            at + "mlp.experts.up_proj": normal(experts, width, hidden, std=into),
            at + "mlp.experts.down_proj": normal(experts, hidden, width, std=(width * depth) ** -0.5),
        }
    return weights


def left_padded(prompts: Sequence[Sequence[int]], length: int, pad: int) -> tuple[Tensor, Tensor]:
    """Return ids_NL with padding on the left, and n_pad_N."""
    ids_NL = torch.full((len(prompts), length), pad)
    for row, prompt in enumerate(prompts):
        ids_NL[row, length - len(prompt) :] = torch.tensor(prompt)
    return ids_NL, torch.tensor([length - len(prompt) for prompt in prompts])


def forward(
    weights: Weights,
    ids_NL: Tensor,
    n_pad_N: Tensor,
    cache: KeyValueCache | None = None,
    trace: RouterTrace | None = None,
    shape: Shape = SHAPE,
) -> Tensor:
    """Return logits_NLV for left-padded ids; with a cache, ids_NL continue what the cache has seen."""
    n, length = ids_NL.shape
    seen = cache.keys_NKSD[0].shape[2] if cache is not None and cache.keys_NKSD else 0
    query_L, key_S = torch.arange(seen, seen + length), torch.arange(seen + length)
    position_NL = (query_L - n_pad_N[:, None]).clamp(min=0)
    real_NLS = (key_S[None, :] >= n_pad_N[:, None])[:, None, :] & (key_S[None, :] <= query_L[:, None])
    mask_N1LS = (real_NLS | (key_S[None, :] == query_L[:, None]))[:, None]  # padding attends to itself: no NaN
    x_NLH = weights["model.embed_tokens.weight"][ids_NL]
    for layer in range(shape.layers):
        at = f"model.layers.{layer}."
        h_NLH = _rms_norm(x_NLH, weights[at + "input_layernorm.weight"], shape.norm_eps)
        x_NLH = x_NLH + _attention(weights, layer, h_NLH, position_NL, mask_N1LS, cache, shape)
        h_NLH = _rms_norm(x_NLH, weights[at + "post_attention_layernorm.weight"], shape.norm_eps)
        x_NLH = x_NLH + _experts(weights, layer, h_NLH.reshape(n * length, -1), trace, shape).view_as(x_NLH)
    return _rms_norm(x_NLH, weights["model.norm.weight"], shape.norm_eps) @ weights["lm_head.weight"].T


@torch.no_grad()
def generate(
    weights: Weights,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    eos: int,
    generator: torch.Generator,
) -> list[list[int]]:
    """Sample one completion per prompt (temperature 0: greedy); each ends with `eos` or at the limit."""
    ids_NL, n_pad_N = left_padded(prompts, max(map(len, prompts)), pad=0)
    cache = KeyValueCache()
    chosen: list[Tensor] = []
    finished_N = torch.zeros(len(prompts), dtype=torch.bool)
    while len(chosen) < max_new_tokens and not finished_N.all():
        logits_NV = forward(weights, ids_NL, n_pad_N, cache)[:, -1]
        if temperature == 0:
            next_N = logits_NV.argmax(-1)
        else:
            next_N = torch.multinomial((logits_NV / temperature).softmax(-1), 1, generator=generator)[:, 0]
        chosen.append(next_N)
        finished_N = finished_N | (next_N == eos)
        ids_NL = next_N[:, None]
    completions = torch.stack(chosen, 1).tolist()
    return [row[: row.index(eos) + 1] if eos in row else row for row in completions]


def _rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    return scale * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def _attention(
    weights: Weights,
    layer: int,
    h_NLH: Tensor,
    position_NL: Tensor,
    mask_N1LS: Tensor,
    cache: KeyValueCache | None,
    shape: Shape,
) -> Tensor:
    """Grouped-query attention with normalised queries and keys, as in Qwen3."""
    n, length, _ = h_NLH.shape
    at = f"model.layers.{layer}.self_attn."

    def heads(name: str) -> Tensor:
        return (h_NLH @ weights[f"{at}{name}_proj.weight"].T).view(n, length, -1, shape.head_dim)

    q_NALD = _rms_norm(heads("q"), weights[at + "q_norm.weight"], shape.norm_eps).transpose(1, 2)
    k_NKLD = _rms_norm(heads("k"), weights[at + "k_norm.weight"], shape.norm_eps).transpose(1, 2)
    v_NKLD = heads("v").transpose(1, 2)
    q_NALD = _rotate(q_NALD, position_NL, shape.rope_theta)
    k_NKLD = _rotate(k_NKLD, position_NL, shape.rope_theta)
    k_NKSD, v_NKSD = cache.extend(layer, k_NKLD, v_NKLD) if cache is not None else (k_NKLD, v_NKLD)
    o_NALD = functional.scaled_dot_product_attention(q_NALD, k_NKSD, v_NKSD, attn_mask=mask_N1LS, enable_gqa=True)
    return o_NALD.transpose(1, 2).reshape(n, length, -1) @ weights[at + "o_proj.weight"].T


def _rotate(x_NALD: Tensor, position_NL: Tensor, theta: float) -> Tensor:
    """Rotary embedding on the two halves of the head dimension (RoFormer, in Llama's layout)."""
    dim = x_NALD.shape[-1]
    frequency = theta ** -(torch.arange(0, dim, 2).float() / dim)
    angle = position_NL[:, None, :, None].float() * frequency
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
    first, second = x_NALD.chunk(2, -1)
    return x_NALD * cos + torch.cat([-second, first], -1) * sin


def _experts(weights: Weights, layer: int, x_TH: Tensor, trace: RouterTrace | None, shape: Shape) -> Tensor:
    """Mix each token's chosen experts by their renormalised router probabilities; no token is dropped."""
    at = f"model.layers.{layer}.mlp."
    probability_TE = (x_TH @ weights[at + "gate.weight"].T).softmax(-1)
    share_TC, choice_TC = probability_TE.topk(shape.experts_per_token, -1)
    if trace is not None:
        trace.probability_TE.append(probability_TE)
        trace.choice_TC.append(choice_TC)
    share_TC = share_TC / share_TC.sum(-1, keepdim=True)
    order = choice_TC.reshape(-1).argsort()
    token = order // shape.experts_per_token
    per_expert = choice_TC.reshape(-1).bincount(minlength=shape.experts).tolist()
    gate, up, down = (weights[f"{at}experts.{name}_proj"] for name in ("gate", "up", "down"))
    outputs = [
        (functional.silu(x @ gate[expert].T) * (x @ up[expert].T)) @ down[expert].T
        for expert, x in enumerate(x_TH[token].split(per_expert))
    ]
    mixed = torch.cat(outputs) * share_TC.reshape(-1)[order, None]
    return torch.zeros_like(x_TH).index_add(0, token, mixed)
