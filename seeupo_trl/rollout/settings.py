"""The options of a rollout: what was given, else the trainer's arguments, else defaults."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .contexts import History, check_history
from .vllm import engine_limits


if TYPE_CHECKING:
    from trl import GRPOTrainer


@dataclass(frozen=True)
class RolloutSettings:
    """
    Options of a rollout, with the defaults that [`~seeupo_trl.SeeUPOConfig`] has too. `math.inf` stands for no limit.

    Args:
        history (`str` or `Callable`, *optional*, defaults to `"append"`):
            See [`seeupo_trl.rollout.contexts`].
        max_turns (`int`, *optional*, defaults to `10`):
            Most assistant messages in an episode.
        max_context_length (`int`, *optional*, defaults to `math.inf`):
            Most tokens of context and response together.
        max_concurrent_envs (`int`, *optional*, defaults to `math.inf`):
            Most environments that exist at once on a process.
        env_timeout (`float`, *optional*, defaults to `120.0`):
            Seconds that a call of an environment may take.
        env_reset_retries (`int`, *optional*, defaults to `2`):
            Further attempts, each with another environment, when `reset` failed.
        max_env_failure_rate (`float`, *optional*, defaults to `0.5`):
            Largest fraction of a batch's episodes that may fail by their environments.
        max_observation_tokens (`int`, *optional*, defaults to `32768`):
            Most tokens of a message from `step`.
        longest_context (`int`, *optional*, defaults to `math.inf`):
            Most tokens of a context that a response can be generated from. Follows from the other lengths, see [`of`].
    """

    history: History = "append"
    max_turns: float = 10
    max_context_length: float = math.inf
    max_concurrent_envs: float = math.inf
    env_timeout: float = 120.0
    env_reset_retries: int = 2
    max_env_failure_rate: float = 0.5
    max_observation_tokens: float = 32768
    longest_context: float = math.inf

    def __post_init__(self):
        check_history(self.history)
        for name in ("max_turns", "max_context_length", "max_concurrent_envs", "max_observation_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1, or None for the default.")
        if self.env_timeout <= 0:
            raise ValueError(f"env_timeout is {self.env_timeout}; give a positive number of seconds.")
        if self.env_reset_retries < 0:
            raise ValueError(f"env_reset_retries is {self.env_reset_retries}; give 0 or more.")
        if not 0 <= self.max_env_failure_rate <= 1:
            raise ValueError(f"max_env_failure_rate is {self.max_env_failure_rate}; give a fraction from 0 to 1.")

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any]) -> "RolloutSettings":
        """The settings among a trainer's arguments, in which `None` is no limit; defaults for those it has not."""
        names = cls.__dataclass_fields__.keys() & arguments.keys()
        return cls(**{name: math.inf if arguments[name] is None else arguments[name] for name in names})

    @classmethod
    def of(cls, given: dict[str, Any], trainer: "GRPOTrainer") -> "RolloutSettings":
        """
        The settings in force for a trainer.

        Args:
            given (`dict`):
                Options by name; `None` means what the trainer says.
            trainer ([`~trl.GRPOTrainer`]):
                A stock GRPOConfig has none of the options. In a [`~seeupo_trl.SeeUPOConfig`], `None` is no limit.
        """
        values = {name: value for name, value in given.items() if value is not None}
        values = vars(cls.from_arguments(vars(trainer.args))) | values
        # State-space models have no number of positions.
        positions = getattr(trainer.model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        length = positions if values["max_context_length"] == math.inf else values["max_context_length"]
        longest_context = math.inf
        if trainer.args.use_vllm:
            limits = engine_limits(trainer)
            length, longest_context = min(length, limits.total), limits.context
        values["max_context_length"] = length
        values["longest_context"] = min(longest_context, length - 1)
        return cls(**values)
