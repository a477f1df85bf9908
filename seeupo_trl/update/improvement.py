"""An estimate of what an iteration's updates are worth, from the ratios that they compute anyway."""

import math

import torch

from ..distributed.lock_step import LockStep
from .objective import MAX_LOG_RATIO


class Improvement:
    """
    Importance-weighted estimate of the improvement that an iteration's updates make, but for the one made last.

    After the updates of all turns but one, the policy that plays each updated turn with the parameters after its
    update, and the others as before, has the expected advantage `E_k[A prod_t pi_{theta^t}(a_t) / pi_{theta_k}(a_t)]`:
    the products over tokens of the ratios that enter `M`, without a bound. Its estimate on the samples that were
    trained on is optimistic, as every training loss is.

    Args:
        advantages (`dict[int, float]`):
            Normalised advantages (Eq. 9) of the trajectories of this process that are trained on.
        num_trajectories (`int`):
            `N`, the number of trajectories over all processes.
    """

    def __init__(self, advantages: dict[int, float], num_trajectories: int):
        self._advantages = advantages
        self._num_trajectories = num_trajectories
        self._log_weights = dict.fromkeys(advantages, 0.0)

    def take_in(self, index: int, log_ratio: float) -> None:
        """The log of an updated turn's product ratio, of trajectory `index`."""
        if index in self._log_weights:
            self._log_weights[index] += log_ratio

    def reduce(self, lock_step: LockStep) -> dict[str, float]:
        """
        The estimate over all processes, in standard deviations of the group-relative reward, and its effective sample
        size `(sum w)^2 / sum w^2`. Must be called on every process.
        """
        weights = {i: math.exp(min(log_weight, MAX_LOG_RATIO)) for i, log_weight in self._log_weights.items()}
        sums = [
            sum(self._advantages[i] * (weight - 1) for i, weight in weights.items()),
            sum(weights.values()),
            sum(weight**2 for weight in weights.values()),
        ]
        gained, total, squares = lock_step.gather(torch.tensor(sums, dtype=torch.float32)).double().sum(0).tolist()
        return {
            "iteration/improvement": gained / self._num_trajectories,
            "iteration/improvement_ess": total**2 / squares if squares > 0 else 0.0,
        }
