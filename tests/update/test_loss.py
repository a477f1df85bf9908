"""The loss of a micro-batch, action by action, against numbers worked out one action at a time."""

import math

import pytest
import torch

from seeupo_trl.update.loss import Actions, LossSettings, turn_loss


LENGTHS = [1, 3, 2]
OLD = [[-1.0], [-0.5, -2.0, -1.5], [-0.1, -0.2]]
NEW = [[-0.9], [-0.8, -2.5, -1.0], [-0.7, -0.9]]
WEIGHTS = [0.5, 1.5, -2.0]


def flat(rows):
    return torch.tensor([value for row in rows for value in row], dtype=torch.float64)


def reported_by_sampler(rows):
    """What the sampler says about each action, `None` where it says nothing."""
    rows = [[math.nan] * n if row is None else row for n, row in zip(LENGTHS, rows, strict=True)]
    return flat(rows)


def loss_of(sampled=None, start=None, **settings):
    actions = Actions(
        lengths=torch.tensor(LENGTHS),
        new=flat(NEW),
        old=flat(OLD),
        entropies=flat([[1.0], [2.0, 4.0, 6.0], [3.0, 5.0]]),
        start=start,
        sampled=sampled and reported_by_sampler(sampled),
        reference=flat(OLD),
    )
    settings = LossSettings(**{"epsilon_low": 0.2, "epsilon_high": 0.2, **settings})
    return turn_loss(actions, torch.tensor(WEIGHTS, dtype=torch.float64), settings)


def ratios():
    return [
        math.exp(sum(n - o for n, o in zip(*pair, strict=True)) / len(pair[0])) for pair in zip(NEW, OLD, strict=True)
    ]


def surrogates():
    pairs = zip(ratios(), WEIGHTS, strict=True)
    return [min(ratio * weight, min(max(ratio, 0.8), 1.2) * weight) for ratio, weight in pairs]


def test_every_action_has_the_ratio_and_the_surrogate_of_its_own_tokens():
    loss = loss_of()
    assert loss.ratios.tolist() == pytest.approx(ratios())
    assert loss.losses.tolist() == pytest.approx([-value for value in surrogates()])


def test_kl_and_entropy_are_means_over_the_tokens_of_an_action():
    loss = loss_of(beta=0.1, entropy_weight=0.01)
    k3 = [[math.exp(o - n) - (o - n) - 1 for n, o in zip(*pair, strict=True)] for pair in zip(NEW, OLD, strict=True)]
    assert loss.kl.tolist() == pytest.approx(list(map(sum, k3)))
    expected = [0.1 * sum(kl) / len(kl) - value for kl, value in zip(k3, surrogates(), strict=True)]
    assert loss.policy_losses.tolist() == pytest.approx(expected)
    entropies = [1.0, 4.0, 4.0]
    assert loss.losses.tolist() == pytest.approx([e - 0.01 * h for e, h in zip(expected, entropies, strict=True)])


@pytest.mark.parametrize("reported", [True, False])
def test_actions_far_from_the_sampler_with_a_negative_weight_are_masked(reported):
    """The third action has moved by 0.65 a token from the denominator, by 0.1 from what the sampler says."""
    sampled = [None, None, [-0.6, -0.8] if reported else None]
    loss = loss_of(sampled=sampled, off_policy_mask_threshold=0.5)
    kept = [1.0, 1.0, 1.0 if reported else 0.0]
    assert loss.losses.tolist() == pytest.approx([-k * value for k, value in zip(kept, surrogates(), strict=True)])


def test_the_correction_for_the_sampler_is_one_where_it_reported_nothing():
    sampled = [None, [-0.6, -2.0, math.nan], None]
    loss = loss_of(sampled=sampled, start=flat(OLD), sampler_correction=("sequence_truncate", None, 1.05))
    assert loss.sampler_weights.tolist() == pytest.approx([1.0, 1.05, 1.0])


def test_cispo_says_which_ratios_of_positive_weight_are_above_its_bound():
    assert loss_of().gates is None
    assert loss_of(loss_type="cispo", epsilon_high=0.9 * min(ratios())).gates.tolist() == [True, True, False]
    assert loss_of(loss_type="cispo", epsilon_high=1.1 * max(ratios())).gates.tolist() == [False] * 3


def test_vespo_says_what_the_gradient_of_an_action_is_multiplied_by():
    loss = loss_of(loss_type="vespo", vespo_k=(2.0, 3.0), vespo_lambda=(3.0, 1.5))
    products = [math.exp(sum(new) - sum(old)) for new, old in zip(NEW, OLD, strict=True)]
    settings = [(2.0, 3.0), (2.0, 3.0), (3.0, 1.5)]
    phi = [math.exp(lam) * w**k * math.exp(-lam * w) for w, (k, lam) in zip(products, settings, strict=True)]
    assert loss.gates.tolist() == pytest.approx(phi)
