"""The equations, one by one, against numbers worked out by hand or by numpy."""

import math
from itertools import product

import numpy as np
import pytest
import torch

from seeupo_trl.update.objective import (
    batch_advantages,
    center_by_group,
    clipped_surrogate,
    fold_in_ratio,
    groups_without_variance,
    k3_divergence,
    keep_on_policy,
    normalize_over_batch,
    sampler_correction,
    sequence_log_ratios,
)


def test_advantage_is_the_distance_to_the_mean_of_the_group():
    advantages = center_by_group(torch.tensor([1.0, 3.0, 10.0, 20.0]), group_size=2)
    assert advantages.tolist() == [-1.0, 1.0, -5.0, 5.0]
    assert advantages.dtype == torch.float64


def test_equal_rewards_leave_exactly_no_advantage():
    rewards = torch.full((7,), 0.1, dtype=torch.float64)  # the mean of seven 0.1 is not 0.1 in floating point
    assert not center_by_group(rewards, group_size=7).any()


def test_trajectory_without_reward_stays_out_of_its_group_mean():
    advantages = center_by_group(torch.tensor([1.0, math.nan, 3.0, 5.0, 5.0, math.nan]), group_size=3)
    assert advantages[[0, 2]].tolist() == [-1.0, 1.0]
    assert advantages[[3, 4]].tolist() == [0.0, 0.0]
    assert advantages[[1, 5]].isnan().all()


def test_normalisation_is_over_the_batch_with_the_unbiased_standard_deviation():
    advantages = torch.tensor([-1.0, 1.0, -5.0, 5.0, 0.5], dtype=torch.float64)
    values = advantages.numpy()
    expected = (values - values.mean()) / values.std(ddof=1)
    np.testing.assert_allclose(normalize_over_batch(advantages).numpy(), expected, rtol=1e-12)


def test_group_without_variance_has_exactly_no_advantage_after_normalisation():
    """Its turns would otherwise be trained on rounding, and AdamW would step by its momentum."""
    rewards = torch.tensor([1.0, 1.0, 1.0, 0.0, 3.0, 1.0, 0.0, 1.0, 1.0, 0.1, 0.3, 0.2])
    advantages = center_by_group(rewards, group_size=3)
    assert advantages.mean() != 0  # thirds do not add up to exactly 0
    assert normalize_over_batch(advantages)[:3].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("values", [[0.0, 0.0, 0.0], [2.0, 2.0], [3.0]])
def test_advantages_that_do_not_vary_become_zero(values):
    assert not normalize_over_batch(torch.tensor(values)).any()


def test_normalisation_passes_over_missing_advantages():
    normalized = normalize_over_batch(torch.tensor([-1.0, 1.0, math.nan]))
    assert normalized[2].isnan()
    torch.testing.assert_close(normalized[:2], torch.tensor([-1.0, 1.0]) / math.sqrt(2))


def test_functions_that_trade_off_cancel_before_they_are_normalised_and_teach_after():
    # the sum of the first two groups is constant, the third is constant in both, in the fourth one function counts
    rewards = torch.tensor(
        [[0.0, 1.0], [1.0, 0.0], [0.25, 0.75], [0.5, 0.5], [0.25, 0.5], [0.25, 0.5], [0.0, 0.0], [0.0, 7.0]]
    ).double()
    weights = torch.ones(2)
    expected = {"sum": [True, True, True, False], "each": [False, False, True, False]}
    for normalize, per_function in product([True, False], repeat=2):
        options = {"normalize": normalize, "per_function": per_function}
        advantages = batch_advantages(rewards, weights, 2, **options)
        found = groups_without_variance(rewards, weights, 2, per_function=per_function).tolist()
        assert found == (advantages.view(-1, 2) == 0).all(dim=1).tolist()
        assert found == expected["each" if per_function else "sum"]
        one = groups_without_variance(rewards, torch.tensor([1.0, 0.0]), 2, per_function=per_function)
        assert one.tolist()[2:] == [True, True]


def test_rounding_of_functions_that_cancel_is_no_advantage():
    first = torch.tensor([0.1, 0.3, 0.7, 0.2, 0.9, 0.4], dtype=torch.float64)
    rewards = torch.stack([first, first], dim=1)
    for normalize, weights in product([True, False], ([1.0, -1.0], [0.3, -0.3])):
        options = {"normalize": normalize, "per_function": True}
        assert not batch_advantages(rewards, torch.tensor(weights), 3, **options).any()
    rewards[:, 1] = 1 - first
    assert not batch_advantages(rewards, torch.ones(2), 3, normalize=False).any()


