"""Building the policy: what is refused, what is accounted for, and what initial values depend on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import ATTENTION, EXPERTS, LAYERS, MOE
from torch import nn

from shared.base_model import read_base_config
from shared.errors import Corrupt, UsageError
from trainer.hf_weights import HfCheckpoint, base_digest, base_parameters, load_base
from trainer.lora import attach, initial_factor, named_lora
from trainer.model import build_model, start_process_group
from trainer.parallel_layout import ParallelLayout
from trainer.qwen3_moe import rotary_base, settings

pytestmark = pytest.mark.megatron


@pytest.fixture
def hf_config(tiny_hf: Path) -> dict[str, Any]:
    start_process_group(ParallelLayout())
    return read_base_config(tiny_hf)


@pytest.fixture
def model(hf_config: dict[str, Any], tiny_hf: Path) -> nn.Module:
    model = build_model(hf_config, ParallelLayout(), "float32")
    load_base(model, hf_config, tiny_hf)
    return model


@pytest.fixture
def altered(tiny_hf: Path, tmp_path: Path):
    """A copy of the checkpoint whose tensors a test may change before loading."""
    shutil.copytree(tiny_hf, tmp_path, dirs_exist_ok=True)

    def load(change) -> None:
        tensors = load_file(tmp_path / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors")
        hf_config = read_base_config(tmp_path)
        load_base(build_model(hf_config, ParallelLayout(), "float32"), hf_config, tmp_path)

    start_process_group(ParallelLayout())
    return load


def test_an_unknown_model_type_is_refused_naming_those_known(hf_config: dict[str, Any]):
    with pytest.raises(UsageError, match=r"unknown model_type 'llama'.*Known: qwen3_moe"):
        build_model(hf_config | {"model_type": "llama"}, ParallelLayout(), "float32")


@pytest.mark.parametrize(
    "change",
    [
        {"attention_bias": True},
        {"hidden_act": "gelu"},
        {"mlp_only_layers": [0]},
        {"decoder_sparse_step": 2},
        {"use_sliding_window": True},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"num_experts_per_tok": 1},
        {"num_experts": None},
    ],
    ids=str,
)
def test_a_setting_that_is_not_carried_over_is_refused_not_ignored(hf_config: dict[str, Any], change: dict[str, Any]):
    with pytest.raises(UsageError, match=next(iter(change)) if "tok" not in str(change) else "one expert per token"):
        settings(hf_config | change)


def test_rope_theta_is_read_from_configs_of_transformers_4_and_5():
    assert rotary_base({"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}) == 5e6
    assert rotary_base({"rope_theta": 1e6}) == 1e6
    with pytest.raises(UsageError, match="rope type 'yarn'"):
        rotary_base({"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e6}})
    with pytest.raises(UsageError, match="rope_theta is missing"):
        rotary_base({})


def test_a_missing_tensor_is_named(altered):
    with pytest.raises(Corrupt, match=r"tensor missing.*experts\.3\.up_proj"):
        altered(lambda tensors: tensors.pop("model.layers.1.mlp.experts.3.up_proj.weight"))


def test_a_tensor_that_the_model_type_does_not_have_is_named(altered):
    with pytest.raises(Corrupt, match=r"not part of this model type.*model\.layers\.4\.extra"):
        altered(lambda tensors: tensors.update({"model.layers.4.extra.weight": torch.zeros(2)}))


def test_a_tensor_of_another_shape_is_named(altered):
    with pytest.raises(Corrupt, match=r"shape \(128, 64\), config.json says \(128, 128\).*output_layer"):
        altered(lambda tensors: tensors.update({"lm_head.weight": torch.zeros(128, 64)}))


def test_a_directory_without_weights_is_the_callers_mistake(
    model: nn.Module, hf_config: dict[str, Any], tmp_path: Path
):
    with pytest.raises(UsageError, match="no safetensors checkpoint"):
        load_base(model, hf_config, tmp_path)


def test_a_damaged_file_is_corrupt(model: nn.Module, hf_config: dict[str, Any], tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(Corrupt, match="unreadable checkpoint"):
        load_base(model, hf_config, tmp_path)


def test_a_checkpoint_in_several_files_loads_to_the_same_bits(
    model: nn.Module, hf_config, tiny_hf: Path, tmp_path: Path
):
    tensors = load_file(tiny_hf / "model.safetensors")
    weight_map = {name: f"model-{number % 3}.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({name: t for name, t in tensors.items() if weight_map[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    again = build_model(hf_config, ParallelLayout(), "float32")
    load_base(again, hf_config, tmp_path)
    assert base_digest(again) == base_digest(model)


def test_the_base_digest_sees_one_flipped_bit_and_does_not_see_lora(model: nn.Module):
    before = base_digest(model)
    attach(model, ATTENTION + MOE, rank=4, alpha=8, seed=0)
    assert base_digest(model) == before
    _, parameter = next(base_parameters(model))
    parameter.detach().view(torch.int32).flatten()[0] ^= 1
    assert base_digest(model) != before


def test_only_lora_factors_are_trained_and_they_are_fp32(model: nn.Module):
    count = attach(model.bfloat16(), ATTENTION + MOE, rank=4, alpha=8, seed=0)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert count == sum(p.numel() for p in trained.values())
    assert len(trained) == 2 * LAYERS * (2 + 2 * EXPERTS)
    assert all(".lora_" in name and p.dtype == torch.float32 for name, p in trained.items())


def test_initial_factors_depend_on_seed_and_global_name_alone(model: nn.Module):
    attach(model, ("linear_fc1",), rank=4, alpha=8, seed=5)
    for lora in named_lora(model):
        assert torch.equal(
            lora.lora_A, initial_factor(f"layers.{lora.layer}.experts.{lora.expert}.linear_fc1", 4, 128, 5)
        )
        assert not lora.lora_B.any()
    assert not torch.equal(initial_factor("a", 4, 128, 5), initial_factor("b", 4, 128, 5))
    assert not torch.equal(initial_factor("a", 4, 128, 5), initial_factor("a", 4, 128, 6))


def test_initial_factors_follow_pefts_kaiming_uniform():
    lora_A = initial_factor("layers.0.linear_qkv", 64, 100, seed=0)
    assert float(lora_A.abs().max()) <= 0.1
    assert float(lora_A.std()) == pytest.approx(0.1 / 3**0.5, rel=0.02)


@pytest.mark.parametrize("targets", [("linear_qvk",), ()])
def test_an_unknown_or_empty_list_of_targets_is_refused(model: nn.Module, targets: tuple[str, ...]):
    with pytest.raises(UsageError, match=r"unknown LoRA target.*linear_qkv, linear_proj"):
        attach(model, targets, rank=4, alpha=8, seed=0)


def test_a_rank_below_one_is_refused(model: nn.Module):
    with pytest.raises(UsageError, match="at least 1"):
        attach(model, ATTENTION, rank=0, alpha=8, seed=0)


def test_ranks_that_cannot_form_the_layout_are_counted_out():
    with pytest.raises(UsageError, match="= 2 ranks, but 1 were started"):
        start_process_group(ParallelLayout(tp=2))
    with pytest.raises(UsageError, match="does not divide"):
        ParallelLayout(tp=2, ep=4).check(world_size=2)


def test_more_ranks_than_one_are_refused_in_so_many_words(monkeypatch: pytest.MonkeyPatch):
    start_process_group(ParallelLayout())
    monkeypatch.setattr("trainer.model.dist.get_world_size", lambda: 2)
    with pytest.raises(UsageError, match="trains on one rank, and 2 were started"):
        start_process_group(ParallelLayout())


def test_weights_that_cannot_be_read_are_the_callers_mistake(tmp_path: Path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(UsageError, match="cannot read the checkpoint"):
        HfCheckpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").mkdir()
    with pytest.raises(UsageError, match="cannot read the checkpoint"):
        HfCheckpoint(tmp_path)
