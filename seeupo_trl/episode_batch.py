"""One generation batch on its way through the trainer: played, scored by reward functions, ready for the update."""

from dataclasses import dataclass, field
from typing import Any

import torch

from .evaluation.outcome import Outcome
from .trajectory import Trajectory, turns_from_mask


@dataclass
class EpisodeBatch:
    """
    The `n` episodes of this process in one generation batch.

    Args:
        rows (`list[dict]`):
            Dataset rows, one an episode.
        trajectories (`list[Trajectory]`):
            The episodes as they were played.
        rewards_per_func (`torch.Tensor` of shape `(N, F)`):
            Reward by reward function, of the episodes of all processes; NaN where a function gave none.
        num_trajectories (`int`):
            `N`, the number of trajectories over all processes.
        is_left_out (`list[bool]`):
            Whether the trainer leaves an episode out of training (`mask_truncated_completions`).
        outcomes (`list[Outcome]`):
            What became of the episodes.
    """

    rows: list[dict[str, Any]]
    trajectories: list[Trajectory] = field(default_factory=list)
    rewards_per_func: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    num_trajectories: int = 0
    is_left_out: list[bool] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def trained(self) -> list[Trajectory]:
        """The trajectories with the turns that are trained on: none of an episode that is left out or quarantined."""
        return [
            Trajectory(turns=[]) if left_out or trajectory.is_quarantined else trajectory
            for trajectory, left_out in zip(self.trajectories, self.is_left_out, strict=True)
        ]


def trajectories_from_masks(
    prompt_ids: list[list[int]],
    completion_ids: list[list[int]],
    masks: list[list[int]] | None,
    logps: list[list[float]] | None,
    completions: list[Any],
) -> list[Trajectory]:
    """
    Trajectories of a rollout that says no more than TRL asks for, see [`~seeupo_trl.trajectory.turns_from_mask`].

    Args:
        prompt_ids (`list[list[int]]`), completion_ids (`list[list[int]]`):
            Tokens of each sample.
        masks (`list[list[int]]`, *optional*):
            1 for tokens of the model; `None` where all are.
        logps (`list[list[float]]`, *optional*):
            Log-probabilities of the completions' tokens under the sampler.
        completions (`list`):
            Completions as TRL hands them to reward functions; those that are conversations are kept as messages.
    """
    masks = masks or [None] * len(prompt_ids)
    logps = logps or [None] * len(prompt_ids)
    return [
        Trajectory(turns=turns_from_mask(*sample), messages=messages if isinstance(messages, list) else [])
        for *sample, messages in zip(prompt_ids, completion_ids, masks, logps, completions, strict=True)
    ]


def check_finite(rewards_per_func: torch.Tensor, names: list[str]) -> None:
    """
    Refuse infinite rewards.

    Args:
        rewards_per_func (`torch.Tensor` of shape `(N, F)`), names (`list[str]`):
            Rewards and the names of the functions.

    Raises:
        `ValueError`:
            With the name of the first function that returned one.
    """
    infinite = rewards_per_func.isinf().any(dim=0)
    if infinite.any():
        raise ValueError(
            f"The reward function '{names[infinite.nonzero()[0].item()]}' returned an infinite reward. Rewards must "
            "be finite numbers, or `None` for a completion that cannot be scored."
        )
