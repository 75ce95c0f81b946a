"""The learning rate over a training of 13 steps, 3 of them warm-up."""

from itertools import pairwise

import pytest

from shared.config import TrainConfig
from trainer.policy import learning_rate

TRAIN = TrainConfig(steps=13, warmup_steps=3, lr=6.0)


def test_it_rises_linearly_and_then_stays():
    assert [learning_rate(TRAIN, step) for step in (1, 2, 3, 4, 13)] == [2.0, 4.0, 6.0, 6.0, 6.0]


def test_a_cosine_is_half_way_down_half_way_through_and_the_last_step_still_learns():
    cosine = TrainConfig(steps=13, warmup_steps=3, lr=6.0, lr_schedule="cosine")
    rates = [learning_rate(cosine, step) for step in range(1, 14)]
    assert rates[:3] == [2.0, 4.0, 6.0]
    assert all(later < earlier for earlier, later in pairwise(rates[2:]))
    # Eleven intervals from step 3 to the zero at step 14; 8.5 would be half way.
    assert (rates[7] + rates[8]) / 2 == pytest.approx(3.0)
    assert 0 < rates[-1] < 0.2


def test_without_warm_up_the_first_step_has_the_full_rate():
    assert learning_rate(TrainConfig(steps=5, warmup_steps=0, lr=6.0), 1) == 6.0
