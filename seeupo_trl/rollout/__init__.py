"""Rollouts: environments and the policy play episodes together, turn by turn."""

from .multi_turn import MultiTurnRollout, environment_reward


__all__ = ["MultiTurnRollout", "environment_reward"]
