"""The objective against numbers worked out by hand."""

import math

import pytest
import torch

from trainer.grpo import Objective, decoupled_loss, group_advantages

PLAIN = Objective(clip_low=0.2, clip_high=0.28, behaviour_cap=2.0)


def logs(*rows: list[float]) -> torch.Tensor:
    """Log-probabilities from probabilities."""
    return torch.tensor(rows, dtype=torch.float64).log()


def loss_of(current, proximal, behaviour, advantage, objective=PLAIN, **more):
    current = logs([current]).requires_grad_(True)
    result = decoupled_loss(
        objective,
        current,
        logs([proximal]),
        logs([behaviour]),
        torch.tensor([advantage], dtype=torch.float64),
        torch.tensor([[True]]),
        **more,
    )
    return result, float(torch.autograd.grad(result.total, current)[0])


def test_advantages_of_a_group_are_its_rewards_in_standard_deviations():
    # Rewards 1, 0, 0, 0: mean 1/4, population variance 3/16.
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), eps=0.0)
    std = math.sqrt(3 / 16)
    assert advantages.tolist() == pytest.approx([0.75 / std, -0.25 / std, -0.25 / std, -0.25 / std])


def test_groups_are_normalised_apart_from_each_other_and_come_out_in_order():
    advantages = group_advantages(torch.tensor([[0.0, 2.0], [10.0, 10.5]]), eps=0.0)
    assert advantages.tolist() == pytest.approx([-1.0, 1.0, -1.0, 1.0])


def test_a_group_of_equal_rewards_teaches_nothing():
    # 0.1 * 3 is no exact mean of three 0.1 in fp32: without care the residue divided by eps would leak through.
    assert group_advantages(torch.full((2, 3), 0.1), eps=0.0 + 1e-12).tolist() == [0.0] * 6


def test_on_policy_the_loss_is_minus_the_advantage_and_so_is_its_gradient():
    result, gradient = loss_of([0.5], [0.5], [0.5], 1.5)
    assert (result.total.item(), gradient) == pytest.approx((-1.5, -1.5))
    assert (result.clipped_fraction, result.behaviour_weight, result.kl_to_behaviour) == (0.0, 1.0, 0.0)


def test_a_good_token_is_pushed_up_only_until_the_upper_clip():
    # rho = 0.6 / 0.4 = 1.5 > 1.28, advantage 1: the objective stands at 1.28 and has no slope.
    result, gradient = loss_of([0.6], [0.4], [0.4], 1.0)
    assert (result.total.item(), gradient, result.clipped_fraction) == pytest.approx((-1.28, 0.0, 1.0))


def test_a_bad_token_is_pushed_down_only_until_the_lower_clip():
    # rho = 0.5 < 0.8, advantage -1: min(-0.5, -0.8) = -0.8.
    result, gradient = loss_of([0.2], [0.4], [0.4], -1.0)
    assert (result.total.item(), gradient) == pytest.approx((0.8, 0.0))


def test_a_bad_token_that_became_likelier_is_never_clipped():
    # rho = 2, advantage -1: min(-2, -1.28) = -2.
    result, gradient = loss_of([0.8], [0.4], [0.4], -1.0)
    assert (result.total.item(), gradient, result.clipped_fraction) == pytest.approx((2.0, 2.0, 0.0))


def test_tokens_the_behaviour_policy_found_unlikely_weigh_more_up_to_the_cap():
    # proximal / behaviour = 0.6 / 0.4 = 1.5, below the cap of 2; then 0.6 / 0.1 = 6, cut to 2.
    assert loss_of([0.6], [0.6], [0.4], 1.0)[0].total.item() == pytest.approx(-1.5)
    result, gradient = loss_of([0.6], [0.6], [0.1], 1.0)
    assert (result.total.item(), gradient, result.behaviour_weight) == pytest.approx((-2.0, -2.0, 2.0))


def test_clipping_is_around_the_proximal_policy_not_the_behaviour_policy():
    # rho = 0.6 / 0.6 = 1 is free although current / behaviour = 1.5; the weight is 1.5.
    result, gradient = loss_of([0.6], [0.6], [0.4], 1.0)
    assert (result.clipped_fraction, gradient) == pytest.approx((0.0, -1.5))


def test_the_kl_term_is_schulmans_k3_to_the_reference():
    # d = log(0.2 / 0.4): e^d - d - 1 = 0.5 + log 2 - 1; its slope in log pi_current is 1 - e^d = 0.5.
    objective = Objective(kl_coefficient=0.1)
    result, gradient = loss_of([0.4], [0.4], [0.4], 0.0, objective, reference_BT=logs([0.2]))
    assert result.total.item() == pytest.approx(0.1 * (0.5 + math.log(2) - 1))
    assert gradient == pytest.approx(0.1 * 0.5)


def test_a_kl_term_without_a_reference_is_refused():
    with pytest.raises(ValueError, match="reference_BT"):
        loss_of([0.4], [0.4], [0.4], 0.0, Objective(kl_coefficient=0.1))


def test_the_mean_is_over_tokens_not_over_sequences():
    # Three tokens of advantage 1 and one of advantage -1: -(3 - 1) / 4, where a mean of means would give 0.
    logp_BT = logs([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
    mask_BT = torch.tensor([[True, True, True], [True, False, False]])
    adv_B = torch.tensor([1.0, -1.0], dtype=torch.float64)
    assert decoupled_loss(PLAIN, logp_BT, logp_BT, logp_BT, adv_B, mask_BT).total.item() == pytest.approx(-0.5)


def test_padding_has_no_effect_whatever_it_holds():
    current = logs([0.5, 0.3]).requires_grad_(True)
    behaviour = torch.tensor([[math.log(0.5), float("nan")]], dtype=torch.float64)
    proximal = torch.tensor([[math.log(0.5), float("inf")]], dtype=torch.float64)
    mask_BT = torch.tensor([[True, False]])
    result = decoupled_loss(PLAIN, current, proximal, behaviour, torch.ones(1, dtype=torch.float64), mask_BT)
    gradient = torch.autograd.grad(result.total, current)[0]
    assert result.total.item() == pytest.approx(-1.0)
    assert gradient.tolist() == [[-1.0, 0.0]]
