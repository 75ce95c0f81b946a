"""Megatron factors to PEFT names, however they are cut. No Megatron, no process group: the shards are cut by hand."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from publisher.convert import AdapterSlice, MegatronLora, convert, qkv_pieces
from shared.config import ALL_LINEAR
from shared.errors import Corrupt, UsageError
from shared.peft_names import expected_tensors

RANK = 4
QWEN: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "num_experts": 4,
    "moe_intermediate_size": 16,
}


def whole_factors(config: dict[str, Any] = QWEN, seed: int = 0) -> list[MegatronLora]:
    """Every factor of the model as one rank would hold it, all values different."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inter, head = config["hidden_size"], config["moe_intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    sizes = {
        "linear_qkv": (hidden, q + 2 * kv),
        "linear_proj": (q, hidden),
        "linear_fc1": (hidden, 2 * inter),
        "linear_fc2": (inter, hidden),
    }
    factors = []
    for layer in range(config["num_hidden_layers"]):
        for target, (n_in, n_out) in sizes.items():
            for expert in range(config["num_experts"]) if "fc" in target else [None]:
                lora_A, lora_B = (torch.randn(shape, generator=generator) for shape in ((RANK, n_in), (n_out, RANK)))
                factors.append(MegatronLora(target, layer, expert, lora_A, lora_B))
    return factors


def cut(lora: MegatronLora, rank: int, size: int) -> MegatronLora:
    """The slice that Megatron gives to one tensor-parallel rank."""
    lora_A, lora_B = lora.lora_A, lora.lora_B
    if lora.target == "linear_qkv":
        lora_B = lora_B.chunk(size)[rank]
    elif lora.target == "linear_fc1":
        lora_B = torch.cat([half.chunk(size)[rank] for half in lora_B.chunk(2)])
    else:
        lora_A = lora_A.chunk(size, 1)[rank]
    column = lora.target in ("linear_qkv", "linear_fc1")
    writes_A, writes_B = not column or rank == 0, column or rank == 0
    return replace(lora, lora_A=lora_A, lora_B=lora_B, tp_rank=rank, tp_size=size, writes_A=writes_A, writes_B=writes_B)


def assemble(slices: Iterable[AdapterSlice]) -> dict[str, Tensor]:
    """Put slices together; every cell must be written exactly once."""
    whole: dict[str, Tensor] = {}
    written: dict[str, Tensor] = {}
    for piece in slices:
        for name in (piece.name, *piece.aliases):
            (row, column), (rows, columns) = piece.offset, piece.tensor.shape
            area = (slice(row, row + rows), slice(column, column + columns))
            whole.setdefault(name, torch.full(piece.shape, float("nan")))[area] = piece.tensor
            written.setdefault(name, torch.zeros(piece.shape, dtype=torch.int64))[area] += 1
    assert all(bool((count == 1).all()) for count in written.values())
    return whole


def every_rank(factors: Iterable[MegatronLora], tp: int, etp: int) -> Iterator[MegatronLora]:
    for lora in factors:
        size = tp if lora.expert is None else etp
        yield from (cut(lora, rank, size) for rank in range(size))


def test_names_and_shapes_are_those_the_base_model_expects():
    found = assemble(convert(QWEN, whole_factors()))
    expected = expected_tensors(QWEN, ALL_LINEAR, RANK)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == expected


def test_q_k_and_v_are_taken_from_the_interleaved_rows_of_their_query_groups():
    lora = next(f for f in whole_factors() if f.target == "linear_qkv")
    found = assemble(convert(QWEN, [lora]))
    # Two groups of 4 queries, a key and a value, 4 rows each: rows 0-15 q, 16-19 k, 20-23 v, 24-39 q, 40-43 k, 44-47 v.
    prefix, rows = "base_model.model.model.layers.0.self_attn.", lora.lora_B
    for projection, parts in (
        ("q", [rows[:16], rows[24:40]]),
        ("k", [rows[16:20], rows[40:44]]),
        ("v", [rows[20:24], rows[44:]]),
    ):
        assert torch.equal(found[f"{prefix}{projection}_proj.lora_B.weight"], torch.cat(parts))


