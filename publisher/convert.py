"""Megatron-Core LoRA factors to expert-indexed PEFT names: which slice of which named tensor does this rank hold?

Promises: complete for every layout of tensor, pipeline, expert, expert-tensor and data parallelism, from local factors
alone: no collective, no copy, every result a view. An unknown model type or a factor that matches no rule raises;
nothing is dropped. Does not: scale B by alpha / r (the encoder does), compare the whole with what the base model
expects (the commit does).

What a rank holds, by target (r = LoRA rank, h = hidden size, d = head size, i = the MLP's inner size):

    linear_qkv   A [r, h]         q_proj A; k_proj and v_proj are aliases of it
                 B [rows / tp, r] rows by query group: the group's queries, its key, its value. A slice may cut a
                                  group, and gives up to three pieces for each group that it touches
    linear_proj  A [r, q d / tp]  o_proj A, columns            B [h, r]      o_proj B, whole on every rank
    linear_fc1   A [r, h]         gate_proj A; up_proj is an alias of it
                 B [2 i / tp, r]  this rank's rows of gate above this rank's rows of up
    linear_fc2   A [r, i / tp]    down_proj A, columns         B [h, r]      down_proj B, whole on every rank

For experts, tp above means expert tensor parallelism.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from shared.errors import Corrupt, UsageError
from shared.peft_names import ATTENTION, MLP, attention_name, expert_name

_OP = "convert adapter"


@dataclass(frozen=True)
class MegatronLora:
    """One pair of factors as a rank holds it.

    Args:
        target: linear_qkv, linear_proj, linear_fc1 or linear_fc2.
        layer: counted over the whole model.
        expert: counted over the whole model; None for attention and dense MLPs.
        lora_A: [r, in], or this rank's columns of it.
        lora_B: [out, r], or this rank's rows of it.
        tp_rank, tp_size: tensor parallelism; for experts, expert tensor parallelism.
        writes_A, writes_B: whether this rank is the one of the replicas that writes.
    """

    target: str
    layer: int
    expert: int | None
    lora_A: Tensor
    lora_B: Tensor
    tp_rank: int = 0
    tp_size: int = 1
    writes_A: bool = True
    writes_B: bool = True


@dataclass(frozen=True)
class AdapterSlice:
    """A rectangle of one named tensor, as a view of the rank's factor.

    Args:
        name: PEFT's name of the tensor.
        tensor: the values, [rows, columns].
        shape: of the whole tensor.
        offset: first row and column of this rectangle in it.
        aliases: other PEFT names that are this very tensor.
    """

    name: str
    tensor: Tensor
    shape: tuple[int, int]
    offset: tuple[int, int]
    aliases: tuple[str, ...] = ()


def convert(hf_config: Mapping[str, Any], loras: Iterable[MegatronLora]) -> Iterator[AdapterSlice]:
    """Name every slice that this rank writes, in the order of the factors.

    Args:
        hf_config: the base model's config.json.

    Raises:
        UsageError: the model type is not in the registry.
        Corrupt: a target the model type does not have, or a factor whose shape is not its slice's.
    """
    model_type = str(hf_config.get("model_type"))
    if model_type not in FAMILIES:
        raise UsageError(f"unknown model_type {model_type!r}", op=_OP, hint=f"Known: {', '.join(sorted(FAMILIES))}")
    return _convert(FAMILIES[model_type], hf_config, loras)


_Rule = Callable[[Mapping[str, Any], MegatronLora], Iterator[AdapterSlice]]


def _convert(
    family: Mapping[str, _Rule], hf_config: Mapping[str, Any], loras: Iterable[MegatronLora]
) -> Iterator[AdapterSlice]:
    for lora in loras:
        if lora.target not in family or (lora.expert is None) != (lora.target in ATTENTION):
            raise Corrupt("no rule for this factor", op=_OP, key=_where(lora))
        yield from family[lora.target](hf_config, lora)


def _qkv(hf_config: Mapping[str, Any], lora: MegatronLora) -> Iterator[AdapterSlice]:
    """linear_qkv: one A for all three; B in query groups, which a rank's rows may cut."""
    heads, groups, head = _heads(hf_config)
    hidden, rank = hf_config["hidden_size"], lora.lora_A.shape[0]
    _check(lora, columns_A=hidden, rows_B=(heads + 2 * groups) * head // lora.tp_size)
    if lora.writes_A:
        name, *aliases = (attention_name(lora.layer, p, "A") for p in ATTENTION["linear_qkv"])
        yield AdapterSlice(name, lora.lora_A, (rank, hidden), (0, 0), tuple(aliases))
    if lora.writes_B:
        rows = {"q_proj": heads * head, "k_proj": groups * head, "v_proj": groups * head}
        count = lora.lora_B.shape[0]
        for projection, local, length, row in qkv_pieces(heads, groups, head, lora.tp_rank * count, count):
            name = attention_name(lora.layer, projection, "B")
            piece = lora.lora_B[local : local + length]
            yield AdapterSlice(name, piece, (rows[projection], rank), (row, 0))


def qkv_pieces(heads: int, groups: int, head: int, first: int, count: int) -> Iterator[tuple[str, int, int, int]]:
    """Cut rows [first, first + count) of fused qkv into runs of one projection.

    Yields:
        (projection, first row within the slice, number of rows, first row within the projection).
    """
    queries = heads // groups * head
    group_rows = queries + 2 * head
    for group in range(first // group_rows, -(-(first + count) // group_rows)):
        start = group * group_rows
        for projection, length in (("q_proj", queries), ("k_proj", head), ("v_proj", head)):
            low, high = max(start, first), min(start + length, first + count)
            if low < high:
                yield projection, low - first, high - low, group * length + low - start
            start += length


def _proj(hf_config: Mapping[str, Any], lora: MegatronLora) -> Iterator[AdapterSlice]:
    """linear_proj: row-parallel, so A is cut by columns and B is whole."""
    heads, _, head = _heads(hf_config)
    names = (attention_name(lora.layer, "o_proj", "A"), attention_name(lora.layer, "o_proj", "B"))
    return _row_parallel(names, lora, width=heads * head, height=hf_config["hidden_size"])


def _fc1(hf_config: Mapping[str, Any], lora: MegatronLora) -> Iterator[AdapterSlice]:
    """linear_fc1: one A for gate and up; B is this rank's gate rows above its up rows."""
    expert, hidden, rank = _expert(hf_config, lora), hf_config["hidden_size"], lora.lora_A.shape[0]
    inner = hf_config["moe_intermediate_size"]
    rows = inner // lora.tp_size
    _check(lora, columns_A=hidden, rows_B=2 * rows)
    if lora.writes_A:
        name, *aliases = (expert_name(lora.layer, expert, p, "A") for p in MLP["linear_fc1"])
        yield AdapterSlice(name, lora.lora_A, (rank, hidden), (0, 0), tuple(aliases))
    if lora.writes_B:
        for half, projection in enumerate(MLP["linear_fc1"]):
            name = expert_name(lora.layer, expert, projection, "B")
            piece = lora.lora_B[half * rows : (half + 1) * rows]
            yield AdapterSlice(name, piece, (inner, rank), (lora.tp_rank * rows, 0))


def _fc2(hf_config: Mapping[str, Any], lora: MegatronLora) -> Iterator[AdapterSlice]:
    """linear_fc2: row-parallel, so A is cut by columns and B is whole."""
    expert = _expert(hf_config, lora)
    a_name, b_name = (expert_name(lora.layer, expert, "down_proj", factor) for factor in "AB")
    return _row_parallel(
        (a_name, b_name), lora, width=hf_config["moe_intermediate_size"], height=hf_config["hidden_size"]
    )


def _row_parallel(names: tuple[str, str], lora: MegatronLora, width: int, height: int) -> Iterator[AdapterSlice]:
    rank, columns = lora.lora_A.shape[0], width // lora.tp_size
    _check(lora, columns_A=columns, rows_B=height)
    if lora.writes_A:
        yield AdapterSlice(names[0], lora.lora_A, (rank, width), (0, lora.tp_rank * columns))
    if lora.writes_B:
        yield AdapterSlice(names[1], lora.lora_B, (height, rank), (0, 0))


def _heads(hf_config: Mapping[str, Any]) -> tuple[int, int, int]:
    """(query heads, key-value heads, head size)."""
    return hf_config["num_attention_heads"], hf_config["num_key_value_heads"], hf_config["head_dim"]


def _expert(hf_config: Mapping[str, Any], lora: MegatronLora) -> int:
    if lora.expert is None or not 0 <= lora.expert < hf_config["num_experts"]:
        raise Corrupt(f"not one of {hf_config['num_experts']} experts", op=_OP, key=_where(lora))
    return lora.expert


def _check(lora: MegatronLora, columns_A: int, rows_B: int) -> None:
    """Check the factors' shapes: a wrong tensor-parallel size would otherwise put rows in the wrong place, silently."""
    rank = lora.lora_A.shape[0]
    found, expected = (tuple(lora.lora_A.shape), tuple(lora.lora_B.shape)), ((rank, columns_A), (rows_B, rank))
    if found != expected or not 0 <= lora.tp_rank < lora.tp_size or lora.layer < 0:
        raise Corrupt(
            f"factors A {found[0]}, B {found[1]} on rank {lora.tp_rank} of {lora.tp_size}; "
            f"config.json makes it {expected[0]}, {expected[1]}",
            op=_OP,
            key=_where(lora),
        )


def _where(lora: MegatronLora) -> str:
    expert = "" if lora.expert is None else f".experts.{lora.expert}"
    return f"layers.{lora.layer}{expert}.{lora.target}"


FAMILIES: Mapping[str, Mapping[str, _Rule]] = {
    "qwen3_moe": {"linear_qkv": _qkv, "linear_proj": _proj, "linear_fc1": _fc1, "linear_fc2": _fc2},
}
