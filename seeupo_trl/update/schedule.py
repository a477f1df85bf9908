"""
Which turns are updated together, and in which order (Algorithm 1, line "for t = T, ..., 1").

A block of consecutive turns is one virtual agent whose action is the concatenation of its turns' tokens. By default
every turn is a block of its own.
"""

import random

from ..scoring.turn_buffer import Block


def split_into_blocks(num_turns: int, max_turn_updates: int | None = None) -> list[Block]:
    """
    Split `num_turns` turns into contiguous blocks, first turn first.

    Args:
        num_turns (`int`):
            `T`, the largest number of turns of a trajectory in this iteration.
        max_turn_updates (`int`, *optional*):
            Largest number of blocks. Sizes differ by at most one, longer blocks first. `None` gives every turn its
            own block.

    Returns:
        `list[Block]`:
            The blocks; empty when `num_turns` is 0.
    """
    if num_turns == 0:
        return []
    num_blocks = num_turns if max_turn_updates is None else min(max_turn_updates, num_turns)
    size, longer = divmod(num_turns, num_blocks)
    blocks, first = [], 1
    for index in range(num_blocks):
        last = first + size + (index < longer) - 1
        blocks.append(Block(first, last))
        first = last + 1
    return blocks


def update_schedule(
    num_turns: int, update_order: str = "reverse", max_turn_updates: int | None = None, seed: int = 0
) -> list[Block]:
    """
    Blocks of one iteration, in the order in which they are updated.

    Args:
        num_turns (`int`):
            `T`, the largest number of turns of a trajectory in this iteration, over all processes.
        update_order (`str`, *optional*, defaults to `"reverse"`):
            `"reverse"` (the algorithm), `"forward"`, `"random"` or `"simultaneous"` (all turns in one block).
        max_turn_updates (`int`, *optional*):
            Largest number of blocks, see [`split_into_blocks`].
        seed (`int`, *optional*, defaults to `0`):
            Seed of the permutation of `"random"`. All processes must pass the same one.

    Returns:
        `list[Block]`:
            The blocks in update order.
    """
    if update_order == "simultaneous":
        return split_into_blocks(num_turns, 1)
    blocks = split_into_blocks(num_turns, max_turn_updates)
    if update_order == "reverse":
        return blocks[::-1]
    if update_order == "random":
        random.Random(seed).shuffle(blocks)
    return blocks
