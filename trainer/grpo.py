"""The objective: group-normalised advantages (GRPO) and the decoupled PPO loss, on tensors alone.

Three policies meet in the loss. The behaviour policy made the tokens (vLLM, some versions ago), the proximal policy is
the trainer's before this batch, the current policy is the one being trained.

Shapes: K groups (prompts), G completions of each, B = K * G sequences, T generated positions, right-padded.
Sources: GRPO, DeepSeekMath (arXiv 2402.03300) eq. 3 and 4; decoupled loss, Hilton et al. (arXiv 2110.00641) eq. 2 and
AReaL (arXiv 2505.24298) eq. 5; asymmetric clip and token mean, DAPO (arXiv 2503.14476) eq. 8 and 12.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def group_advantages(reward_KG: Tensor, eps: float = 1e-4) -> Tensor:
    """Normalise rewards within their group: (r - mean) / (std + eps), with the population's std.

    Returns:
        adv_B, groups one after another. A group whose rewards are all equal gives zeros.
    """
    centred_KG = reward_KG - reward_KG.mean(dim=1, keepdim=True)
    centred_KG = centred_KG * (reward_KG != reward_KG[:, :1]).any(dim=1, keepdim=True)
    return (centred_KG / (reward_KG.std(dim=1, keepdim=True, correction=0) + eps)).flatten()


@dataclass(frozen=True)
class Objective:
    """The constants of the loss.

    Args:
        clip_low, clip_high: the ratio current/proximal counts within [1 - clip_low, 1 + clip_high]. Where a batch is
            one step, as in `trainer.policy`, the ratio is 1 and they have no effect.
        behaviour_cap: the weight proximal/behaviour of a token is cut off here (truncated importance sampling).
        kl_coefficient: weight of the KL term; 0 leaves it out.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    behaviour_cap: float = 2.0
    kl_coefficient: float = 0.0


@dataclass(frozen=True)
class Loss:
    """`total` carries the gradient; the rest are means over the tokens that count, for the log."""

    total: Tensor
    clipped_fraction: float
    behaviour_weight: float
    kl_to_behaviour: float


def decoupled_loss(
    objective: Objective,
    current_BT: Tensor,
    proximal_BT: Tensor,
    behaviour_BT: Tensor,
    adv_B: Tensor,
    mask_BT: Tensor,
    reference_BT: Tensor | None = None,
) -> Loss:
    """Compute, averaged over the tokens that count,

        - min(pi_prox / pi_behave, cap) * min(rho A, clip(rho, 1 - low, 1 + high) A) + kl * (e^d - d - 1)

    with rho = pi_current / pi_prox and d = log pi_ref - log pi_current (Schulman's k3 estimator, never negative).

    Args:
        current_BT: log-probabilities in nats, with gradient; all other tensors are taken as constants.
        mask_BT: bool, true for generated tokens; what the others hold, even NaN, has no effect.
        reference_BT: the base model's log-probabilities; needed where kl_coefficient is not 0.
    """
    count = mask_BT.sum().clamp(min=1)
    drift_BT = (proximal_BT - behaviour_BT).detach().masked_fill(~mask_BT, 0.0)
    weight_BT = drift_BT.exp().clamp(max=objective.behaviour_cap)
    ratio_BT = (current_BT - proximal_BT.detach()).masked_fill(~mask_BT, 0.0).exp()
    clipped_BT = ratio_BT.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    adv_B1 = adv_B[:, None]
    loss_BT = -weight_BT * torch.minimum(ratio_BT * adv_B1, clipped_BT * adv_B1)
    if objective.kl_coefficient:
        if reference_BT is None:
            raise ValueError("kl_coefficient is not 0, so reference_BT is needed")
        d_BT = (reference_BT.detach() - current_BT).masked_fill(~mask_BT, 0.0)
        loss_BT = loss_BT + objective.kl_coefficient * (d_BT.exp() - d_BT - 1)
    bound_BT = (ratio_BT * adv_B1 > clipped_BT * adv_B1) & mask_BT
    return Loss(
        total=(loss_BT * mask_BT).sum() / count,
        clipped_fraction=float(bound_BT.sum() / count),
        behaviour_weight=float((weight_BT * mask_BT).sum() / count),
        kl_to_behaviour=float(-drift_BT.sum() / count),
    )
