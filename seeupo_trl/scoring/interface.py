"""What the update asks of a way to compute log-probabilities: rows, trees and samples with images are three."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from ..distributed.lock_step import LockStep
from .turn_buffer import Key, TurnBuffer


DUMMY_KEY: Key = (-1, 0)  # of a row that belongs to no trajectory


class TurnScores(NamedTuple):
    """Scores of one action: `logps` and `entropies`, each of shape `(|a|,)`."""

    logps: torch.Tensor
    entropies: torch.Tensor


class MicroBatch(Protocol):
    """What one forward pass computes, in the layout of some scorer."""

    @property
    def num_tokens(self) -> int: ...


class Scorer(Protocol):
    """
    A way to score turns.

    `micro_batches` puts all turns of a trajectory that are asked for together into one micro-batch; with
    `together=False` it may distribute them where they would not fit into one. `num_tokens` is what they would compute
    in a micro-batch of their own. `attention` must be in force around the forward and the backward pass of a batch.
    `check` is called on every process before anything is scored, and may measure `noise_floor`: how far rounding alone
    moves the log of a turn's ratio.
    """

    @property
    def noise_floor(self) -> float | None: ...

    def check(self, buffer: TurnBuffer, keys: Iterable[Key], model: nn.Module, lock_step: LockStep) -> None: ...

    def micro_batches(
        self, buffer: TurnBuffer, keys: Iterable[Key], max_rows: int, together: bool = True
    ) -> Sequence[MicroBatch]: ...

    def num_tokens(self, buffer: TurnBuffer, keys: Iterable[Key]) -> int: ...

    def dummy_batch(self) -> MicroBatch: ...

    def attention(self, batch: Any) -> AbstractContextManager: ...

    def score(self, model: nn.Module, batch: Any) -> tuple[dict[Key, TurnScores], torch.Tensor | None]: ...


def score_without_gradient(
    buffer: TurnBuffer, keys: Iterable[Key], scorer: Scorer, model: nn.Module, lock_step: LockStep, max_rows: int
) -> tuple[dict[Key, TurnScores], int]:
    """
    Score turns in as many forward passes as the process with the most rows needs, without a [`~Scorer.check`]. Must be
    called on every process.

    Args:
        buffer ([`~seeupo_trl.scoring.turn_buffer.TurnBuffer`]):
            Where the turns' tokens are.
        keys (`Iterable[tuple[int, int]]`):
            Turns to score on this process, possibly none.
        scorer ([`Scorer`]):
            Scorer of `model`.
        model (`torch.nn.Module`):
            Model without distributed wrapper.
        lock_step ([`~seeupo_trl.distributed.lock_step.LockStep`]):
            Communication and mixed precision.
        max_rows (`int`):
            Largest number of rows of a forward pass.

    Returns:
        `tuple[dict[tuple[int, int], TurnScores], int]`:
            Scores by turn, and the number of tokens computed on this process, padding included.
    """
    keys = list(keys)
    batches = scorer.micro_batches(buffer, keys, max_rows, together=False)
    scores: dict[Key, TurnScores] = {}
    tokens = 0
    for number in range(lock_step.max_over_processes(len(batches))):
        batch = batches[number] if number < len(batches) else scorer.dummy_batch()
        with lock_step.inference(), scorer.attention(batch):
            scores.update(scorer.score(model, batch)[0])
        tokens += batch.num_tokens
    return scores, tokens
