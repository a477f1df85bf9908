"""What makes a run go on without learning anything is said once, in words: metrics show it to those who look."""

import logging

from ..envs.base import StopReason


logger = logging.getLogger(__name__)

ALL_TRUNCATED = (
    "Every response of this batch was cut before its end, so no environment and no reward function has seen a whole "
    "one. Raise `max_completion_length`, or see to the end of turns: responses that look finished end with something "
    "that is no end-of-sequence token (set `stop_strings` or `stop_token_ids`). Said once."
)
ALL_EQUAL = (
    "All rewards of every group of this batch are equal, so all advantages are 0 and nothing is learned from it. "
    "Where that stays so, `frac_reward_zero_std` is 1: choose tasks of middle difficulty, reward parts of the way, or "
    "raise `num_generations` or `temperature`. Said once."
)
NO_GRADIENT = (
    "All gradients of this iteration are exactly 0, although there are advantages other than 0: no parameter that is "
    "trained has a part in the log-probabilities. Look for frozen or detached parameters (an adapter that is not "
    "active, a quantisation without gradient, a model in `eval()` that packed its weights). Said once."
)


class Silence:
    """
    Warns of each silent way of learning nothing, once a run. What it is told is the same on all processes.
    """

    def __init__(self):
        self._said: set[str] = set()
        self._has_advantages = False

    def hear_episodes(self, metrics: dict[str, float], clipped_ratio: float) -> None:
        """
        Episodes were played for training.

        Args:
            metrics (`dict[str, float]`):
                What [`~seeupo_trl.evaluation.logs.episode_metrics`] says of them.
            clipped_ratio (`float`):
                Share of completions without an end, which speaks for episodes that have no stop reason.
        """
        if metrics.get(f"stop_reason/{StopReason.response_truncated}", clipped_ratio) == 1.0:
            self._say(ALL_TRUNCATED)

    def hear_advantages(self, advantages: list[float]) -> None:
        """Advantages of all processes were computed for training."""
        self._has_advantages = any(advantages)
        if not self._has_advantages:
            self._say(ALL_EQUAL)

    def hear_gradients(self, norms: list[float]) -> None:
        """An iteration took optimizer steps with gradients of these norms."""
        if self._has_advantages and not any(norms):
            self._say(NO_GRADIENT)

    def _say(self, warning: str) -> None:
        if warning not in self._said:
            self._said.add(warning)
            logger.warning(warning)
