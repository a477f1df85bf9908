"""
The options of a rollout: what was given, else the trainer's arguments, else defaults.

Defaults stand in [`RolloutSettings`] and nowhere else, and there `math.inf` is no limit. Arguments say it in their own
way: in a [`~seeupo_trl.SeeUPOConfig`], which is written and read as JSON, `None` is no limit; in
[`~seeupo_trl.rollout.MultiTurnRollout`] it is an option that was not given, as the trainer says.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..envs.plain import is_number, is_whole
from .contexts import History, check_history


def values_of(arguments: Any) -> dict[str, Any]:
    """A trainer's arguments by name, also where their class has slots (`@dataclass(slots=True)`)."""
    state = object.__getstate__(arguments)
    held, slots = state if isinstance(state, tuple) else (state, {})
    return (held or {}) | slots


class DefaultTurns(int):
    """
    The `max_turns` that was not given, which limits message-level environments and leaves TRL's tools alone. A value
    from a script, a command line or a yaml file is a plain `int`.
    """


class DefaultSeconds(float):
    """The `env_timeout` that was not given, which does the same."""


@dataclass(frozen=True)
class RolloutSettings:
    """
    Options of a rollout. `math.inf` is no limit.

    Args:
        history (`str` or `Callable`, *optional*, defaults to `"append"`):
            See [`seeupo_trl.rollout.contexts`].
        max_turns (`int`, *optional*, defaults to `10`):
            Most assistant messages in an episode.
        max_context_length (`int`, *optional*, defaults to `math.inf`):
            Most tokens of context and response together. No limit leaves those of the model and of vLLM, see
            [`~seeupo_trl.rollout.limits.EpisodeLimits`].
        max_episode_tokens (`int`, *optional*, defaults to `math.inf`):
            Most tokens of everything that follows the opening conversation.
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
        stop_strings (`Sequence[str]`, *optional*, defaults to `()`):
            Texts that end a turn of the policy, see [`seeupo_trl.rollout.turn_ends`].
        stop_token_ids (`Sequence[int]`, *optional*, defaults to `()`):
            Tokens that end a turn of the policy, besides those that end its messages.
        lock_step_rollouts (`bool`, *optional*, defaults to `False`):
            Whether all episodes of a batch take their turns together, also where the backend answers single requests.
        request_timeout (`float`, *optional*, defaults to `1800.0`):
            Seconds that a vLLM server has for a response; then the request is sent again, three times in all.
    """

    history: History = "append"
    max_turns: float = 10
    max_context_length: float = math.inf
    max_episode_tokens: float = math.inf
    max_concurrent_envs: float = math.inf
    env_timeout: float = 120.0
    env_reset_retries: int = 2
    max_env_failure_rate: float = 0.5
    max_observation_tokens: float = 32768
    stop_strings: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    lock_step_rollouts: bool = False
    request_timeout: float = 1800.0

    def __post_init__(self):
        check_history(self.history)
        limits = ("max_turns", "max_context_length", "max_episode_tokens", "max_concurrent_envs")
        for name in (*limits, "max_observation_tokens"):
            value = getattr(self, name)
            if not is_limit(value):
                raise ValueError(f"{name} is {value!r}; give a whole number, at least 1, or math.inf for no limit.")
            object.__setattr__(self, name, as_limit(value))
        for name in ("env_timeout", "request_timeout"):
            if not is_number(getattr(self, name)) or not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}; give a positive number of seconds.")
        if not is_whole(self.env_reset_retries) or self.env_reset_retries < 0:
            raise ValueError(f"env_reset_retries is {self.env_reset_retries!r}; give a number of retries, 0 or more.")
        if not is_number(self.max_env_failure_rate) or not 0 <= self.max_env_failure_rate <= 1:
            raise ValueError(f"max_env_failure_rate is {self.max_env_failure_rate!r}; give a fraction from 0 to 1.")
        _check_list("stop_strings", self.stop_strings, lambda text: isinstance(text, str) and text, "non-empty texts")
        _check_list("stop_token_ids", self.stop_token_ids, lambda token_id: type(token_id) is int, "token ids")

    @property
    def call_timeout(self) -> float | None:
        """`env_timeout` as calls take it, where `None` is no limit."""
        return None if self.env_timeout == math.inf else self.env_timeout

    @classmethod
    def from_arguments(cls, arguments: Any) -> "RolloutSettings":
        """
        The settings among a trainer's arguments, in which `None` is no limit; defaults for those it has not.

        Args:
            arguments ([`~trl.GRPOConfig`]):
                The trainer's arguments. A stock GRPOConfig has none of the settings, a [`~seeupo_trl.SeeUPOConfig`]
                all.
        """
        held = values_of(arguments)
        values = {name: held[name] for name in cls.__dataclass_fields__.keys() & held.keys()}
        lists = {name: values.pop(name) or () for name in ("stop_strings", "stop_token_ids") if name in values}
        return cls(**lists, **{name: math.inf if value is None else value for name, value in values.items()})

    @classmethod
    def of(cls, options: dict[str, Any], arguments: Any) -> "RolloutSettings":
        """
        The settings in force.

        Args:
            options (`dict`):
                Options of the rollout by name; `None` is as the trainer says.
            arguments ([`~trl.GRPOConfig`]):
                The trainer's arguments.
        """
        given = {name: value for name, value in options.items() if value is not None}
        return replace(cls.from_arguments(arguments), **given)


def is_limit(value: Any) -> bool:
    """Whether a value is the most of what can be counted (also `4096.0`), or `math.inf` for no limit."""
    return is_number(value) and value >= 1 and (value == math.inf or value % 1 == 0)


def as_limit(value: float) -> float:
    """A limit as an `int`, or `math.inf`."""
    return value if isinstance(value, int) or value == math.inf else int(value)


def _check_list(name: str, values: Any, is_allowed: Callable[[Any], Any], what: str) -> None:
    if not isinstance(values, (list, tuple)) or not all(map(is_allowed, values)):
        raise ValueError(f"{name} is {values!r}; give a list of {what}.")
