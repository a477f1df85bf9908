"""The weights that travel with each trajectory through the updates of its turns."""

import math

import pytest

from seeupo_trl.update.turn_weights import TurnWeights


def test_turn_weight_starts_at_the_advantage_and_follows_its_own_trajectory():
    weights = TurnWeights([0.5, -2.0])
    weights.multiply(1, math.log(3.0))
    assert weights[0] == 0.5
    assert weights[1] == pytest.approx(-6.0)
    assert weights.relative(1) == pytest.approx(3.0)


def test_unclipped_weight_is_kept_beside_the_clipped_one():
    weights = TurnWeights([1.0], clip=0.2)
    for _ in range(2):
        weights.multiply(0, math.log(2.0))
    assert weights.relative(0) == pytest.approx(1.2)
    assert weights.unclipped(0) == pytest.approx(4.0)
