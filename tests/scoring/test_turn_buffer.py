"""Turns cut from token masks, and the pools of turns and blocks."""

from seeupo_trl.scoring.turn_buffer import Block, TurnBuffer
from seeupo_trl.trajectory import Trajectory, Turn, turns_from_mask


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
    buffer = TurnBuffer([episode(1), episode(3), episode(0), episode(2)])
    assert buffer.num_turns == 3
    assert buffer.pool(Block(1, 1)) == [0, 1, 3]
    assert buffer.pool(Block(2, 3)) == [1, 3]
    assert buffer.turns_in(1, Block(2, 3)) == [(1, 2), (1, 3)]
    assert buffer.turns_in(3, Block(2, 3)) == [(3, 2)]
    assert buffer.turn((1, 3)).action_ids == [2]
