"""Megatron-Core with our LoRA against transformers with the adapter merged: the same per-token log-probabilities.

The adapter reaches transformers by the way it reaches vLLM: through `publisher.convert`, under its PEFT names.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import ATTENTION, MOE, VOCAB, build_tiny_model, hf_logp, load_hf, merge_into_hf, random_adapter
from torch import Tensor, nn

from publisher.convert import convert
from shared.base_model import read_base_config
from shared.peft_names import expected_tensors
from trainer.grpo import Objective, decoupled_loss
from trainer.hf_weights import base_digest, load_base
from trainer.lora import attach, named_lora, without_lora
from trainer.model import build_model, start_process_group, token_logp
from trainer.parallel_layout import ParallelLayout

pytestmark = pytest.mark.megatron

TOLERANCE = 1e-4  # nats
RANK, ALPHA = 8, 16


@pytest.fixture(scope="module", name="tokens_BT")
def random_tokens() -> Tensor:
    return torch.randint(3, VOCAB, (6, 20), generator=torch.Generator().manual_seed(7))


def policy(hf_dir: Path, targets: tuple[str, ...] = ()) -> nn.Module:
    start_process_group(ParallelLayout())
    hf_config = read_base_config(hf_dir)
    model = build_model(hf_config, ParallelLayout(), "float32")
    load_base(model, hf_config, hf_dir)
    if targets:
        attach(model, targets, RANK, ALPHA, seed=0)
    return model


def set_adapter(model: nn.Module, hf_dir: Path, adapter: dict[str, Tensor]) -> None:
    """Write an adapter into the model, through the views that the publisher reads."""
    for piece in convert(read_base_config(hf_dir), named_lora(model)):
        assert torch.equal(adapter[piece.name], adapter[(piece.name, *piece.aliases)[-1]])
        rows, columns = (slice(o, o + n) for o, n in zip(piece.offset, piece.tensor.shape, strict=True))
        piece.tensor.copy_(adapter[piece.name][rows, columns])


def get_adapter(model: nn.Module, hf_dir: Path) -> dict[str, Tensor]:
    pieces = list(convert(read_base_config(hf_dir), named_lora(model)))
    assert all(piece.offset == (0, 0) or "self_attn" in piece.name for piece in pieces)
    whole: dict[str, Tensor] = {}
    for piece in pieces:
        rows, columns = (slice(o, o + n) for o, n in zip(piece.offset, piece.tensor.shape, strict=True))
        for name in (piece.name, *piece.aliases):
            whole.setdefault(name, torch.full(piece.shape, float("nan")))[rows, columns] = piece.tensor
    return whole


def difference(model: nn.Module, hf_model: Any, tokens_BT: Tensor) -> float:
    with torch.no_grad():
        return float((token_logp(model, tokens_BT) - hf_logp(hf_model, tokens_BT)).abs().max())


def test_the_base_model_scores_as_transformers_does(tiny_hf: Path, tokens_BT: Tensor):
    assert difference(policy(tiny_hf), load_hf(tiny_hf), tokens_BT) < TOLERANCE


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_topk_prob": False, "num_experts_per_tok": 3},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}, "rms_norm_eps": 1e-5},
        {"tie_word_embeddings": True, "num_key_value_heads": 4},
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 80},
    ],
    ids=str,
)
def test_every_setting_of_the_config_is_carried_over(tmp_path: Path, tokens_BT: Tensor, changes: dict[str, Any]):
    hf_dir = build_tiny_model(tmp_path, seed=3, **({"num_hidden_layers": 2} | changes))
    assert difference(policy(hf_dir), load_hf(hf_dir), tokens_BT) < TOLERANCE


@pytest.mark.parametrize("targets", [ATTENTION, MOE, ATTENTION + MOE], ids=["attention", "experts", "all"])
def test_an_adapter_scores_as_transformers_with_merged_weights(
    tiny_hf: Path, tokens_BT: Tensor, targets: tuple[str, ...]
):
    model, reference = policy(tiny_hf, targets), load_hf(tiny_hf)
    adapter = random_adapter(tiny_hf, targets, RANK, seed=1)
    set_adapter(model, tiny_hf, adapter)
    effect = (hf_logp(reference, tokens_BT) - hf_logp(merge_into_hf(reference, adapter, ALPHA / RANK), tokens_BT)).abs()
    assert float(effect.max()) > 1000 * TOLERANCE
    assert difference(model, reference, tokens_BT) < TOLERANCE


def test_converted_names_are_the_expected_ones_and_hold_the_bits_that_were_put_in(tiny_hf: Path):
    model, targets = policy(tiny_hf, ATTENTION + MOE), ATTENTION + MOE
    adapter = random_adapter(tiny_hf, targets, RANK, seed=2)
    set_adapter(model, tiny_hf, adapter)
    found = get_adapter(model, tiny_hf)
    assert {name: tuple(t.shape) for name, t in found.items()} == expected_tensors(
        read_base_config(tiny_hf), targets, RANK
    )
    assert all(torch.equal(found[name], adapter[name]) for name in adapter)


def test_after_optimizer_steps_the_adapter_still_agrees_and_the_base_is_bit_identical(tiny_hf: Path, tokens_BT: Tensor):
    model = policy(tiny_hf)
    before = base_digest(model)
    attach(model, ATTENTION + MOE, RANK, ALPHA, seed=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    with torch.no_grad():
        behaviour_BS = token_logp(model, tokens_BT)
    adv_B = torch.linspace(-1, 1, len(tokens_BT))
    for _ in range(2):
        current_BS = token_logp(model, tokens_BT)
        mask_BS = torch.ones_like(current_BS, dtype=torch.bool)
        loss = decoupled_loss(Objective(), current_BS, current_BS.detach(), behaviour_BS, adv_B, mask_BS)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    with torch.no_grad():
        moved = (token_logp(model, tokens_BT) - behaviour_BS).abs().max()
    assert float(moved) > 1000 * TOLERANCE
    assert base_digest(model) == before
    reference = merge_into_hf(load_hf(tiny_hf), get_adapter(model, tiny_hf), ALPHA / RANK)
    assert difference(model, reference, tokens_BT) < TOLERANCE
    with without_lora(model):
        assert difference(model, load_hf(tiny_hf), tokens_BT) < TOLERANCE


def test_padding_on_the_right_does_not_reach_the_tokens_before_it(tiny_hf: Path, tokens_BT: Tensor):
    model = policy(tiny_hf, ATTENTION + MOE)
    set_adapter(model, tiny_hf, random_adapter(tiny_hf, ATTENTION + MOE, RANK, seed=1))
    padded_BT = torch.nn.functional.pad(tokens_BT, (0, 9))
    with torch.no_grad():
        short_BS, long_BS = token_logp(model, tokens_BT), token_logp(model, padded_BT)
    assert float((short_BS - long_BS[:, : short_BS.shape[1]]).abs().max()) < 1e-5
