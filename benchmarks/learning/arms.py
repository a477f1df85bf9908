"""
What is compared. All arms play the same number of episodes, 64 a batch in 8 groups, with the same optimizer (AdamW,
no warm-up, no decay, gradient norm 1), no KL penalty and temperature 1; the learning rate is tuned for each.

`steps` is the number of optimizer steps a batch: SeeUPO takes one a turn. With more than one, TRL counts optimizer
steps and not batches, so `max_steps` is multiplied.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Arm:
    """
    A method with its settings.

    Args:
        trainer (`str`): `"SeeUPOTrainer"`, TRL's `"GRPOTrainer"`, or `"PPOTrainer"` of `ppo.py`.
        settings (`dict`): Fields of its configuration that differ from its defaults.
        steps (`int` or `str`): Passes over a batch, or `"turns"`: as many as the task has turns.
    """

    trainer: str
    settings: dict[str, Any] = field(default_factory=dict)
    steps: int | str = 1


def _seeupo(steps: int = 1, **settings) -> Arm:
    return Arm("SeeUPOTrainer", settings, steps)


def _trl(steps: int | str = 1, **settings) -> Arm:
    return Arm("GRPOTrainer", settings, steps)


_GSPO = {"importance_sampling_level": "sequence", "loss_type": "grpo"}

ARMS: dict[str, Arm] = {
    # ours: the four orders, and the two published sets of settings
    "seeupo-reverse": _seeupo(),
    "seeupo-forward": _seeupo(update_order="forward"),
    "seeupo-random": _seeupo(update_order="random"),
    "seeupo-simultaneous": _seeupo(update_order="simultaneous"),
    "seeupo-authors": _seeupo(old_policy="turn", advantage_clip=3.0),
    "seeupo-paper": _seeupo(turn_weight_clip=None, turn_ratio="product"),
    # TRL's, as they are: one optimizer step a batch
    "grpo": _trl(),
    "gspo": _trl(**_GSPO),
    # TRL's RLOOTrainer takes no rollout_func. Up to a constant factor, which AdamW does not see, this is its gradient:
    # the sum over tokens, advantages without a standard deviation.
    "rloo": _trl(loss_type="dr_grpo", scale_rewards="none"),
    # the paper's REINFORCE + GRAE: the same with the standard deviation over the batch
    "reinforce-grae": _trl(loss_type="dr_grpo", scale_rewards="batch"),
    # a critic of the policy's size
    "ppo": Arm("PPOTrainer"),
    "ppo-steps": Arm("PPOTrainer", steps="turns"),
    # as many optimizer steps as SeeUPO takes
    "grpo-steps": _trl(steps="turns"),
    "gspo-steps": _trl(steps="turns", **_GSPO),
    # about as many FLOPs as SeeUPO's trees take
    "grpo-2": _trl(steps=2),
    "gspo-2": _trl(steps=2, **_GSPO),
    # several steps a turn
    "seeupo-reverse-x4": _seeupo(steps=4),
    "seeupo-forward-x4": _seeupo(steps=4, update_order="forward"),
    "seeupo-simultaneous-x4": _seeupo(steps=4, update_order="simultaneous"),
}