def test_functions_normalised_each_by_itself_have_the_same_scale_whatever_is_done_with_a_plain_sum():
    """The second function is large, and would be all of the sum."""
    rewards = torch.tensor([[1.0, 0.0], [0.0, 100.0], [0.0, 100.0], [1.0, 400.0]]).double()
    centred = rewards - torch.tensor([[0.5, 50.0], [0.5, 50.0], [0.5, 250.0], [0.5, 250.0]])
    each = (centred / centred.std(dim=0)).sum(dim=1)
    expected = each / each.std()
    for normalize in (True, False):
        found = batch_advantages(rewards, torch.ones(2), 2, normalize=normalize, per_function=True)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_sequence_ratio_is_normalised_by_length_unless_it_is_the_product():
    new, old = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.1])
    length = torch.tensor([2])
    assert sequence_log_ratios(new, old, length).item() == pytest.approx(0.3)
    assert sequence_log_ratios(new, old, length, "product").item() == pytest.approx(0.6)


def test_surrogate_is_the_pessimistic_bound():
    ratios = torch.tensor([1.5, 1.5, 0.5, 0.5])
    weights = torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert clipped_surrogate(ratios, weights, 0.2, 0.3).tolist() == pytest.approx([1.3, -1.5, 0.5, -0.8])


def test_delta_bounds_the_unclipped_ratio_from_above():
    surrogate = clipped_surrogate(torch.tensor([9.0]), torch.tensor([-1.0]), 0.2, 0.2, delta=4.0)
    assert surrogate.item() == -4.0


def test_k3_is_zero_for_equal_policies_and_positive_otherwise():
    new, ref = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-1.0, -2.0, -0.5])
    divergence = k3_divergence(new, ref)
    assert divergence[0] == 0
    assert divergence[1].item() == pytest.approx(math.exp(-1) + 1 - 1)
    assert divergence[2].item() == pytest.approx(math.exp(0.5) - 0.5 - 1)


def test_turn_weight_is_the_plain_product_without_a_clip():
    assert fold_in_ratio(1.5, math.log(2.0), clip=None) == pytest.approx(3.0)


def test_clip_bounds_each_ratio_and_the_running_product():
    assert fold_in_ratio(1.0, math.log(2.0), clip=0.2) == pytest.approx(1.2)
    assert fold_in_ratio(1.1, math.log(1.15), clip=0.2) == pytest.approx(1.2)
    assert fold_in_ratio(1.2, math.log(0.5), clip=0.2) == pytest.approx(0.96)
    assert fold_in_ratio(0.8, math.log(0.5), clip=0.2) == pytest.approx(0.8)


def test_turn_weight_stays_a_number_for_absurd_ratios():
    assert math.isfinite(fold_in_ratio(1.0, 1e6, clip=None))
    assert fold_in_ratio(1.0, -1e6, clip=None) > 0


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_truncate", (2.0 + 0.5 + 1.0) / 3),
        ("token_mask", (0.0 + 0.5 + 1.0) / 3),
        ("sequence_truncate", 2.0),
        ("sequence_mask", 0.0),
    ],
)
def test_sampler_correction_in_each_mode(mode, expected):
    policy = torch.tensor([8.0, 0.5, 1.0]).log()
    sampler = torch.tensor([0.0, 0.0, math.nan])  # a token the sampler did not score is not corrected
    # a second action, of which the sampler reported nothing
    policy, sampler = torch.cat([policy, policy[:2]]), torch.cat([sampler, torch.full((2,), math.nan)])
    weights = sampler_correction(policy, sampler, torch.tensor([3, 2]), mode, clip_min=None, clip_max=2.0)
    assert weights.tolist() == pytest.approx([expected, 1.0])


def test_off_policy_mask_drops_only_unlikely_actions_with_a_negative_weight():
    new, sampled = torch.tensor([-3.0, -3.0]), torch.tensor([-1.0, -1.0])
    new, sampled = new.repeat(2), sampled.repeat(2)  # two actions, the second with a positive weight
    weights, lengths = torch.tensor([-1.0, 1.0]), torch.tensor([2, 2])
    assert keep_on_policy(weights, new, sampled, lengths, threshold=0.5).tolist() == [0, 1]
    assert keep_on_policy(weights, new, sampled, lengths, threshold=2.5).tolist() == [1, 1]
