"""Groups of trajectories as the padded tensors of one optimizer step.

Shapes: K groups of G completions, B = K * G sequences in the order given, T tokens of the longest prompt with its
completion, S = T - 1 predicted positions: entry [b, s] is about tokens[b, s + 1].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.trajectories import Sample
from trainer.grpo import group_advantages

PADDING = 0  # any id would do: nothing looks at it


@dataclass(frozen=True)
class Batch:
    """What the loss needs.

    Args:
        tokens_BT: prompt, completion, padding on the right.
        behaviour_BS: the sampler's log-probabilities in nats; 0 where mask_BS is false.
        mask_BS: true where the predicted token was generated.
        adv_B: advantages.
        mean_reward: over all completions.
    """

    tokens_BT: Tensor
    behaviour_BS: Tensor
    mask_BS: Tensor
    adv_B: Tensor
    mean_reward: float


def make_batch(groups: Sequence[Sequence[Sample]], device: torch.device | str = "cpu") -> Batch:
    """Lay out groups, all of one size, as tensors."""
    samples = [sample for group in groups for sample in group]
    T = max(len(sample.prompt_tokens) + len(sample.tokens) for sample in samples)
    tokens_BT = torch.full((len(samples), T), PADDING)
    behaviour_BS = torch.zeros(len(samples), T - 1)
    mask_BS = torch.zeros(len(samples), T - 1, dtype=torch.bool)
    for row, sample in enumerate(samples):
        whole = sample.prompt_tokens + sample.tokens
        tokens_BT[row, : len(whole)] = torch.tensor(whole)
        generated = slice(len(sample.prompt_tokens) - 1, len(whole) - 1)
        behaviour_BS[row, generated] = torch.tensor(sample.logprobs)
        mask_BS[row, generated] = True
    reward_KG = torch.tensor([[sample.reward for sample in group] for group in groups])
    return Batch(
        tokens_BT=tokens_BT.to(device),
        behaviour_BS=behaviour_BS.to(device),
        mask_BS=mask_BS.to(device),
        adv_B=group_advantages(reward_KG).to(device),
        mean_reward=float(reward_KG.mean()),
    )
