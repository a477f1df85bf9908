"""
The turn-indexed buffer: the turns of an iteration's trajectories, by trajectory and turn.

Everything about a trajectory is keyed by the trajectory, never by its position in some batch.
"""

from typing import NamedTuple

import numpy as np

from ..trajectory import Trajectory, Turn


Key = tuple[int, int]  # (trajectory, turn counted from 1)


class Block(NamedTuple):
    """
    Consecutive turns that are updated together: one virtual agent, whose action is the concatenation of the turns'
    tokens. By default every turn is a block of its own.

    Args:
        first (`int`):
            First turn, counted from 1.
        last (`int`):
            Last turn, inclusive.
    """

    first: int
    last: int

    @property
    def label(self) -> str:
        """`"3"` for a single turn, `"3-5"` for several."""
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"

    def turns_of(self, num_turns: int) -> range:
        """Turns of the block that a trajectory of `num_turns` turns plays."""
        return range(self.first, min(self.last, num_turns) + 1)


class TurnBuffer:
    """
    The trajectories of one iteration on one process.

    Args:
        trajectories (`list[Trajectory]`):
            This process's trajectories. A trajectory's index in this list is its key everywhere else.
    """

    def __init__(self, trajectories: list[Trajectory]):
        self.trajectories = trajectories
        self._chains: dict[Key, tuple[int, np.ndarray]] = {}
        self._turns: dict[Block, list[list[Key]]] = {}  # an iteration asks for them many times

    def __len__(self) -> int:
        return len(self.trajectories)

    @property
    def num_turns(self) -> int:
        """Largest number of turns of a trajectory on this process."""
        return max((len(trajectory.turns) for trajectory in self.trajectories), default=0)

    def pool(self, block: Block) -> list[int]:
        """Trajectories that play at least one turn of `block` (`D_t` for a block of the single turn t)."""
        return [i for i, trajectory in enumerate(self.trajectories) if len(trajectory.turns) >= block.first]

    def turns_in(self, index: int, block: Block) -> list[Key]:
        """Keys `(trajectory, turn)` of the turns that trajectory `index` plays in `block`; turns count from 1."""
        if block not in self._turns:
            turns = [block.turns_of(len(trajectory.turns)) for trajectory in self.trajectories]
            self._turns[block] = [[(i, turn) for turn in numbers] for i, numbers in enumerate(turns)]
        return self._turns[block][index]

    def turn(self, key: Key) -> Turn:
        """The turn behind a key `(trajectory, turn)`."""
        index, number = key
        return self.trajectories[index].turns[number - 1]

    def sequence(self, key: Key) -> np.ndarray:
        """Tokens of a turn's context and action, shape `(S,)`."""
        return self._chain_and_sequence(key)[1]

    def chain(self, key: Key) -> int:
        """
        Number of the chain that a turn belongs to. The turns of a chain extend one another: the shorter of two is a
        prefix of the longer. A trajectory whose contexts are append-only has one chain.
        """
        return self._chain_and_sequence(key)[0]

    def _chain_and_sequence(self, key: Key) -> tuple[int, np.ndarray]:
        if key not in self._chains:
            leaves: list[tuple[np.ndarray, bytes]] = []
            turns = self.trajectories[key[0]].turns
            for number in range(len(turns), 0, -1):
                turn = turns[number - 1]
                end = len(turn.context_ids) + len(turn.action_ids)
                if number < len(turns) and turns[number].extends(turn):
                    # the usual case, without a conversion
                    chain, extended = self._chains[key[0], number + 1]
                    self._chains[key[0], number] = chain, extended[:end]
                else:
                    tokens = np.array(turn.context_ids + turn.action_ids, dtype=np.int32)
                    content = tokens.tobytes()
                    chain = next((i for i, leaf in enumerate(leaves) if leaf[1].startswith(content)), len(leaves))
                    if chain == len(leaves):
                        leaves.append((tokens, content))
                    self._chains[key[0], number] = chain, leaves[chain][0][:end]
        return self._chains[key]
