"""The loss that is reported of an evaluation batch."""

import torch
from torch import nn

from ..distributed.lock_step import LockStep
from ..scoring.interface import Scorer, score_without_gradient
from ..scoring.turn_buffer import TurnBuffer
from .log_probs import Reference
from .objective import k3_divergence


def evaluation_loss(
    buffer: TurnBuffer,
    advantages: list[float],
    num_trajectories: int,
    lock_step: LockStep,
    scorer: Scorer,
    model: nn.Module,
    max_rows: int,
    reference: Reference | None,
    beta: float,
) -> dict[str, float]:
    """
    Loss of all turns at once, at a ratio of 1. Must be called on every process.

    Args:
        buffer ([`~seeupo_trl.scoring.turn_buffer.TurnBuffer`]), advantages (`list[float]`):
            This process's trajectories with their advantages.
        num_trajectories (`int`):
            `N`, the number of trajectories over all processes.
        lock_step ([`~seeupo_trl.distributed.lock_step.LockStep`]):
            Communication and mixed precision.
        scorer ([`~seeupo_trl.scoring.interface.Scorer`]), model (`torch.nn.Module`):
            The policy, without distributed wrapper.
        max_rows (`int`):
            Largest number of rows of a forward pass.
        reference ([`~seeupo_trl.update.log_probs.Reference`], *optional*), beta (`float`):
            The KL term.

    Returns:
        `dict[str, float]`:
            `loss`, and means over tokens: `entropy` and, with a reference, `kl`.
    """
    keys = [(i, turn) for i, t in enumerate(buffer.trajectories) for turn in range(1, len(t.turns) + 1)]
    played = sorted({index for index, _ in keys})
    scorer.check(buffer, keys, model, lock_step)
    scores, _ = score_without_gradient(buffer, keys, scorer, model, lock_step, max_rows)
    totals = torch.zeros(4, dtype=torch.float64)  # loss, tokens, entropy, kl
    totals[0] = -sum(advantages[index] for index in played)
    totals[1] = len(scores.logps)
    totals[2] = scores.entropies.sum()
    if reference is not None:
        with reference.active():
            reference.scorer.check(buffer, keys, reference.model, lock_step)
            ref_scores, _ = score_without_gradient(
                buffer, keys, reference.scorer, reference.model, lock_step, max_rows
            )
        for index in played:
            turns = [key for key in keys if key[0] == index]
            kl = torch.cat([k3_divergence(scores[key].logps, ref_scores[key].logps) for key in turns])
            totals[0] += beta * kl.mean().item()
            totals[3] += kl.sum().item()
    loss, tokens, entropy, kl = lock_step.gather(totals.float()).sum(0).tolist()
    values = {"loss": loss / num_trajectories, "entropy": entropy / max(tokens, 1.0)}
    if reference is not None:
        values["kl"] = kl / max(tokens, 1.0)
    return values
