"""The weight of a turn: `M` of Eq. 7 and 8, with and without its bound."""

from collections.abc import Sequence

from .objective import fold_in_ratio


class TurnWeights:
    """
    Turn weights `M` of the trajectories of one process, keyed by trajectory.

    They start as the advantages, `M_{i,T+1} = A_i` (Eq. 7), and take in the ratio of each updated turn (Eq. 8). Where
    turns have advantages of their own, `M_{i,t+1} = A_{i,t} prod r`: the product is the same, whoever it weighs.

    Args:
        advantages (`list[float]`):
            Normalised advantage `A_i` of each trajectory (Eq. 9).
        clip (`float`, *optional*):
            Bound of the ratios and of their running product, see [`~seeupo_trl.update.objective.fold_in_ratio`].
        turn_advantages (`list[Sequence[float]]`, *optional*):
            Advantages `A_{i,t}` of the turns of each trajectory; by default all of them are `A_i`.
    """

    def __init__(
        self,
        advantages: list[float],
        clip: float | None = None,
        turn_advantages: list[Sequence[float]] | None = None,
    ):
        self.advantages = advantages
        self._turn_advantages = turn_advantages
        self._clip = clip
        self._relative = [1.0] * len(advantages)  # M_i / A_i
        self._unclipped = [1.0] * len(advantages)

    def __getitem__(self, index: int) -> float:
        """`M` of trajectory `index`."""
        return self.advantages[index] * self._relative[index]

    def advantage(self, index: int, turn: int) -> float:
        """Advantage of turn `turn` (from 1) of trajectory `index`, or of the block that begins with it."""
        return self.advantages[index] if self._turn_advantages is None else self._turn_advantages[index][turn - 1]

    def of_turn(self, index: int, turn: int) -> float:
        """`M` of trajectory `index` for turn `turn` (from 1), or for the block that begins with it."""
        return self.advantage(index, turn) * self._relative[index]

    def matters(self, index: int) -> bool:
        """Whether trajectory `index` has a weight other than 0 in any of its turns."""
        advantages = [self.advantages[index]] if self._turn_advantages is None else self._turn_advantages[index]
        return self._relative[index] != 0 and any(advantages)

    def relative(self, index: int) -> float:
        """`M / A` of trajectory `index`."""
        return self._relative[index]

    def unclipped(self, index: int) -> float:
        """What [`relative`] would be without the bound."""
        return self._unclipped[index]

    def multiply(self, index: int, log_ratio: float) -> None:
        """`M_{i,t} = r_{i,t}(theta^t) M_{i,t+1}` of trajectory `index`, with the log of the ratio (Eq. 8)."""
        self._relative[index] = fold_in_ratio(self._relative[index], log_ratio, self._clip)
        self._unclipped[index] = fold_in_ratio(self._unclipped[index], log_ratio, None)
