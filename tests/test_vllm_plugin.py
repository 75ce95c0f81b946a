"""The plugin's arithmetic against the plainest possible loops, and when it keeps its hands off vLLM."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rollout.vllm_plugin as plugin
from rollout.vllm_plugin.slots import (
    add_expert_lora,
    expand_into,
    expert_matmul,
    route,
    shrink,
    split_by_slot,
)

SLOTS, EXPERTS, RANK, HIDDEN, OUT = 3, 8, 8, 32, 48


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "slots", [[-1, -1, -1, -1], [2, 2, 2, 2], [0, -1, 2, 0], [1, -1, -1, 1], [-1, 0, 1, 2], []], ids=str
)
def test_every_row_gets_its_own_slots_delta_and_base_rows_get_none(slots: list[int]) -> None:
    a_SRH, b_SOR, x_TH = draw(SLOTS, RANK, HIDDEN), draw(SLOTS, OUT, RANK, seed=1), draw(len(slots), HIDDEN, seed=2)
    y_TO = draw(len(slots), 2 * OUT, seed=3)
    expected_TO = y_TO.clone()
    for row, slot in enumerate(slots):
        if slot >= 0:
            expected_TO[row, OUT:] += b_SOR[slot] @ (a_SRH[slot] @ x_TH[row])

    for group in split_by_slot(torch.tensor(slots, dtype=torch.long)):
        expand_into(y_TO[:, OUT:], shrink(x_TH, a_SRH[group.slot], group), b_SOR[group.slot], group)

    torch.testing.assert_close(y_TO, expected_TO, rtol=0, atol=2e-5)


def test_a_batch_of_one_adapter_needs_no_gather() -> None:
    assert split_by_slot(torch.tensor([1, 1, 1])) == [(1, None)]


@pytest.mark.parametrize("rank", [8, 1], ids=["aligned", "too narrow for grouped_mm"])
@pytest.mark.parametrize("rows", [None, [0, 3, 4, 9]], ids=["all pairs", "some pairs"])
def test_expert_lora_follows_the_routing_of_every_pair(rank: int, rows: list[int] | None) -> None:
    expert_TK = torch.tensor([[3, 0], [3, 7], [1, 3], [0, 7], [6, 1]])
    w_EOH, a_ERH, b_EOR = draw(EXPERTS, OUT, HIDDEN), draw(EXPERTS, rank, HIDDEN, seed=1), draw(EXPERTS, OUT, rank)
    x_TH = draw(5, HIDDEN, seed=2)
    routing = route(expert_TK, EXPERTS)
    chosen = range(10) if rows is None else rows

    y_PO = expert_matmul(x_TH[routing.token_P], w_EOH, routing.ends_E)
    add_expert_lora(y_PO, x_TH[routing.token_P], a_ERH, b_EOR, routing, None if rows is None else torch.tensor(rows))

    for pair in range(10):
        token, expert = int(routing.token_P[pair]), int(routing.expert_P[pair])
        assert expert_TK.reshape(-1)[routing.order_P[pair]] == expert
        expected_O = w_EOH[expert] @ x_TH[token]
        if pair in chosen:
            expected_O = expected_O + b_EOR[expert] @ (a_ERH[expert] @ x_TH[token])
        torch.testing.assert_close(y_PO[pair], expected_O, rtol=0, atol=1e-4)


def test_a_factor_shared_by_all_experts_is_used_for_each() -> None:
    routing = route(torch.tensor([[0, 5], [5, 2]]), EXPERTS)
    a_1RH, b_EOR, x_TH = draw(1, RANK, HIDDEN), draw(EXPERTS, OUT, RANK, seed=1), draw(2, HIDDEN, seed=2)
    y_PO = torch.zeros(4, OUT)
    add_expert_lora(y_PO, x_TH[routing.token_P], a_1RH, b_EOR, routing, None)
    for pair, (token, expert) in enumerate(zip(routing.token_P, routing.expert_P, strict=True)):
        torch.testing.assert_close(y_PO[pair], b_EOR[expert] @ (a_1RH[0] @ x_TH[token]), rtol=0, atol=1e-4)


def test_pairs_of_another_ranks_experts_are_left_out() -> None:
    routing = route(torch.tensor([[-1, 2], [0, -1]]), EXPERTS)
    assert routing.expert_P.tolist() == [0, 2]
    assert routing.token_P.tolist() == [1, 0]


@pytest.mark.parametrize("version", ["0.26.0", "0.32.0", "0.32.1+cpu", "0.32.0rc1"])
def test_known_release_families_are_supported(version: str) -> None:
    assert plugin.is_supported(version)


@pytest.mark.parametrize("version", ["0.25.9", "0.33.0", "0.3.2", "1.32.0", "dev", "0"])
def test_other_releases_are_not(version: str) -> None:
    assert not plugin.is_supported(version)


def test_an_unknown_release_is_left_alone_with_one_warning_and_a_known_one_is_changed_once() -> None:
    """In a process of its own: importing vLLM changes the process it is imported in."""
    program = """
from rollout.vllm_launch import block_cuda_builds; block_cuda_builds()
import vllm
import vllm.model_executor.layers.fused_moe.oracle.unquantized as oracle
from vllm.platforms import current_platform
import rollout.vllm_plugin as plugin

stock, known = oracle.select_unquantized_moe_backend, vllm.__version__
vllm.__version__ = "0.41.0"
plugin.register()
assert oracle.select_unquantized_moe_backend is stock

vllm.__version__ = known
plugin.register()
ours = oracle.select_unquantized_moe_backend
plugin.register()
assert ours is oracle.select_unquantized_moe_backend is not stock
assert current_platform.get_punica_wrapper() == "rollout.vllm_plugin.punica.SlotwiseWrapper"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    [warning] = [line for line in done.stderr.splitlines() if "lorasync" in line]
    assert "0.26, 0.32" in warning
    assert "0.41.0" in warning


def test_importing_the_plugin_imports_neither_vllm_nor_torch() -> None:
    program = "import sys, rollout.vllm_plugin; assert not {'vllm', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_the_linear_wrapper_does_what_stock_does_and_leaves_base_rows_alone() -> None:
    program = Path(__file__).with_name("wrapper_against_stock.py")
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
