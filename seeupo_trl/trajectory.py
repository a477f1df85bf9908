"""
What was sampled: turns and trajectories, kept as tokens.

Ground truth is token ids exactly as they were sampled; nothing is ever tokenised again.
"""

from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from .envs.base import ENVIRONMENT_FAULTS


@dataclass
class Turn:
    """
    One action of the policy: the whole response of one turn, with the exact context it was sampled from.

    Args:
        context_ids (`list[int]`):
            Tokens the policy was conditioned on. They need not extend the previous turn's tokens: a context rewritten
            between turns (reasoning stripped from the history, for example) is a first-class case.
        action_ids (`list[int]`):
            Tokens the policy generated, at least one.
        sampling_logps (`list[float]`, *optional*):
            Log-probability of each action token under the sampler, where the sampler reports it (vLLM does).
        reward (`float`, *optional*):
            The environment's reward of this step, where it answered the action. Training uses the return of the
            episode, and these rewards where `turn_credit="to_go"`.
    """

    context_ids: list[int]
    action_ids: list[int]
    sampling_logps: list[float] | None = None
    reward: float | None = None

    def extends(self, earlier: "Turn") -> bool:
        """Whether this turn's context begins with the context and action of an earlier turn."""
        start, end = len(earlier.context_ids), len(earlier.context_ids) + len(earlier.action_ids)
        history = self.context_ids
        return history[start:end] == earlier.action_ids and history[:start] == earlier.context_ids


@dataclass
class Trajectory:
    """
    One episode: the turns in the order they were played, and what became of it.

    Args:
        turns (`list[Turn]`):
            The `K_i` turns of the episode; may be empty (no model token was generated).
        reward (`float`, *optional*):
            Return of the environment (the sum of its step rewards); `None` when the environment gave no reward.
        stop_reason (`str`, *optional*):
            Why the episode ended, one of [`~seeupo_trl.envs.StopReason`].
        messages (`list[dict]`, *optional*, defaults to `[]`):
            The conversation after the prompt, as chat messages, for reward functions and logs. Never used for
            training: tokens are.
        info (`dict`, *optional*, defaults to `{}`):
            Anything else the environment reported.
    """

    turns: list[Turn]
    reward: float | None = None
    stop_reason: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def is_quarantined(self) -> bool:
        """Whether the environment failed: no reward counts then, and nothing is learned from the episode."""
        return self.stop_reason in ENVIRONMENT_FAULTS


def turns_from_mask(
    prompt_ids: list[int], completion_ids: list[int], mask: list[int] | None, logps: list[float] | None
) -> list[Turn]:
    """
    Cut one generated sequence into turns: each maximal run of model tokens is a turn.

    Args:
        prompt_ids (`list[int]`):
            Tokens of the prompt.
        completion_ids (`list[int]`):
            Everything after the prompt: model tokens and what tools or the environment inserted.
        mask (`list[int]`, *optional*):
            1 for a token the model generated, 0 for one it did not, as in TRL's `tool_mask` and `env_mask`. `None`
            means that the model generated all of them.
        logps (`list[float]`, *optional*):
            Sampling log-probability of each completion token.

    Returns:
        `list[Turn]`:
            The turns, first turn first; empty when there is no model token.
    """
    mask = [1] * len(completion_ids) if mask is None else mask
    turns, start = [], 0
    for generated, run in groupby(mask):
        end = start + len(list(run))
        if generated:
            turns.append(
                Turn(
                    context_ids=prompt_ids + completion_ids[:start],
                    action_ids=completion_ids[start:end],
                    sampling_logps=None if logps is None else logps[start:end],
                )
            )
        start = end
    return turns
