"""The critic's arm of the study (`benchmarks/learning/ppo.py`): what its advantages are."""

import sys
from pathlib import Path

import pytest
import torch


sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "learning"))

from ppo import LAMBDA, generalized_advantages


def test_advantages_are_discounted_sums_of_errors_over_the_tokens_of_the_policy():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 7, generator=generator)
    rewards = torch.tensor([1.0, 0.0, -2.0])
    # one turn; two turns with an answer between them and padding; nothing but padding
    mask = torch.tensor([[1] * 7, [1, 1, 0, 0, 1, 0, 0], [0] * 7])
    expected = torch.zeros(3, 7)
    for row in range(3):
        steps = [t for t in range(7) if mask[row, t]]
        after = [values[row, t].item() for t in steps[1:]] + [0.0]
        errors = [
            (rewards[row].item() if t == steps[-1] else 0.0) + following - values[row, t].item()
            for t, following in zip(steps, after, strict=False)
        ]
        for i, t in enumerate(steps):
            expected[row, t] = sum(LAMBDA**k * error for k, error in enumerate(errors[i:]))
    assert generalized_advantages(values, rewards, mask).tolist() == [pytest.approx(row) for row in expected.tolist()]
