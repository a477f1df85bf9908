"""
Advantages of single turns from the rewards that came after them (`turn_credit="to_go"`).

With `R_{i,t}` the sum of the rewards of trajectory i from turn t on, Eq. 9 becomes
`A_{i,t} = R_{i,t} - mean_j R_{j,t}` over the trajectories j of the group that have a turn t, divided by the standard
deviation of the episodes' advantages, and Eq. 7 and 8 become `M_{i,t+1} = A_{i,t} prod_{s>t} r_{i,s}`. Rewards before
turn t do not depend on its action, so their expectation is a constant of `J_t`: the same is maximised, less noisily.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object

from ..seeupo_config import SeeUPOConfig
from ..trajectory import Trajectory
from .objective import to_go_advantages


class TurnCredit:
    """
    Advantages of turns in the iterations of a run.

    Args:
        reward_funcs (`Sequence`), own_reward (`Callable`):
            The reward functions, and the one among them that hands on the environment's return. Only its reward is
            divided among turns; that of all others counts as arriving at the last turn.
        config ([`~seeupo_trl.SeeUPOConfig`]):
            The user's configuration.
    """

    def __init__(self, reward_funcs: Sequence[Any], own_reward: Callable, config: SeeUPOConfig):
        self._environment = next((n for n, function in enumerate(reward_funcs) if function is own_reward), None)
        self._config = config
        self._has_warned = False

    def advantages(
        self,
        trajectories: list[Trajectory],
        rewards_per_func: torch.Tensor,
        weights: torch.Tensor,
        group_size: int,
        per_function: bool,
    ) -> list[list[float]]:
        """
        Advantages of the turns of all trajectories. Must be called on every process.

        Args:
            trajectories (`list[Trajectory]`):
                Those of this process.
            rewards_per_func (`torch.Tensor` of shape `(N, F)`), weights (`torch.Tensor` of shape `(F,)`):
                Rewards of all trajectories by function, and weights of the functions.
            group_size (`int`), per_function (`bool`):
                See [`~seeupo_trl.update.objective.batch_advantages`].

        Returns:
            `list[list[float]]`:
                `A_{i,t}` of the `N` trajectories over all processes, each of length `max_i K_i`; 0 where a trajectory
                has no turn t.
        """
        played: list[tuple[list[float], float]] = gather_object([_rewards_of(t) for t in trajectories])
        environment = self._environment if any(reward for steps, _ in played for reward in steps) else None
        if environment is None:
            self._warn()
        num_turns = max(len(steps) for steps, _ in played)
        if num_turns == 0:
            return [[] for _ in played]
        to_come = torch.full((len(played), num_turns), torch.nan, dtype=torch.float64)
        for row, (steps, rest) in enumerate(played):
            total = rest
            for turn in reversed(range(len(steps))):
                total += steps[turn]
                to_come[row, turn] = total
        return to_go_advantages(
            rewards_per_func.cpu(),
            weights.cpu(),
            group_size,
            to_come,
            environment,
            normalize=self._config.scale_rewards == "batch",
            per_function=per_function,
            clip=self._config.advantage_clip,
        ).tolist()

    def _warn(self) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        warnings.warn(
            "`turn_credit='to_go'` found no reward of a single step in this iteration: all of the reward counts as "
            "arriving at the last turn. It is then `turn_credit='episode'` but for whom a turn is compared with, the "
            "trajectories of its group that have that turn. Rewards of steps are what a `MultiTurnEnvironment` "
            "returns and the reward function `environment_reward` hands on.",
            stacklevel=3,
        )


def _rewards_of(trajectory: Trajectory) -> tuple[list[float], float]:
    """Rewards of a trajectory's steps, and what its return has besides them: it arrives at the last turn."""
    steps = [turn.reward or 0.0 for turn in trajectory.turns]
    rest = 0.0 if trajectory.reward is None else trajectory.reward - math.fsum(steps)
    # what rounding leaves of a sum is no reward
    return steps, 0.0 if abs(rest) <= 1e-9 * max([1.0, *map(abs, steps)]) else rest
