"""What became of one episode, in a form that is small enough to be gathered from all processes."""

import hashlib
import json
import logging
import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from datasets.fingerprint import Hasher

from ..envs.base import ENVIRONMENT_FAULTS
from ..envs.plain import real_number
from ..rollout.observations import mended
from ..trajectory import Trajectory
from .as_json import text_of
from .info_metrics import numbers_in


logger = logging.getLogger(__name__)


@dataclass
class Outcome:
    """
    The outcome of one trajectory.

    Args:
        index (`int`):
            Number of the trajectory among those of all processes, from 0: in an iteration, or in an evaluation.
        group (`int`):
            Number of the group of completions of one prompt, from 0.
        task (`str`):
            The dataset row's `id` or `task_id`, else a hash of the row.
        category (`str`, *optional*):
            `info["category"]` of the trajectory, else the dataset row's `category`: the first that is a text or a
            whole number.
        turns (`int`):
            Number of turns.
        stop_reason (`str`, *optional*):
            Why the episode ended, one of [`~seeupo_trl.envs.StopReason`].
        success (`bool`, *optional*):
            `info["success"]` where the environment reports it (a boolean or a number; a text is neither, nor is NaN),
            else whether the reward reaches `success_threshold`; `None` where neither says anything.
        reward (`float`, *optional*):
            Weighted sum of the reward functions; `None` for an episode that none of them scored.
        rewards (`dict[str, float]`, *optional*):
            Reward by reward function, without weight.
        advantage (`float`, *optional*, defaults to `0.0`):
            Normalised advantage.
        numbers (`dict[str, float]`, *optional*, defaults to `{}`):
            Numbers in the trajectory's `info`.
    """

    index: int
    group: int
    task: str
    category: str | None
    turns: int
    stop_reason: str | None
    success: bool | None
    reward: float | None
    rewards: dict[str, float | None] = field(default_factory=dict)
    advantage: float = 0.0
    numbers: dict[str, float] = field(default_factory=dict)

    @property
    def is_quarantined(self) -> bool:
        """Whether the environment failed, so that the episode says nothing about the policy."""
        return self.stop_reason in ENVIRONMENT_FAULTS


def describe_outcomes(
    rows: list[dict[str, Any]],
    trajectories: list[Trajectory],
    rewards_per_func: torch.Tensor,
    reward_names: list[str],
    reward_weights: torch.Tensor,
    advantages: list[float],
    *,
    first_index: int,
    group_size: int,
    success_threshold: float | None = None,
) -> list[Outcome]:
    """
    Outcomes of this process's part of a batch.

    Args:
        rows (`list[dict]`):
            Dataset rows, one for each trajectory.
        trajectories (`list[Trajectory]`):
            The `n` trajectories of this process.
        rewards_per_func (`torch.Tensor` of shape `(n, F)`):
            Reward by reward function; NaN where a function gave none.
        reward_names (`list[str]`), reward_weights (`torch.Tensor` of shape `(F,)`):
            Names and weights of the reward functions.
        advantages (`list[float]`):
            Normalised advantages.
        first_index (`int`):
            Index of the first trajectory of this process.
        group_size (`int`):
            Number of completions of one prompt.
        success_threshold (`float`, *optional*):
            Smallest reward of a success, for episodes whose environment does not report `success`.

    Returns:
        `list[Outcome]`:
            One for each trajectory.
    """
    scored = ~rewards_per_func.isnan().all(dim=1)  # (n,)
    totals = (rewards_per_func * reward_weights.to(rewards_per_func)).nansum(dim=1)  # (n,)
    outcomes = []
    parts = zip(
        rows, trajectories, rewards_per_func.tolist(), totals.tolist(), scored.tolist(), advantages, strict=True
    )
    for offset, (row, trajectory, rewards, total, is_scored, advantage) in enumerate(parts):
        reward = total if is_scored else None
        success = _success_in(trajectory.info)
        if success is None and success_threshold is not None and reward is not None:
            # rewards are float32
            success = reward >= success_threshold or math.isclose(reward, success_threshold, rel_tol=1e-6)
        categories = [trajectory.info.get("category"), row.get("category")]
        outcomes.append(
            Outcome(
                index=first_index + offset,
                group=(first_index + offset) // group_size,
                task=task_of(row),
                category=next((mended(text_of(category)) for category in categories if _is_name(category)), None),
                turns=len(trajectory.turns),
                stop_reason=None if trajectory.stop_reason is None else str(trajectory.stop_reason),
                success=success,
                reward=reward,
                rewards={
                    name: None if math.isnan(value) else value
                    for name, value in zip(reward_names, rewards, strict=True)
                },
                advantage=advantage,
                numbers=numbers_in(trajectory.info),
            )
        )
    return outcomes


def _is_name(category: Any) -> bool:
    return isinstance(category, (str, int)) and not isinstance(category, bool)


def _success_in(info: dict[str, Any]) -> bool | None:
    value = info.get("success")
    if value is None:
        return None
    try:
        return bool(real_number(value))
    except ValueError:
        _warn_of_success(type(value).__name__)
        return None


@lru_cache
def _warn_of_success(kind: str) -> None:
    logger.warning(
        '`info["success"]` is a %s that says neither yes nor no, and does not count. Give a boolean, or leave it out '
        "where success is unknown.",
        kind,
    )


def task_of(row: dict[str, Any]) -> str:
    """The `id` or `task_id` of a dataset row, else 12 hexadecimal digits that all of its columns determine."""
    for name in ("id", "task_id"):
        if isinstance(row.get(name), (str, int)):
            return str(row[name])
    text = json.dumps(row, sort_keys=True, default=_content)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _content(value: Any) -> str:
    """What stands for an image, an array or a date in a hash: as text it may have its address in memory."""
    try:
        return Hasher.hash(value)
    except Exception:  # what cannot be pickled has no content to be known by
        return type(value).__name__
