"""What the update asks of a way to compute log-probabilities: rows, trees and samples with images are three."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate
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


class Scores(Mapping[Key, TurnScores]):
    """
    Scores of turns whose actions lie one after another. Those of a single turn are made where they are asked for:
    thousands of small tensors that nobody reads would keep the garbage collector busy.

    Args:
        sizes (`dict[tuple[int, int], int]`):
            Number of tokens of each turn's action, in the order in which they lie.
        logps (`torch.Tensor` of shape `(S,)`), entropies (`torch.Tensor` of shape `(S,)`):
            By token.
    """

    def __init__(self, sizes: dict[Key, int], logps: torch.Tensor, entropies: torch.Tensor):
        self.sizes = sizes
        self.logps = logps
        self.entropies = entropies
        self._ends = dict(zip(sizes, accumulate(sizes.values()), strict=True))

    @classmethod
    def joined(cls, parts: Sequence["Scores"]) -> "Scores":
        """The scores of several forward passes."""
        sizes = {key: size for part in parts for key, size in part.sizes.items()}
        if not parts:
            return cls(sizes, torch.empty(0), torch.empty(0))
        return cls(sizes, torch.cat([part.logps for part in parts]), torch.cat([part.entropies for part in parts]))

    def __getitem__(self, key: Key) -> TurnScores:
        place = self._place(key)
        return TurnScores(self.logps[place.start : place.stop], self.entropies[place.start : place.stop])

    def __iter__(self) -> Iterator[Key]:
        return iter(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def in_a_row(self, turns: Iterable[Sequence[Key]]) -> TurnScores:
        """Scores of the actions that some trajectories' turns make up, one after another, each of shape `(S,)`."""
        positions: list[int] = []
        for keys in turns:
            for key in keys:
                positions += self._place(key)
        index = torch.tensor(positions).to(self.logps.device, non_blocking=True)
        return TurnScores(self.logps.index_select(0, index), self.entropies.index_select(0, index))

    def logps_by_turn(self) -> dict[Key, torch.Tensor]:
        """Log-probabilities of each turn, each of shape `(|a|,)` and without gradient."""
        parts = self.logps.detach().split(list(self.sizes.values()))
        return dict(zip(self.sizes, parts, strict=True))

    def _place(self, key: Key) -> range:
        end = self._ends[key]
        return range(end - self.sizes[key], end)


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

    def score(self, model: nn.Module, batch: Any) -> tuple[Scores, torch.Tensor | None]: ...


def score_without_gradient(
    buffer: TurnBuffer, keys: Iterable[Key], scorer: Scorer, model: nn.Module, lock_step: LockStep, max_rows: int
) -> tuple[Scores, int]:
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
        `tuple[Scores, int]`:
            Scores of the turns, and the number of tokens computed on this process, padding included.
    """
    keys = list(keys)
    batches = scorer.micro_batches(buffer, keys, max_rows, together=False)
    parts: list[Scores] = []
    tokens = 0
    for number in range(lock_step.max_over_processes(len(batches))):
        batch = batches[number] if number < len(batches) else scorer.dummy_batch()
        with lock_step.inference(), scorer.attention(batch):
            parts.append(scorer.score(model, batch)[0])
        tokens += batch.num_tokens
    return Scores.joined(parts[: len(batches)]), tokens
