"""Trajectories as tensors, worked out by hand."""

import random

import torch
from trajectory_fleet import make_group

from shared.versions import Version
from trainer.batch import make_batch


def group(**changes):
    return make_group(Version(1, 0), "g", random.Random(0), size=2, **changes)


def test_prompt_completion_and_padding_stand_where_the_scores_expect_them():
    versions = (Version(1, 0),) * 2
    short = group(prompt_tokens=(5, 6), tokens=(7, 2), logprobs=(-0.5, -1.0), token_versions=versions)
    long = group(prompt_tokens=(5, 6, 8), tokens=(9, 2), logprobs=(-0.25, -2.0), token_versions=versions)
    batch = make_batch([short, long])
    assert batch.tokens_BT.tolist() == [[5, 6, 7, 2, 0]] * 2 + [[5, 6, 8, 9, 2]] * 2
    # Entry s is about token s + 1: the first generated token of (5, 6 | 7, 2) is token 2, so entry 1.
    assert batch.mask_BS.tolist() == [[False, True, True, False]] * 2 + [[False, False, True, True]] * 2
    assert batch.behaviour_BS.tolist() == [[0.0, -0.5, -1.0, 0.0]] * 2 + [[0.0, 0.0, -0.25, -2.0]] * 2


def test_advantages_are_normalised_per_group_and_the_mean_reward_is_over_all():
    first, second = group(), group(reward=0.5)
    first = [sample.__class__(**{**vars(sample), "reward": float(i)}) for i, sample in enumerate(first)]
    batch = make_batch([first, second])
    assert torch.allclose(batch.adv_B, torch.tensor([-1.0, 1.0, 0.0, 0.0]), atol=1e-3)
    assert batch.mean_reward == 0.5
