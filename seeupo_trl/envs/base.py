"""
The interface between an environment and the rollouts: an environment speaks chat messages, never tokens.

An episode is a conversation. The environment opens it (`reset`), the policy answers with one assistant message, the
environment replies (`step`) with any number of messages, and so on until one side ends the episode. What the policy
saw and wrote as tokens is the business of [`~seeupo_trl.rollout.MultiTurnRollout`].
"""

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class StopReason(StrEnum):
    """
    Why an episode ended. Members are strings: `StopReason.completed == "completed"`.

    - `completed`: the task came to an end (`terminated` of [`StepResult`]).
    - `truncated`: the environment cut it short (`truncated`, and not `terminated`).
    - `max_turns`: the policy has written as many messages as it may.
    - `context_overflow`: context and response reached the token limit.
    - `response_truncated`: a response hit `max_completion_length` before its end-of-sequence token.
    - `env_error`: the environment raised an exception; the episode carries no reward.
    - `env_timeout`: the environment did not answer in time; the episode carries no reward.
    """

    completed = "completed"
    truncated = "truncated"
    max_turns = "max_turns"
    context_overflow = "context_overflow"
    response_truncated = "response_truncated"
    env_error = "env_error"
    env_timeout = "env_timeout"


# Stop reasons that say the environment failed: no reward counts then, and nothing is learned from the episode.
ENVIRONMENT_FAULTS = (StopReason.env_error, StopReason.env_timeout)


@dataclass
class Observation:
    """
    What the policy sees when an episode begins.

    Args:
        messages (`list[dict]`):
            The opening conversation, as chat messages (a system and/or a user message, usually). It **is** the
            beginning of the conversation: the dataset's `prompt` column is shown only where the environment returns
            it here. `reset` receives that column like every other one.
        tools (`list[dict]`, *optional*):
            JSON schemas of the tools (`{"type": "function", "function": {...}}`) for the chat template. They stay the
            same for the whole episode.
        info (`dict`, *optional*, defaults to `{}`):
            Anything else, as in [`StepResult`].
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    info: dict[str, Any] = field(default_factory=dict)


@dataclass
class StepResult:
    """
    The environment's reply to one assistant message, in gymnasium's words.

    Args:
        messages (`list[dict]`):
            New messages for the policy (tool results, user messages, several of either). Required unless the episode
            ends: the policy cannot answer nothing.
        reward (`float`, *optional*, defaults to `0.0`):
            Reward of this step: any finite real number, of NumPy or PyTorch as well. The return of an episode is the
            sum over its steps.
        terminated (`bool`, *optional*, defaults to `False`):
            The episode reached an end of the task itself (solved, failed, answered).
        truncated (`bool`, *optional*, defaults to `False`):
            The environment cut the episode short (its own step limit).
        info (`dict`, *optional*, defaults to `{}`):
            Anything else, for logs and reward functions; later steps overwrite equal keys of earlier ones. Numbers
            are logged as metrics `info/<name>`.
    """

    messages: list[dict[str, Any]]
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    info: dict[str, Any] = field(default_factory=dict)


class MultiTurnEnvironment(ABC):
    """
    One environment instance plays one episode at a time, and is reset for the next one.

    Instances live in a pool: `reset` is called again and again on the same object, with different tasks, so it has to
    forget everything about the episode before. An instance is made, called and closed in one thread, one call after
    another; different instances run at the same time in different threads: keep state in `self`, not in globals.

    Faults have owners. What the policy did wrong (a call of an unknown tool, malformed arguments) comes back as a
    message the policy can read. An exception raised by `reset` or `step` says the *environment* is broken: the
    episode is dropped from training, with stop reason `env_error`.

    Example:

    ```python
    class GuessTheNumber(MultiTurnEnvironment):
        def reset(self, target: int, **task) -> Observation:
            self.target = target
            return Observation([{"role": "user", "content": "Guess a number from 1 to 100."}])

        def step(self, message: dict) -> StepResult:
            guess = message["content"].strip()
            if guess == str(self.target):
                return StepResult([], reward=1.0, terminated=True)
            return StepResult([{"role": "user", "content": "No. Try again."}])
    ```
    """

    @abstractmethod
    def reset(self, **task: Any) -> Observation:
        """
        Begin a new episode.

        Args:
            task (`Any`):
                The dataset row: every column as a keyword argument, `prompt` included. Accept `**task` for the
                columns the environment does not use. A `reset` with a parameter `seed` also gets a seed, the same
                for all episodes of a group, unless the row has one in a column of that name.

        Returns:
            [`Observation`]: the opening messages and the tools.
        """

    @abstractmethod
    def step(self, message: dict[str, Any]) -> StepResult:
        """
        Read the policy's message and reply.

        Args:
            message (`dict`):
                The assistant message, parsed from the generated tokens: `role` (`"assistant"`), `content` (`str`,
                maybe empty), and where the model's chat format has them `reasoning_content` (`str`; for gpt-oss and
                LFM2.5 also under the template's name, `thinking`) and `tool_calls`, a list of
                `{"type": "function", "function": {"name": str, "arguments": dict}}`. Arguments come from the model:
                they may be of any type and hold anything, nested 256 levels deep at most. A response that could not be
                parsed has its whole text in `content`, no `tool_calls`, and `"parse_error": True`.

        Returns:
            [`StepResult`]: the reply.
        """

    @property
    def takes_seed(self) -> bool:
        """Whether `reset` has a parameter `seed`."""
        return "seed" in inspect.signature(self.reset).parameters

    def close(self) -> None:  # noqa: B027 - optional to override
        """Release what the environment holds. Called once, when its pool is closed."""
