"""The committed base model: small, read alike by transformers and by its maker, right one time in four."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from rollout.tasks.prompts import load_prompts

ROOT = Path(__file__).parent.parent
ASSETS = ROOT / "rollout" / "demo" / "assets"
BASE = ASSETS / "base_model"


class Example(NamedTuple):
    """The modules of examples/chain_sum."""

    pretrain: ModuleType
    export: ModuleType
    model: ModuleType
    tokenizer: ModuleType


@pytest.fixture(scope="module")
def example() -> Iterator[Example]:
    sys.path.insert(0, str(ROOT / "examples" / "chain_sum"))
    import export
    import model
    import pretrain
    import tokenizer

    yield Example(pretrain, export, model, tokenizer)
    sys.path.remove(str(ROOT / "examples" / "chain_sum"))


def test_the_base_model_is_at_most_four_megabytes() -> None:
    assert sum(file.stat().st_size for file in BASE.iterdir()) <= 4_000_000


def test_the_checkpoint_has_one_bf16_tensor_per_expert_and_projection() -> None:
    with safe_open(BASE / "model.safetensors", "pt") as tensors:
        names = set(tensors.keys())
        assert {tensors.get_tensor(name).dtype for name in names} == {torch.bfloat16}
    experts = {
        f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"
        for layer in range(4)
        for expert in range(8)
        for projection in ("gate_proj", "up_proj", "down_proj")
    }
    assert experts <= names
    assert len(names) == len(experts) + 3 + 4 * 9


def test_transformers_and_the_examples_model_give_equal_logits(example: Example) -> None:
    reference = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, local_files_only=True).eval()
    weights = example.export.read_model(BASE)
    ids_NL = torch.randint(0, 128, (16, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected_NLV = reference(ids_NL).logits
    torch.testing.assert_close(
        example.model.forward(weights, ids_NL, torch.zeros(16, dtype=torch.long)),
        expected_NLV,
        atol=1e-4,
        rtol=0,
    )


def test_transformers_reads_the_tokenizer_as_it_was_meant(example: Example) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE, local_files_only=True)
    text = example.tokenizer.CHARACTERS
    assert tokenizer(text)["input_ids"] == [1, *example.tokenizer.encode(text)] == [1, *range(3, 98)]
    assert tokenizer.decode([1, *range(3, 98), 2], skip_special_tokens=True) == text
    assert tokenizer("é")["input_ids"] == [1, 98]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == 128 and all(tokenizer.decode([i]) for i in range(128))


def test_the_base_model_is_right_about_one_time_in_four(example: Example) -> None:
    heldout = load_prompts(str(ASSETS / "heldout.jsonl"), base_model=BASE)
    weights = example.export.read_model(BASE)
    reward = example.pretrain.heldout_reward(weights, heldout, temperature=1.0, repeats=4, seed=1)
    assert 0.18 <= reward <= 0.28


def test_pretraining_with_the_same_seed_gives_the_same_bytes(example: Example, tmp_path: Path) -> None:
    demonstrated, heldout = example.pretrain.make_prompts(64, 8)
    recipe = example.pretrain.Recipe(clean_steps=2, noisy_steps=2, batch=16)
    for name in ("first", "second"):
        weights = example.pretrain.pretrain(recipe, demonstrated, heldout)
        example.export.write_model(weights, tmp_path / name)
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes()
    first = example.export.read_model(tmp_path / "first")
    rounded = example.export.rounded(weights)
    assert first.keys() == rounded.keys()
    assert all(torch.equal(first[name], rounded[name]) for name in first)
