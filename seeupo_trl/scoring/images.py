"""
Log-probabilities of turns whose prompt or tool results hold images.

Image features belong to whole samples in the layout of TRL's generation batch, so a trajectory is scored as TRL does
it (trl 1.15 and 1.16): one full row, padded as in that batch.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

from ..distributed.lock_step import LockStep
from .interface import DUMMY_KEY, Scores
from .rows import Row, RowBatch, group_rows
from .turn_buffer import Key, TurnBuffer


_FORWARD_FIELDS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


class SampleScorer:
    """
    Scores turns of the samples of one generation batch, images included.

    Args:
        batch (`dict[str, Any]`):
            Generation batch of TRL's `_generate_and_score_completions`: padded prompts and completions, masks and
            image features.
        per_token_scores (`Callable`):
            TRL's `_get_per_token_logps_and_entropies`.
        aux_loss (`bool`, *optional*, defaults to `False`):
            Whether to ask a mixture-of-experts model for its load-balancing loss.
        entropy (`bool`, *optional*, defaults to `True`):
            Whether the model's head computes entropies; without, they are reported as 0.
        max_tokens (`int`, *optional*):
            Largest number of tokens of a micro-batch, in place of the largest number of rows.
    """

    noise_floor = None

    def __init__(
        self,
        batch: dict[str, Any],
        per_token_scores: Callable[..., tuple],
        aux_loss: bool = False,
        entropy: bool = True,
        max_tokens: int | None = None,
    ):
        self._input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)  # (B, P + C)
        self._attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        self._completion_length = batch["completion_ids"].size(1)
        self._prompt_lengths = batch["prompt_mask"].sum(1).tolist()
        self._samples = split_pixel_values_by_grid({key: batch[key] for key in _FORWARD_FIELDS if key in batch})
        self._per_token_scores = per_token_scores
        self._aux_loss = aux_loss
        self._entropy = entropy
        self._max_tokens = max_tokens

    def check(self, buffer: TurnBuffer, keys: Iterable[Key], model: nn.Module, lock_step: LockStep) -> None:
        """Samples are computed in TRL's own layout."""

    def micro_batches(
        self, buffer: TurnBuffer, keys: Iterable[Key], max_rows: int, together: bool = True
    ) -> list[RowBatch]:
        """One row a trajectory; spans are positions in the completion."""
        rows: dict[int, Row] = {}
        for key in sorted(keys):
            index, turn = key[0], buffer.turn(key)
            row = rows.setdefault(index, Row(input_ids=self._input_ids[index].tolist()))
            start = len(turn.context_ids) - self._prompt_lengths[index]
            row.spans[key] = (start, start + len(turn.action_ids))
        return group_rows(list(rows.values()), max_rows, self._max_tokens)

    def num_tokens(self, buffer: TurnBuffer, keys: Iterable[Key]) -> int:
        """Tokens of a sample, padding included."""
        return self._input_ids.size(1)

    def dummy_batch(self) -> RowBatch:
        """A row that belongs to no trajectory, for a process that must take part in a forward pass without data."""
        return RowBatch([Row(input_ids=self._input_ids[0].tolist(), spans={DUMMY_KEY: (0, 1)})])

    def attention(self, batch: RowBatch) -> AbstractContextManager:
        """The attention implementation that the model has."""
        return nullcontext()

    def score(self, model: nn.Module, batch: RowBatch) -> tuple[Scores, torch.Tensor | None]:
        """One forward pass, see [`~seeupo_trl.scoring.rows.RowScorer.score`]."""
        rows = batch.rows
        indices = [max(next(iter(row.spans))[0], 0) for row in rows]  # the dummy row borrows the first sample
        logps, entropies, aux_loss = self._per_token_scores(
            model,
            self._input_ids[indices],
            self._attention_mask[indices],
            self._completion_length,
            compute_entropy=self._entropy,
            compute_aux_loss=self._aux_loss,
            **unsplit_pixel_values_by_grid({key: _take(value, indices) for key, value in self._samples.items()}),
        )
        if entropies is None:
            entropies = torch.zeros_like(logps)
        spans = [(position, *span) for position, row in enumerate(rows) for span in row.spans.values()]
        sizes = {key: end - start for row in rows for key, (start, end) in row.spans.items()}
        flat = [torch.cat([values[i, start:end] for i, start, end in spans]) for values in (logps, entropies)]
        return Scores(sizes, *flat), aux_loss


def _take(values: torch.Tensor | list, indices: list[int]) -> torch.Tensor | list:
    return values[indices] if isinstance(values, torch.Tensor) else [values[index] for index in indices]