def test_the_product_of_the_factors_is_the_fused_layers_product():
    lora = next(f for f in whole_factors() if f.target == "linear_fc1")
    found = assemble(convert(QWEN, [lora]))
    prefix = "base_model.model.model.layers.0.mlp.experts.0."
    deltas = [
        found[f"{prefix}{p}_proj.lora_B.weight"] @ found[f"{prefix}{p}_proj.lora_A.weight"] for p in ("gate", "up")
    ]
    assert torch.equal(torch.cat(deltas), lora.lora_B @ lora.lora_A)


@pytest.mark.parametrize(("tp", "etp"), list(product((1, 2, 4, 8), (1, 2, 4))))
def test_any_tensor_parallel_cut_gives_the_same_bits_also_beyond_the_number_of_query_groups(tp: int, etp: int):
    factors = whole_factors()
    expected = assemble(convert(QWEN, factors))
    found = assemble(convert(QWEN, every_rank(factors, tp, etp)))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_expert_and_pipeline_ranks_together_give_every_expert_of_every_layer_once():
    factors = whole_factors()
    ranks = [
        [f for f in factors if f.layer == stage and (f.expert is None or f.expert // 2 == ep)]
        for stage, ep in product(range(2), range(2))
    ]
    # Attention is replicated over expert ranks: exactly one of them writes it.
    slices = [
        piece
        for number, rank in enumerate(ranks)
        for piece in convert(
            QWEN,
            [replace(f, writes_A=number % 2 == 0, writes_B=number % 2 == 0) if f.expert is None else f for f in rank],
        )
    ]
    expected = assemble(convert(QWEN, factors))
    found = assemble(slices)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_slices_are_views_so_writing_through_them_reaches_the_factor():
    lora = whole_factors()[0]
    for piece in convert(QWEN, [lora]):
        piece.tensor.zero_()
    assert not lora.lora_A.any() and not lora.lora_B.any()


def test_a_replica_that_does_not_write_yields_nothing():
    silent = [replace(f, writes_A=False, writes_B=False) for f in whole_factors()]
    assert list(convert(QWEN, silent)) == []


def test_pieces_of_a_cut_query_group_cover_its_rows_in_order():
    # 8 heads in 2 groups of head size 4: a group has 24 rows. Rows 12-23 hold one query, the key and the value.
    assert list(qkv_pieces(8, 2, 4, first=12, count=12)) == [
        ("q_proj", 0, 4, 12),
        ("k_proj", 4, 4, 0),
        ("v_proj", 8, 4, 0),
    ]


def test_an_unknown_model_type_is_refused_by_name_before_anything_is_read():
    with pytest.raises(UsageError, match=r"gpt_neox.*Known: qwen3_moe"):
        convert({"model_type": "gpt_neox"}, [])


@pytest.mark.parametrize(
    "change",
    [
        {"target": "router"},
        {"target": "linear_fc1", "expert": None},
        {"expert": 0},
        {"lora_A": torch.zeros(RANK, 23)},
        {"lora_B": torch.zeros(47, RANK)},
        {"lora_B": torch.zeros(48, RANK + 1)},
        {"tp_size": 2},
        {"tp_rank": 1},
    ],
    ids=lambda change: ",".join(
        f"{k}={v.tolist() and 'misfit' if isinstance(v, Tensor) else v}" for k, v in change.items()
    ),
)
def test_a_factor_without_a_rule_or_of_another_shape_is_refused_not_dropped(change: dict[str, Any]):
    lora = replace(whole_factors()[0], **change)
    with pytest.raises(Corrupt, match=r"layers\.0"):
        list(convert(QWEN, [lora]))


def test_an_expert_that_the_model_does_not_have_is_refused():
    lora = replace(next(f for f in whole_factors() if f.expert == 3), expert=4)
    with pytest.raises(Corrupt, match="not one of 4 experts"):
        list(convert(QWEN, [lora]))
