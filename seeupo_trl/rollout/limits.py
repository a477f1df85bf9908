"""How long an episode may become, and what it ends with where it would become longer."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..envs.base import StopReason
from .episode import Episode
from .settings import RolloutSettings
from .vllm import engine_limits


if TYPE_CHECKING:
    from trl import GRPOTrainer


@dataclass(frozen=True)
class EpisodeLimits:
    """
    Limits of an episode; `math.inf` is none. The last two are those of TRL's tool loop, see
    [`~seeupo_trl.rollout.trl_environments`]; message-level environments have none of them.

    Args:
        max_turns (`float`, *optional*, defaults to `math.inf`):
            Most messages of the policy. The environment reads the last one, and may end the episode there.
        max_context_length (`float`, *optional*, defaults to `math.inf`):
            Most tokens of a context and its response together.
        longest_context (`float`, *optional*, defaults to `math.inf`):
            Most tokens of a context that a response can be generated from.
        max_episode_tokens (`float`, *optional*, defaults to `math.inf`):
            Most tokens of everything that follows the opening conversation.
        max_tool_calling_iterations (`float`, *optional*, defaults to `math.inf`):
            Most messages of the policy whose tool calls are executed.
        executes_truncated_calls (`bool`, *optional*, defaults to `False`):
            Whether the environment reads a response that was cut, if there are tool calls in it; and whether the
            policy is asked once more where there is room for no token, as TRL does. The stop reason of an episode
            that has used its tokens is then `response_truncated`, else `context_overflow`.
    """

    max_turns: float = math.inf
    max_context_length: float = math.inf
    longest_context: float = math.inf
    max_episode_tokens: float = math.inf
    max_tool_calling_iterations: float = math.inf
    executes_truncated_calls: bool = False

    @classmethod
    def of(cls, settings: RolloutSettings, trainer: "GRPOTrainer") -> "EpisodeLimits":
        """
        Limits of message-level episodes: the settings', and those of the model and of vLLM, which nothing raises.

        Args:
            settings ([`~seeupo_trl.rollout.settings.RolloutSettings`]):
                Options of the rollout. A `max_context_length` takes the place of the model's number of positions.
            trainer ([`~trl.GRPOTrainer`]):
                The trainer whose policy plays.
        """
        length, longest_context = settings.max_context_length, math.inf
        if length == math.inf:
            # State-space models have no number of positions.
            length = getattr(trainer.model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        if trainer.args.use_vllm:
            engine = engine_limits(trainer)
            length, longest_context = min(length, engine.total), engine.context
        longest_context = min(longest_context, length - 1)
        return cls(settings.max_turns, length, longest_context, settings.max_episode_tokens)

    def length_of(self, episode: Episode) -> tuple[float, StopReason]:
        """Most tokens of a context and its response together, and what an episode that reaches them ends with."""
        budget = episode.opening_length + self.max_episode_tokens
        if budget < self.max_context_length and self.executes_truncated_calls:
            return budget, StopReason.response_truncated
        return min(budget, self.max_context_length), StopReason.context_overflow

    def leave_room(self, episode: Episode) -> bool:
        """
        Whether a response is generated from the episode's context. In TRL's loop a context that fills
        `max_completion_length` to the last token gets one, of which nothing is kept, and for which random numbers are
        drawn.
        """
        room = episode.opening_length + self.max_episode_tokens - len(episode.context_ids)
        return len(episode.context_ids) <= self.longest_context and room >= (0 if self.executes_truncated_calls else 1)
