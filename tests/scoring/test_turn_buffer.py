"""Turns cut from token masks, pools, and the weights that travel with each trajectory."""

import math

import pytest

from seeupo_trl.trajectory import Trajectory, Turn, TurnBuffer, turns_from_mask
from seeupo_trl.update.schedule import Block


def episode(num_turns: int) -> Trajectory:
    return Trajectory(turns=[Turn(context_ids=[0], action_ids=[t]) for t in range(num_turns)])


def test_each_run_of_model_tokens_is_a_turn():
    turns = turns_from_mask([1, 2], [3, 4, 9, 9, 5, 9], [1, 1, 0, 0, 1, 0], [-0.1, -0.2, 0, 0, -0.5, 0])
    assert turns == [
        Turn(context_ids=[1, 2], action_ids=[3, 4], sampling_logps=[-0.1, -0.2]),
        Turn(context_ids=[1, 2, 3, 4, 9, 9], action_ids=[5], sampling_logps=[-0.5]),
    ]


def test_environment_may_speak_before_the_first_turn():
    assert turns_from_mask([1], [9, 3], [0, 1], None) == [Turn(context_ids=[1, 9], action_ids=[3])]


def test_without_a_mask_the_whole_completion_is_one_turn():
    assert turns_from_mask([1], [2, 3], None, None) == [Turn(context_ids=[1], action_ids=[2, 3])]


def test_completion_without_model_tokens_has_no_turn():
    assert turns_from_mask([1], [9, 9], [0, 0], None) == []


def test_pool_of_a_block_holds_the_trajectories_that_reach_it():
    buffer = TurnBuffer([episode(1), episode(3), episode(0), episode(2)], [1.0] * 4, 4)
    assert buffer.num_turns == 3
    assert buffer.pool(Block(1, 1)) == [0, 1, 3]
    assert buffer.pool(Block(2, 3)) == [1, 3]
    assert buffer.turns_in(1, Block(2, 3)) == [(1, 2), (1, 3)]
    assert buffer.turns_in(3, Block(2, 3)) == [(3, 2)]
    assert buffer.turn((1, 3)).action_ids == [2]


def test_turn_weight_starts_at_the_advantage_and_follows_its_own_trajectory():
    buffer = TurnBuffer([episode(2), episode(2)], [0.5, -2.0], 2)
    buffer.fold_in(1, math.log(3.0))
    assert buffer.weight(0) == 0.5
    assert buffer.weight(1) == pytest.approx(-6.0)
    assert buffer.relative_weight(1) == pytest.approx(3.0)


def test_unclipped_weight_is_kept_beside_the_clipped_one():
    buffer = TurnBuffer([episode(2)], [1.0], 1, weight_clip=0.2)
    for _ in range(2):
        buffer.fold_in(0, math.log(2.0))
    assert buffer.relative_weight(0) == pytest.approx(1.2)
    assert buffer.unclipped_relative_weight(0) == pytest.approx(4.0)


def test_one_advantage_for_each_trajectory():
    with pytest.raises(ValueError, match="2 trajectories but 1 advantages"):
        TurnBuffer([episode(1), episode(1)], [1.0], 2)
