"""Log-probabilities of turns that are constants of the update: under `theta_k`, the denominator, the reference."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from ..distributed.lock_step import LockStep
from ..scoring.interface import Scorer, Scores, score_without_gradient
from ..scoring.turn_buffer import Key, TurnBuffer


@dataclass(frozen=True)
class Reference:
    """The reference policy of the KL term: a scorer, its model, and a context in which it is in force."""

    scorer: Scorer
    model: nn.Module
    active: Callable[[], AbstractContextManager]


class LogProbs:
    """
    Log-probabilities by turn, each of shape `(|a|,)`, without gradient.

    Args:
        buffer ([`~seeupo_trl.scoring.turn_buffer.TurnBuffer`]):
            Where the turns' tokens are.
        scorer ([`~seeupo_trl.scoring.interface.Scorer`]), model (`torch.nn.Module`):
            The policy, without distributed wrapper.
        lock_step ([`~seeupo_trl.distributed.lock_step.LockStep`]):
            Communication and mixed precision.
        max_rows (`int`):
            Largest number of rows of a forward pass.
        old_policy (`str`):
            `"iteration"`: ratios have `theta_k` in the denominator. `"turn"`: the parameters at the start of the
            turn's own update.

    Attributes:
        start (`dict[tuple[int, int], torch.Tensor]`):
            Under `theta_k`, which sampled.
        old (`dict[tuple[int, int], torch.Tensor]`):
            In the denominator of the ratios; the same as `start` with `old_policy="iteration"`.
        reference (`dict[tuple[int, int], torch.Tensor]`):
            Under the reference policy.
        num_tokens (`int`):
            Tokens computed so far, padding included.
    """

    def __init__(
        self,
        buffer: TurnBuffer,
        scorer: Scorer,
        model: nn.Module,
        lock_step: LockStep,
        max_rows: int,
        old_policy: str,
    ):
        self._buffer = buffer
        self._scorer = scorer
        self.model = model
        self._lock_step = lock_step
        self._max_rows = max_rows
        self.start: dict[Key, torch.Tensor] = {}
        self.old: dict[Key, torch.Tensor] = self.start if old_policy == "iteration" else {}
        self.reference: dict[Key, torch.Tensor] = {}
        self.num_tokens = 0

    def now(self, keys: Iterable[Key]) -> Scores:
        """Scores under the present parameters. Must be called on every process."""
        return self._score(keys, self._scorer, self.model)

    def score_reference(self, keys: Iterable[Key], reference: Reference) -> None:
        """Fill [`reference`]. Must be called on every process."""
        with reference.active():
            if reference.scorer is not self._scorer:
                reference.scorer.check(self._buffer, keys, reference.model, self._lock_step)
            self.reference = self._score(keys, reference.scorer, reference.model).logps_by_turn()

    def _score(self, keys: Iterable[Key], scorer: Scorer, model: nn.Module) -> Scores:
        scores, tokens = score_without_gradient(self._buffer, keys, scorer, model, self._lock_step, self._max_rows)
        self.num_tokens += tokens
        return scores
