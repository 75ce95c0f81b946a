"""One trained adapter, three readers: Megatron that trained it, vLLM that loads it, transformers that merges it.

The adapter goes the whole way: optimizer steps in the trainer's policy, publisher, store, verified fetch, vLLM's API.
"""

import random
from pathlib import Path

import pytest
import torch
from engine_fixtures import loaded
from safetensors.torch import load_file
from tiny_model import ATTENTION, MOE, VOCAB, hf_logp, load_hf, merge_into_hf

from publisher.epochs import claim_epoch
from publisher.publisher import Publisher
from rollout.engine import VllmEngine
from rollout.proof import gap
from shared.base_model import identify, read_base_config
from shared.catalog import Catalog
from shared.config import Config, LoraConfig, ModelConfig, StoreConfig, TaskConfig, TrainConfig
from shared.fetch import WEIGHTS, fetch
from shared.layout import Layout
from shared.peft_names import expected_tensors
from shared.stores import open_store
from shared.trajectories import Sample
from shared.versions import Version
from trainer.batch import make_batch
from trainer.policy import Policy

pytestmark = [pytest.mark.engine, pytest.mark.megatron]

TOLERANCE = 1e-4  # nats a token, fp32
STEPS = 3
TRAIN = TrainConfig(lr=3e-2, warmup_steps=0)


def random_groups(seed: int, count: int = 4, size: int = 4) -> list[tuple[Sample, ...]]:
    """Groups of made-up completions with unequal rewards."""
    rng = random.Random(seed)

    def sample(group: int, member: int) -> Sample:
        tokens = tuple(rng.randrange(3, VOCAB) for _ in range(rng.randint(2, 6)))
        logprobs = tuple(-rng.uniform(3.0, 6.0) for _ in tokens)
        versions = (Version(1, 0),) * len(tokens)
        return Sample(
            f"g{group}", f"p{group}", (1, 5 + group, 9), tokens, logprobs, versions, float(member % 2), True, "n"
        )

    return [tuple(sample(group, member) for member in range(size)) for group in range(count)]


@pytest.mark.parametrize("targets", [ATTENTION, MOE, ATTENTION + MOE], ids=["attention", "experts", "all linear"])
def test_a_trained_version_gives_the_same_logprobs_in_megatron_vllm_and_transformers(
    targets: tuple[str, ...], tiny_hf: Path, vllm_engine: VllmEngine, tmp_path: Path
) -> None:
    url, lora = f"file://{tmp_path / 'store'}", LoraConfig(rank=8, alpha=16, targets=targets)
    config = Config(
        StoreConfig(url),
        ModelConfig(str(tiny_hf)),
        TaskConfig("-", "-", "-", 8),
        lora,
        TrainConfig(lr=3e-2, warmup_steps=0),
    )
    policy = Policy(config)
    batch = make_batch(random_groups(seed=0), policy.device)
    for step in range(1, STEPS + 1):
        policy.update(batch, step)
    store, layout = open_store(url), Layout("policy")
    publisher = Publisher(
        store,
        layout,
        claim_epoch(store, layout),
        base_path=str(tiny_hf),
        base=identify(tiny_hf),
        lora=lora,
        parallel={"tp": 1},
    )
    publisher.submit(1, policy.slices(), training={"step": STEPS}, canary=policy.canary())
    publisher.close()

    manifest = Catalog(store, "policy").manifest(Version(1, 1))
    canary = manifest.canary
    assert canary is not None
    expected = expected_tensors(read_base_config(tiny_hf), targets, lora.rank)
    directory = fetch(store, manifest, expected, tmp_path / "adapter", base_name="tiny")
    tokens_BT = torch.tensor(canary.sequences)
    model = load_hf(tiny_hf)
    base = hf_logp(model, tokens_BT).tolist()
    adapter = {name: value.float() for name, value in load_file(directory / WEIGHTS).items()}
    merged = hf_logp(merge_into_hf(model, adapter, manifest.lora.wire_alpha / manifest.lora.rank), tokens_BT).tolist()
    with loaded(vllm_engine, directory) as name:
        served = vllm_engine.score(name, [list(sequence) for sequence in canary.sequences])

    assert gap(canary.logprobs, base) > 100 * TOLERANCE, "three optimizer steps should matter"
    assert gap(canary.logprobs, merged) < TOLERANCE
    assert gap(canary.logprobs, served) < TOLERANCE
    assert gap(served, merged) < TOLERANCE
    assert policy.base_unchanged()
