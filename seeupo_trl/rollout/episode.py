"""
One episode while it is played: the conversation, the tokens, and whose fault it is when it goes wrong.
"""

import logging
import textwrap
from dataclasses import dataclass, field
from typing import Any

from ..envs.base import MultiTurnEnvironment, Observation, StepResult, StopReason
from ..trajectory import Trajectory, Turn
from .environment_pool import Instance
from .observations import copied


logger = logging.getLogger(__name__)

Message = dict[str, Any]


@dataclass(frozen=True)
class Segment:
    """
    A part of a context, as one side wrote it: an action of the policy, or the opening or a reply, which end with the
    header of the next action.

    Args:
        token_ids (`list[int]`):
            Its tokens.
        without_reasoning (`list[int]`):
            What is left of them when its reasoning is stripped. Not always some of them: a tag that ends inside a
            token takes that token apart.
    """

    token_ids: list[int]
    without_reasoning: list[int]

    @classmethod
    def plain(cls, token_ids: list[int]) -> "Segment":
        """A segment without reasoning."""
        return cls(token_ids, token_ids)

    def stripped(self) -> "Segment":
        """The segment after its reasoning is stripped."""
        return Segment.plain(self.without_reasoning)


@dataclass(eq=False)
class Episode:
    """
    State of an episode.

    Args:
        key (`int`):
            Its number in the batch of this process.
        task (`dict`):
            The dataset row.
        seed (`int`, *optional*, defaults to `0`):
            Seed for an environment that takes one.

    `instance` is the one of the last attempt to begin the episode; once the episode has ended, it may be playing
    another one. `stopped_early` says that the last turn ended before the end of its message, at a stop string or at a
    token that is no end of a message. `segments` and `shown` belong to [`~seeupo_trl.rollout.contexts.Contexts`].
    """

    key: int
    task: dict[str, Any]
    seed: int = 0
    instance: Instance | None = None
    observation: Observation = field(default_factory=lambda: Observation([]))
    context_ids: list[int] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    new_messages: list[Message] = field(default_factory=list)
    reward: float = 0.0
    info: dict[str, Any] = field(default_factory=dict)
    stop_reason: StopReason | None = None
    error: Exception | None = None
    segments: list[Segment] = field(default_factory=list)
    shown: list[Message] = field(default_factory=list)
    stopped_early: bool = False

    @property
    def active(self) -> bool:
        """Whether it is the policy's turn."""
        return self.stop_reason is None

    @property
    def environment(self) -> MultiTurnEnvironment | None:
        """The environment that plays the episode; `None` where none could be made."""
        return None if self.instance is None else self.instance.environment

    @property
    def opening_length(self) -> int:
        """Tokens of the opening conversation."""
        return len(self.turns[0].context_ids if self.turns else self.context_ids)

    @property
    def last_message(self) -> Message:
        """A copy of the policy's last message, for the environment."""
        return copied(self.messages[-1])

    def open(self, observation: Observation) -> None:
        """The environment began the episode."""
        self.observation = observation
        self.info = dict(observation.info)

    def act(self, turn: Turn, message: Message) -> None:
        """The policy wrote a message."""
        self.turns.append(turn)
        self.messages.append(message)
        self.context_ids = turn.context_ids + turn.action_ids

    def answer(self, result: StepResult) -> None:
        """The environment replied."""
        self.turns[-1].reward = result.reward
        self.reward += result.reward
        self.info.update(result.info)
        self.new_messages = result.messages
        self.messages.extend(result.messages)
        if result.terminated:
            self.stop_reason = StopReason.completed
        elif result.truncated:
            self.stop_reason = StopReason.truncated

    def fail(self, error: Exception) -> None:
        """The environment failed: the episode is over and carries no reward."""
        self.error = error
        self.stop_reason = StopReason.env_timeout if isinstance(error, TimeoutError) else StopReason.env_error
        self.info["error"] = describe(error)
        columns = {name: value for name, value in self.task.items() if name != "prompt"} or self.task
        logger.warning(
            "Environment error in task %s: %s. The episode is left out of training.",
            shorten(columns),
            self.info["error"],
        )

    def trajectory(self) -> Trajectory:
        """The episode as training sees it."""
        return Trajectory(
            turns=self.turns,
            reward=None if self.error is not None else self.reward,
            stop_reason=self.stop_reason,
            messages=self.messages,
            info=self.info,
        )


def describe(error: Exception) -> str:
    """Type and text of an error as a short line, also of one that cannot be printed."""
    try:
        text = shorten(error)
    except Exception:
        text = "(no text)"
    return f"{type(error).__name__}: {text}"


def shorten(value: Any) -> str:
    """A value as a line of at most 200 characters."""
    return textwrap.shorten(str(value)[:10_000], 200)
