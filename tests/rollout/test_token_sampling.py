"""A token is where the cumulative distribution passes a number, exactly."""

from fractions import Fraction
from itertools import accumulate

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from seeupo_trl.rollout.token_sampling import invert


LARGEST = 1 - 2.0**-53  # below 1


def scores_of(rows: int, tokens: int) -> torch.Tensor:
    return 4 * torch.randn(rows, tokens, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tokens", [1, 100, 256, 1000])
def test_a_token_is_where_the_cumulative_distribution_passes_the_number(tokens):
    scores = scores_of(50, tokens)
    uniforms = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    chosen = invert(scores, uniforms)
    for row, uniform, token in zip(scores.softmax(-1).tolist(), uniforms.tolist(), chosen.tolist(), strict=True):
        ends = list(accumulate(map(Fraction, row)))
        place = Fraction(uniform) * ends[-1]
        assert token == next(i for i, end in enumerate(ends) if end > place)


@pytest.mark.parametrize("first, last", [(3, 500), (300, 301), (0, 256), (256, 600)])
def test_a_token_without_probability_is_never_chosen(first, last):
    scores = torch.full((2, 600), -torch.inf)
    scores[:, first:last] = scores_of(2, last - first)
    assert invert(scores, torch.tensor([0.0, LARGEST], dtype=torch.float64)).tolist() == [first, last - 1]


def test_no_fractions_are_added_up_one_after_the_other():
    """On a GPU, PyTorch refuses to under `full_determinism`."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.cumsum.default:
                seen.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    with Watch():
        invert(scores_of(2, 600), torch.tensor([0.3, 0.6], dtype=torch.float64))
    assert set(seen) == {torch.int64}


def test_logits_that_are_no_numbers_are_said():
    scores = scores_of(2, 600)
    scores[1, 3] = torch.nan
    with pytest.raises(ValueError, match="logits are NaN.*lower `learning_rate`"):
        invert(scores, torch.tensor([0.3, 0.6], dtype=torch.float64))
