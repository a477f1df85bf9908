"""Blocks of turns and the order in which they are updated."""

import pytest

from seeupo_trl.update.schedule import Block, split_into_blocks, update_schedule


def labels(blocks):
    return [block.label for block in blocks]


def test_every_turn_is_a_block_of_its_own_by_default():
    assert labels(split_into_blocks(3)) == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("num_turns", "limit", "expected"),
    [
        (7, 3, ["1-3", "4-5", "6-7"]),
        (6, 3, ["1-2", "3-4", "5-6"]),
        (2, 5, ["1", "2"]),
        (5, 1, ["1-5"]),
        (0, 3, []),
    ],
)
def test_long_episodes_merge_consecutive_turns(num_turns, limit, expected):
    assert labels(split_into_blocks(num_turns, limit)) == expected


@pytest.mark.parametrize("num_turns", [1, 5, 40])
@pytest.mark.parametrize("limit", [1, 4, 7, 40])
def test_blocks_cover_every_turn_once_and_are_balanced(num_turns, limit):
    blocks = split_into_blocks(num_turns, limit)
    assert [turn for block in blocks for turn in range(block.first, block.last + 1)] == list(range(1, num_turns + 1))
    sizes = [block.last - block.first + 1 for block in blocks]
    assert len(blocks) == min(num_turns, limit)
    assert max(sizes) - min(sizes) <= 1


def test_reverse_order_starts_with_the_last_turn():
    assert labels(update_schedule(3)) == ["3", "2", "1"]
    assert labels(update_schedule(3, "forward")) == ["1", "2", "3"]


def test_simultaneous_is_one_block_and_so_is_one_turn_update():
    assert labels(update_schedule(4, "simultaneous", max_turn_updates=3)) == ["1-4"]
    assert labels(update_schedule(4, "reverse", max_turn_updates=1)) == ["1-4"]


def test_random_order_is_a_permutation_fixed_by_the_seed():
    orders = [labels(update_schedule(6, "random", seed=seed)) for seed in range(20)]
    assert all(sorted(order) == list("123456") for order in orders)
    assert labels(update_schedule(6, "random", seed=3)) == orders[3]
    assert len({tuple(order) for order in orders}) > 10


def test_short_episode_plays_part_of_a_block():
    assert list(Block(2, 4).turns_of(3)) == [2, 3]
    assert list(Block(2, 4).turns_of(1)) == []
