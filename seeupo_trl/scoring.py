"""
Log-probabilities (and entropies) of turns under the current parameters.

Turns of a trajectory whose contexts extend one another share one row; a context that was rewritten starts a row of its
own. A row ends with its last scored token. The language-model head runs on scored positions only: a forward hook on
the backbone keeps just their hidden states, and TRL's fused head (trl 1.15 and 1.16) turns them into log-probabilities
without a (tokens x vocabulary) tensor. That head computes in float32, so float64 models are scored by a plain
log-softmax instead; so is everything on a CPU with trl 1.15, whose head needs a GPU.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import trl
from accelerate.utils import is_peft_model
from packaging.version import Version
from torch import nn

from .buffer import TurnBuffer
from .engine import UpdateEngine


_FUSED_HEAD_ON_CPU = Version(trl.__version__) >= Version("1.16.0")

Key = tuple[int, int]  # (trajectory, turn counted from 1)
DUMMY_KEY: Key = (-1, 0)


class TurnScores(NamedTuple):
    """Scores of one action: `logps` and `entropies`, each of shape `(|a|,)`."""

    logps: torch.Tensor
    entropies: torch.Tensor


@dataclass
class Row:
    """One sequence to run through the model, and where the scored actions lie in it."""

    input_ids: list[int]
    spans: dict[Key, tuple[int, int]] = field(default_factory=dict)  # key -> [first, end) positions of its action


@dataclass
class RowBatch:
    """Rows of one forward pass."""

    rows: list[Row]

    @property
    def num_tokens(self) -> int:
        """Tokens that the forward pass computes, padding included."""
        return len(self.rows) * max(len(row.input_ids) for row in self.rows)


class MicroBatch(Protocol):
    """What one forward pass computes, in the layout of some scorer."""

    @property
    def num_tokens(self) -> int: ...


class Scorer(Protocol):
    """A way to score turns. All turns of a trajectory that are asked for together lie in one micro-batch."""

    def micro_batches(self, buffer: TurnBuffer, keys: Iterable[Key], max_rows: int) -> Sequence[MicroBatch]: ...

    def dummy_batch(self) -> MicroBatch: ...

    def score(self, model: nn.Module, batch: Any) -> tuple[dict[Key, TurnScores], torch.Tensor | None]: ...


def build_rows(buffer: TurnBuffer, keys: Iterable[Key]) -> list[Row]:
    """
    Lay the requested turns out in as few rows as their contexts allow.

    Args:
        buffer ([`~seeupo_trl.buffer.TurnBuffer`]):
            Where the turns' tokens are.
        keys (`Iterable[tuple[int, int]]`):
            Turns to score, as `(trajectory, turn)`.

    Returns:
        `list[Row]`:
            Rows in the order of the trajectories in `keys`; the rows of one trajectory are next to each other.
    """
    rows_of: dict[int, list[Row]] = {}
    # last turn first: an earlier turn that a later context extends then finds its row already there
    for key in sorted(keys, key=lambda key: -key[1]):
        turn = buffer.turn(key)
        sequence = turn.context_ids + turn.action_ids
        rows = rows_of.setdefault(key[0], [])
        row = next((row for row in rows if row.input_ids[: len(sequence)] == sequence), None)
        if row is None:
            row = Row(input_ids=sequence)
            rows.append(row)
        row.spans[key] = (len(turn.context_ids), len(sequence))
    return [row for index in sorted(rows_of) for row in rows_of[index]]


def group_rows(rows: list[Row], max_rows: int) -> list[RowBatch]:
    """
    Distribute rows over micro-batches, rows of similar length together.

    The rows of one trajectory stay together, because its ratio needs all of them: where a trajectory alone has more
    than `max_rows` rows (only with rewritten contexts), its micro-batch is larger.

    Args:
        rows (`list[Row]`):
            Rows as [`build_rows`] returns them.
        max_rows (`int`):
            Largest number of rows of a micro-batch.

    Returns:
        `list[RowBatch]`
    """
    units: dict[int, list[Row]] = {}
    for row in rows:
        units.setdefault(next(iter(row.spans))[0], []).append(row)
    batches: list[list[Row]] = []
    for unit in sorted(units.values(), key=lambda unit: -max(len(row.input_ids) for row in unit)):
        if batches and len(batches[-1]) + len(unit) <= max_rows:
            batches[-1].extend(unit)
        else:
            batches.append(list(unit))
    return [RowBatch(batch) for batch in batches]


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
        aux_loss (`bool`, *optional*, defaults to `False`):
            Whether to ask a mixture-of-experts model for its load-balancing loss.
    """

    def __init__(
        self,
        model: nn.Module,
        pad_token_id: int,
        temperature: float,
        pad_to_multiple_of: int | None = None,
        aux_loss: bool = False,
    ):
        causal_lm = model.get_base_model() if is_peft_model(model) else model
        self._scored_positions = _ScoredPositions(causal_lm.base_model)
        head = causal_lm.get_output_embeddings().weight
        self._fused_head = head.dtype != torch.float64 and (_FUSED_HEAD_ON_CPU or head.device.type != "cpu")
        self._pad_token_id = pad_token_id
        self._temperature = temperature
        self._pad_to_multiple_of = pad_to_multiple_of or 1
        self._aux_loss = aux_loss

    def micro_batches(self, buffer: TurnBuffer, keys: Iterable[Key], max_rows: int) -> list[RowBatch]:
        """Lay the requested turns out in rows, see [`build_rows`] and [`group_rows`]."""
        return group_rows(build_rows(buffer, keys), max_rows)

    def dummy_batch(self) -> RowBatch:
        """A row that belongs to no trajectory, for a process that must take part in a forward pass without data."""
        return RowBatch([Row(input_ids=[self._pad_token_id] * 2, spans={DUMMY_KEY: (1, 2)})])

    def score(self, model: nn.Module, batch: RowBatch) -> tuple[dict[Key, TurnScores], torch.Tensor | None]:
        """
        One forward pass.

        Args:
            model (`torch.nn.Module`):
                The model given to the constructor, or its distributed wrapper.
            batch (`RowBatch`):
                Rows of one micro-batch.

        Returns:
            `tuple[dict[tuple[int, int], TurnScores], torch.Tensor | None]`:
                Scores by turn, and the load-balancing loss where it was asked for.
        """
        rows = batch.rows
        device = next(model.parameters()).device
        longest = max(len(row.input_ids) for row in rows)
        length = -(-longest // self._pad_to_multiple_of) * self._pad_to_multiple_of
        input_ids = torch.full((len(rows), length), self._pad_token_id)  # (B, S)
        attention_mask = torch.zeros_like(input_ids)
        row_index, columns, labels, sizes = [], [], [], []
        for index, row in enumerate(rows):
            input_ids[index, : len(row.input_ids)] = torch.tensor(row.input_ids)
            attention_mask[index, : len(row.input_ids)] = 1
            for start, end in row.spans.values():
                row_index += [index] * (end - start)
                columns += range(start - 1, end - 1)  # the position before a token predicts it
                labels += row.input_ids[start:end]
                sizes.append(end - start)
        inputs = {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}
        if self._aux_loss:
            inputs["output_router_logits"] = True
        labels = torch.tensor([labels], device=device)  # (1, n)
        selection = torch.tensor(row_index, device=device), torch.tensor(columns, device=device), length
        with self._scored_positions.select(*selection):
            logps, entropies, aux_loss = self._per_token(model, inputs, labels)
        keys = [key for row in rows for key in row.spans]
        scores = zip(logps[0].split(sizes), entropies[0].split(sizes), strict=True)
        return {key: TurnScores(*pair) for key, pair in zip(keys, scores, strict=True)}, aux_loss

    def _per_token(
        self, model: nn.Module, inputs: dict[str, Any], labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        if not self._fused_head:
            outputs = model(**inputs, use_cache=False)
            log_probs = torch.log_softmax(outputs.logits / self._temperature, dim=-1)  # (1, n, V)
            logps = log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)  # (1, n)
            entropies = -(log_probs.exp() * log_probs).sum(-1)
        else:
            outputs = model(**inputs, shift_labels=labels, fused_lm_head=True)
            logps = outputs.log_probs
            # the reference model's head computes no entropies
            entropies = torch.zeros_like(logps) if outputs.entropy is None else outputs.entropy
        return logps, entropies, outputs.aux_loss if self._aux_loss else None


def score_without_gradient(
    buffer: TurnBuffer, keys: Iterable[Key], scorer: Scorer, model: nn.Module, engine: UpdateEngine, max_rows: int
) -> tuple[dict[Key, TurnScores], int]:
    """
    Score turns in as many forward passes as the process with the most rows needs. Must be called on every process.

    Args:
        buffer ([`~seeupo_trl.buffer.TurnBuffer`]):
            Where the turns' tokens are.
        keys (`Iterable[tuple[int, int]]`):
            Turns to score on this process, possibly none.
        scorer ([`Scorer`]):
            Scorer of `model`.
        model (`torch.nn.Module`):
            Model without distributed wrapper.
        engine ([`~seeupo_trl.engine.UpdateEngine`]):
            Communication and mixed precision.
        max_rows (`int`):
            Largest number of rows of a forward pass.

    Returns:
        `tuple[dict[tuple[int, int], TurnScores], int]`:
            Scores by turn, and the number of tokens computed on this process, padding included.
    """
    batches = scorer.micro_batches(buffer, keys, max_rows)
    scores: dict[Key, TurnScores] = {}
    tokens = 0
    for number in range(engine.max_over_processes(len(batches))):
        batch = batches[number] if number < len(batches) else scorer.dummy_batch()
        with engine.inference():
            scores.update(scorer.score(model, batch)[0])
        tokens += batch.num_tokens
    return scores, tokens
