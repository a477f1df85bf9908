"""The entropy bonus of GRPO, constant or adaptive, with the entropy measured per optimizer step."""

from dataclasses import dataclass

import torch

from ..distributed.lock_step import LockStep
from ..seeupo_config import SeeUPOConfig


@dataclass
class EntropyBonus:
    """
    Weight of the mean per-token entropy in the objective.

    Args:
        config ([`~seeupo_trl.SeeUPOConfig`]):
            Where the fields `entropy_*` and `use_adaptive_entropy` are.
        coef (`float`):
            Present coefficient. An adaptive one is moved after every optimizer step, towards `entropy_target`.
        last_entropy (`float`):
            Mean per-token entropy in nats at the last optimizer step, over all processes; infinite before the first.
    """

    config: SeeUPOConfig
    coef: float
    last_entropy: float

    @property
    def is_enabled(self) -> bool:
        """Whether there may be a bonus in this run."""
        return self.config.use_adaptive_entropy or self.config.entropy_coef != 0.0

    @property
    def weight(self) -> float:
        """Coefficient in force; an adaptive one acts only while the entropy is at or below its target."""
        if self.config.use_adaptive_entropy and self.last_entropy > self.config.entropy_target:
            return 0.0
        return self.coef

    def observe(self, entropy_sum: float, tokens: int, lock_step: LockStep) -> None:
        """Move an adaptive coefficient, given the entropies of this process's tokens in one optimizer step."""
        if not self.config.use_adaptive_entropy:
            return
        total, count = lock_step.gather(torch.tensor([entropy_sum, float(tokens)])).sum(0).tolist()
        self.last_entropy = total / max(count, 1.0)
        config = self.config
        if self.last_entropy <= config.entropy_target:
            self.coef = min(self.coef + config.entropy_coef_delta, config.entropy_coef_max)
        else:
            self.coef = max(self.coef - config.entropy_coef_delta, config.entropy_coef_min)
