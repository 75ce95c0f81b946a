"""What vLLM says of every token, base or adapter, alone or mixed, held to transformers with merged weights."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch
from engine_fixtures import loaded, write_adapter
from tiny_model import ATTENTION, MOE, hf_logp, load_hf, merge_into_hf, random_adapter

from rollout.engine import Completion, VllmEngine

pytestmark = pytest.mark.engine

TOLERANCE = 1e-4  # nats a token, fp32
RANK, ALPHA = 8, 16
KINDS = {"attention only": ATTENTION, "experts only": MOE, "all linear": ATTENTION + MOE}


def draw_sequences(count: int, length: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 98, (count, length), generator=generator).tolist()


def reference(tiny_hf: Path, targets: Sequence[str], seed: int, sequences: list[list[int]]) -> list[list[float]]:
    """transformers with the adapter merged; no targets: the base model."""
    model = load_hf(tiny_hf)
    if targets:
        merge_into_hf(model, random_adapter(tiny_hf, tuple(targets), RANK, seed), ALPHA / RANK)
    return [hf_logp(model, torch.tensor([sequence]))[0].tolist() for sequence in sequences]


def gap(a: list[list[float]], b: list[list[float]]) -> float:
    return max(abs(x - y) for row_a, row_b in zip(a, b, strict=True) for x, y in zip(row_a, row_b, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_adapter_scores_as_merged_weights_do(
    kind: str, tiny_hf: Path, vllm_engine: VllmEngine, tmp_path: Path
) -> None:
    sequences = draw_sequences(4, 32, seed=0)
    directory = write_adapter(tmp_path / "adapter", tiny_hf, KINDS[kind], seed=1, rank=RANK, alpha=ALPHA)
    with loaded(vllm_engine, directory) as name:
        served = vllm_engine.score(name, sequences)
    assert gap(served, reference(tiny_hf, KINDS[kind], 1, sequences)) < TOLERANCE
    assert gap(served, vllm_engine.score("base", sequences)) > 0.1, "the adapter should matter"


def test_the_base_model_scores_as_transformers_does(tiny_hf: Path, vllm_engine: VllmEngine) -> None:
    sequences = draw_sequences(4, 32, seed=2)
    assert gap(vllm_engine.score("base", sequences), reference(tiny_hf, (), 0, sequences)) < TOLERANCE


def test_two_adapters_and_the_base_in_one_batch_do_not_touch_each_other(
    tiny_hf: Path, vllm_engine: VllmEngine, tmp_path: Path
) -> None:
    """Stock vLLM on a CPU gives the base's rows the last slot's delta here. 40 decode steps run side by side."""
    everything = ATTENTION + MOE
    first = write_adapter(tmp_path / "first", tiny_hf, everything, seed=1, rank=RANK, alpha=ALPHA)
    second = write_adapter(tmp_path / "second", tiny_hf, MOE, seed=2, rank=RANK, alpha=ALPHA)
    prompts = draw_sequences(4, 8, seed=3)
    start = Barrier(3)

    def sample(model: str) -> list[list[Completion]]:
        start.wait(timeout=30)
        return vllm_engine.complete(model, prompts, n=4, max_tokens=40, temperature=1.0)

    with loaded(vllm_engine, first) as a, loaded(vllm_engine, second) as b, ThreadPoolExecutor(3) as pool:
        groups = dict(zip(("base", "a", "b"), pool.map(sample, ("base", a, b)), strict=True))

    for name, targets, seed in (("base", (), 0), ("a", everything, 1), ("b", MOE, 2)):
        pairs = [(prompt, c) for prompt, group in zip(prompts, groups[name], strict=True) for c in group]
        expected = reference(tiny_hf, targets, seed, [[*prompt, *c.token_ids] for prompt, c in pairs])
        new_tokens = [row[len(prompt) - 1 :] for row, (prompt, _) in zip(expected, pairs, strict=True)]
        assert gap([list(c.logprobs) for _, c in pairs], new_tokens) < TOLERANCE, name


def test_greedy_decoding_follows_the_merged_models_argmax(
    tiny_hf: Path, vllm_engine: VllmEngine, tmp_path: Path
) -> None:
    everything = ATTENTION + MOE
    directory = write_adapter(tmp_path / "adapter", tiny_hf, everything, seed=4, rank=RANK, alpha=ALPHA)
    prompts = draw_sequences(8, 8, seed=5)
    with loaded(vllm_engine, directory) as name:
        completions = [group[0] for group in vllm_engine.complete(name, prompts, n=1, max_tokens=16, temperature=0.0)]
    model = merge_into_hf(load_hf(tiny_hf), random_adapter(tiny_hf, everything, RANK, 4), ALPHA / RANK)
    for prompt, completion in zip(prompts, completions, strict=True):
        tokens = [*prompt, *completion.token_ids]
        with torch.no_grad():
            best = model(torch.tensor([tokens])).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
        assert list(completion.token_ids) == best
        assert completion.finish_reason == ("stop" if completion.token_ids[-1] == 2 else "length")
