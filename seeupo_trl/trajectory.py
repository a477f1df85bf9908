"""
The turn-indexed buffer: what was sampled, kept as tokens, and the weights that travel through an iteration.

Ground truth is token ids exactly as they were sampled; nothing is ever tokenised again. Every per-trajectory quantity
(the advantage, the turn weight `M`) is keyed by the trajectory, never by its position in some batch.
"""

from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

from .envs.base import ENVIRONMENT_FAULTS
from .update.objective import fold_in_ratio
from .update.schedule import Block


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
    """

    context_ids: list[int]
    action_ids: list[int]
    sampling_logps: list[float] | None = None

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


class TurnBuffer:
    """
    The trajectories of one iteration on one process, with the turn weights `M` keyed by trajectory.

    Args:
        trajectories (`list[Trajectory]`):
            This process's trajectories. A trajectory's index in this list is its key everywhere else.
        advantages (`list[float]`):
            Normalised advantage `A_i` of each trajectory (Eq. 9).
        num_trajectories (`int`):
            `N`, the number of trajectories over all processes.
        weight_clip (`float`, *optional*):
            Bound of the ratios and of their running product inside `M`, see
            [`~seeupo_trl.update.objective.fold_in_ratio`].
    """

    def __init__(
        self,
        trajectories: list[Trajectory],
        advantages: list[float],
        num_trajectories: int,
        weight_clip: float | None = None,
    ):
        if len(trajectories) != len(advantages):
            raise ValueError(f"Got {len(trajectories)} trajectories but {len(advantages)} advantages; need one each.")
        self.trajectories = trajectories
        self.advantages = advantages
        self.num_trajectories = num_trajectories
        self.weight_clip = weight_clip
        self._chains: dict[tuple[int, int], tuple[int, np.ndarray]] = {}
        self._weights = [1.0] * len(trajectories)  # M_i / A_i
        self._unclipped_weights = [1.0] * len(trajectories)

    def __len__(self) -> int:
        return len(self.trajectories)

    @property
    def num_turns(self) -> int:
        """Largest number of turns of a trajectory on this process."""
        return max((len(trajectory.turns) for trajectory in self.trajectories), default=0)

    def pool(self, block: Block) -> list[int]:
        """Trajectories that play at least one turn of `block` (`D_t` for a block of the single turn t)."""
        return [i for i, trajectory in enumerate(self.trajectories) if len(trajectory.turns) >= block.first]

    def turns_in(self, index: int, block: Block) -> list[tuple[int, int]]:
        """Keys `(trajectory, turn)` of the turns that trajectory `index` plays in `block`; turns count from 1."""
        return [(index, turn) for turn in block.turns_of(len(self.trajectories[index].turns))]

    def turn(self, key: tuple[int, int]) -> Turn:
        """The turn behind a key `(trajectory, turn)`."""
        index, number = key
        return self.trajectories[index].turns[number - 1]

    def sequence(self, key: tuple[int, int]) -> np.ndarray:
        """Tokens of a turn's context and action, shape `(S,)`."""
        return self._chain_and_sequence(key)[1]

    def chain(self, key: tuple[int, int]) -> int:
        """
        Number of the chain that a turn belongs to. The turns of a chain extend one another: the shorter of two is a
        prefix of the longer. A trajectory whose contexts are append-only has one chain.
        """
        return self._chain_and_sequence(key)[0]

    def _chain_and_sequence(self, key: tuple[int, int]) -> tuple[int, np.ndarray]:
        if key not in self._chains:
            leaves: list[tuple[np.ndarray, bytes]] = []
            turns = self.trajectories[key[0]].turns
            for number in range(len(turns), 0, -1):
                turn = turns[number - 1]
                end = len(turn.context_ids) + len(turn.action_ids)
                if number < len(turns) and turns[number].extends(turn):
                    # the usual case, without a conversion
                    chain, extended = self._chains[key[0], number + 1]
                    self._chains[key[0], number] = chain, extended[:end]
                else:
                    tokens = np.array(turn.context_ids + turn.action_ids, dtype=np.int32)
                    content = tokens.tobytes()
                    chain = next((i for i, leaf in enumerate(leaves) if leaf[1].startswith(content)), len(leaves))
                    if chain == len(leaves):
                        leaves.append((tokens, content))
                    self._chains[key[0], number] = chain, leaves[chain][0][:end]
        return self._chains[key]

    def weight(self, index: int) -> float:
        """Turn weight `M` of trajectory `index`: its advantage times the ratios folded in so far (Eq. 7 and 8)."""
        return self.advantages[index] * self._weights[index]

    def relative_weight(self, index: int) -> float:
        """`|M| / |A|` of trajectory `index`."""
        return self._weights[index]

    def unclipped_relative_weight(self, index: int) -> float:
        """What [`relative_weight`] would be without `weight_clip`."""
        return self._unclipped_weights[index]

    def fold_in(self, index: int, log_ratio: float) -> None:
        """Multiply the turn weight of trajectory `index` by the ratio of the block that was just updated (Eq. 8)."""
        self._weights[index] = fold_in_ratio(self._weights[index], log_ratio, self.weight_clip)
        self._unclipped_weights[index] = fold_in_ratio(self._unclipped_weights[index], log_ratio, None)
