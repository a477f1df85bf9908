"""
Log-probabilities (and entropies) of turns under the current parameters.

Turns of a trajectory whose contexts extend one another share one row; a context that was rewritten starts a row of its
own. A row ends with its last scored token. The language-model head runs on scored positions only: a forward hook on
the backbone keeps just their hidden states, and TRL's fused head (trl 1.15 and 1.16) turns them into log-probabilities
without a (tokens x vocabulary) tensor. That head computes in float32, so float64 models are scored by a plain
log-softmax instead; so is everything on a CPU with trl 1.15, whose head needs a GPU.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np
import torch
import trl
import trl.trainer.utils
from packaging.version import Version
from torch import nn

from ..distributed.lock_step import LockStep
from .causal_lm import causal_lm_of
from .interface import DUMMY_KEY, MicroBatch, Scores
from .tree_attention import on_device
from .turn_buffer import Key, TurnBuffer


_FUSED_HEAD_ON_CPU = Version(trl.__version__) >= Version("1.16.0")
_CPU_TILE = 4096  # logits of a token


@dataclass
class Row:
    """One sequence to run through the model, and where the scored actions lie in it."""

    input_ids: list[int]
    spans: dict[Key, tuple[int, int]] = field(default_factory=dict)  # key -> [first, end) positions of its action


@dataclass
class RowBatch:
    """Rows of one forward pass."""

    rows: list[Row]
    multiple_of: int = 1

    @property
    def length(self) -> int:
        """Length to which the rows are padded."""
        return -(-max(len(row.input_ids) for row in self.rows) // self.multiple_of) * self.multiple_of

    @property
    def num_tokens(self) -> int:
        """Tokens that the forward pass computes, padding included."""
        return len(self.rows) * self.length

    @property
    def num_pairs(self) -> int:
        """Query-key pairs that attention computes."""
        return len(self.rows) * self.length**2


def build_rows(buffer: TurnBuffer, keys: Iterable[Key]) -> list[Row]:
    """
    Lay the requested turns out in as few rows as their contexts allow.

    Args:
        buffer ([`~seeupo_trl.scoring.turn_buffer.TurnBuffer`]):
            Where the turns' tokens are.
        keys (`Iterable[tuple[int, int]]`):
            Turns to score, as `(trajectory, turn)`.

    Returns:
        `list[Row]`:
            Rows in the order of the trajectories in `keys`; the rows of one trajectory are next to each other.
    """
    rows: dict[tuple[int, int], Row] = {}  # (trajectory, chain) -> row
    # the last turn of a chain is the row, and the others lie in it
    for key in sorted(sorted(keys, reverse=True), key=itemgetter(0)):
        turn = buffer.turn(key)
        place = key[0], buffer.chain(key)
        if place not in rows:
            rows[place] = Row(turn.context_ids + turn.action_ids)
        rows[place].spans[key] = (len(turn.context_ids), len(turn.context_ids) + len(turn.action_ids))
    return list(rows.values())


def group_rows(
    rows: list[Row], max_rows: int, max_tokens: int | None = None, multiple_of: int = 1, together: bool = True
) -> list[RowBatch]:
    """
    Distribute rows over micro-batches, rows of similar length together.

    The rows of one trajectory stay together, because its ratio needs all of them: where a trajectory alone is over the
    limit (only possible with rewritten contexts), its micro-batch is larger.

    Args:
        rows (`list[Row]`):
            Rows as [`build_rows`] returns them.
        max_rows (`int`):
            Largest number of rows of a micro-batch.
        max_tokens (`int`, *optional*):
            Largest number of tokens of a micro-batch, padding included. It takes the place of `max_rows`.
        multiple_of (`int`, *optional*, defaults to `1`):
            Rows are padded to a multiple of this length.
        together (`bool`, *optional*, defaults to `True`):
            Whether the rows of a trajectory stay together.

    Returns:
        `list[RowBatch]`
    """
    units: dict[Any, list[Row]] = {}
    for position, row in enumerate(rows):
        units.setdefault(next(iter(row.spans))[0] if together else position, []).append(row)
    batches: list[RowBatch] = []
    length = 0  # of the last batch, whose first rows are its longest
    for unit in sorted(units.values(), key=lambda unit: -max(len(row.input_ids) for row in unit)):
        if batches:
            num_rows = len(batches[-1].rows) + len(unit)
            if num_rows * length <= max_tokens if max_tokens is not None else num_rows <= max_rows:
                batches[-1].rows += unit
                continue
        batches.append(RowBatch(list(unit), multiple_of))
        length = batches[-1].length
    return batches


class _ScoredPositions:
    """Forward hook on the backbone that keeps the hidden states of the scored positions only."""

    def __init__(self, backbone: nn.Module):
        self._selected: tuple[torch.Tensor, torch.Tensor, int] | None = None
        backbone.register_forward_hook(self)

    @contextmanager
    def select(self, rows: torch.Tensor, columns: torch.Tensor, length: int) -> Iterator[None]:
        """Keep position `columns[j]` of sequence `rows[j]`, for every j, of sequences padded to `length`."""
        self._selected = (rows, columns, length)
        try:
            yield
        finally:
            self._selected = None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._selected is None:
            return None
        rows, columns, length = self._selected
        hidden = output.last_hidden_state  # (B, S, H)
        # prompt-learning adapters put virtual tokens in front of the sequence
        output.last_hidden_state = hidden[rows, columns + hidden.size(1) - length].unsqueeze(0)  # (1, n, H)
        return output


class RowScorer:
    """
    Scores turns of text-only trajectories.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model with TRL's fused head, not wrapped for distributed training.
        pad_token_id (`int`):
            Token that fills rows of a micro-batch up to the longest one.
        temperature (`float`):
            Temperature of the sampler; logits are divided by it.
        pad_to_multiple_of (`int`, *optional*):
            Pad row lengths to a multiple of this value.
        max_tokens (`int`, *optional*):
            Largest number of tokens of a micro-batch, in place of the largest number of rows.
        aux_loss (`bool`, *optional*, defaults to `False`):
            Whether to ask a mixture-of-experts model for its load-balancing loss.
        device (`torch.device`, *optional*):
            Where the model computes; by default where its parameters are, which may be elsewhere (FSDP2 with
            offloading, a model that has not been prepared yet).

    Attributes:
        noise_floor (`float`, *optional*):
            Root mean square of the logs of turns' (length-normalised) ratios between two layouts at the same
            parameters, where every ratio should be 1; `None` before it was measured, and where there is one layout.
    """

    noise_floor: float | None = None

    def __init__(
        self,
        model: nn.Module,
        pad_token_id: int,
        temperature: float,
        pad_to_multiple_of: int | None = None,
        max_tokens: int | None = None,
        aux_loss: bool = False,
        device: torch.device | None = None,
    ):
        causal_lm = causal_lm_of(model)
        self._scored_positions = _ScoredPositions(causal_lm.base_model)
        # not its weight: FSDP2 puts shards in its place, and what refers to the whole keeps it in memory
        self._head = causal_lm.get_output_embeddings()
        self._given_device = device
        self._fused_head = self._head.weight.dtype != torch.float64 and (
            _FUSED_HEAD_ON_CPU or self._device.type != "cpu"
        )
        self._pad_token_id = pad_token_id
        self._temperature = temperature
        self._pad_to_multiple_of = pad_to_multiple_of or 1
        self._max_tokens = max_tokens
        self._aux_loss = aux_loss

    @property
    def _device(self) -> torch.device:
        return self._head.weight.device if self._given_device is None else self._given_device

    def check(self, buffer: TurnBuffer, keys: Iterable[Key], model: nn.Module, lock_step: LockStep) -> None:
        """Rows need no check: every causal language model computes them."""

    def micro_batches(
        self, buffer: TurnBuffer, keys: Iterable[Key], max_rows: int, together: bool = True
    ) -> Sequence[MicroBatch]:
        """Lay the requested turns out in rows, see [`build_rows`] and [`group_rows`]."""
        return group_rows(build_rows(buffer, keys), max_rows, self._max_tokens, self._pad_to_multiple_of, together)

    def num_tokens(self, buffer: TurnBuffer, keys: Iterable[Key]) -> int:
        """Tokens that a micro-batch of the requested turns would compute."""
        return RowBatch(build_rows(buffer, keys), self._pad_to_multiple_of).num_tokens

    def dummy_batch(self) -> RowBatch:
        """A row that belongs to no trajectory, for a process that must take part in a forward pass without data."""
        return RowBatch([Row(input_ids=[self._pad_token_id] * 2, spans={DUMMY_KEY: (1, 2)})])

    def attention(self, batch: Any) -> AbstractContextManager:
        """Rows are computed with the attention implementation that the model has."""
        return nullcontext()

    def score(self, model: nn.Module, batch: Any) -> tuple[Scores, torch.Tensor | None]:
        """
        One forward pass.

        Args:
            model (`torch.nn.Module`):
                The model given to the constructor, or its distributed wrapper.
            batch (`RowBatch`):
                Rows of one micro-batch.

        Returns:
            `tuple[Scores, torch.Tensor | None]`:
                Scores of its turns, and the load-balancing loss where it was asked for.
        """
        rows, length = batch.rows, batch.length
        device = self._device
        attention_mask = np.arange(length) < np.array([len(row.input_ids) for row in rows])[:, None]  # (B, S)
        input_ids = np.full_like(attention_mask, self._pad_token_id, dtype=np.int64)
        input_ids[attention_mask] = np.fromiter(chain.from_iterable(row.input_ids for row in rows), np.int64)
        row_index, columns, labels, sizes = [], [], [], {}
        for index, row in enumerate(rows):
            for key, (start, end) in row.spans.items():
                row_index += [index] * (end - start)
                columns += range(start - 1, end - 1)  # the position before a token predicts it
                labels += row.input_ids[start:end]
                sizes[key] = end - start
        inputs = {
            "input_ids": on_device(input_ids, device),
            "attention_mask": on_device(attention_mask.astype(np.int64), device),
        }
        if self._aux_loss:
            inputs["output_router_logits"] = True
        positions = torch.tensor([row_index, columns, labels]).to(device, non_blocking=True)  # (3, n)
        return self._scores(model, inputs, (positions[0], positions[1], length), positions[2:], sizes)

    def _scores(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        selection: tuple[torch.Tensor, torch.Tensor, int],
        labels: torch.Tensor,
        sizes: dict[Key, int],
    ) -> tuple[Scores, torch.Tensor | None]:
        """Scores of `labels`, of shape `(1, n)`, at the selected positions, cut into actions of the given sizes."""
        with self._scored_positions.select(*selection):
            logps, entropies, aux_loss = self._per_token(model, inputs, labels)
        return Scores(sizes, logps[0], entropies[0]), aux_loss

    def _per_token(
        self, model: nn.Module, inputs: dict[str, Any], labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        if not self._fused_head:
            outputs = model(**inputs, use_cache=False)
            log_probs = torch.log_softmax(outputs.logits / self._temperature, dim=-1)  # (1, n, V)
            logps = log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)  # (1, n)
            entropies = -(log_probs.exp() * log_probs).sum(-1)
        else:
            with _small_tiles() if self._device.type == "cpu" else nullcontext():
                outputs = model(**inputs, shift_labels=labels, fused_lm_head=True)
            logps = outputs.log_probs
            # the reference model's head computes no entropies
            entropies = torch.zeros_like(logps) if outputs.entropy is None else outputs.entropy
        return logps, entropies, outputs.aux_loss if self._aux_loss else None


@contextmanager
def _small_tiles() -> Iterator[None]:
    """
    Has TRL's fused head (trl 1.16), forward and backward, work in tiles that a CPU's caches hold. Its own are made for
    GPUs: with PyTorch's operations in place of a kernel they would be most of the memory of a micro-batch, and take
    twice the time.
    """
    before = trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE
    trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = min(before, _CPU_TILE)
    try:
        yield
    finally:
        trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = before
