"""
Keys and values of token sequences: kept one by one without padding, computed and used in left-padded batches.

A sequence's keys and values are tensors of its own, so the memory of an episode is free when it ends. Wherever
sequences become the rows of a batch or rows become sequences again, it goes layer by layer and what was read is let
go: there is never more than one layer's worth too many.
"""

import inspect
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache

from ..scoring.token_tree import common_prefix, sort_key


MAX_TOKENS_PER_PASS = 16384
MIN_SHARED_TOKENS = 64  # a shorter beginning is not worth a forward pass of its own

# Keys and values of a sequence, a pair for each layer, each (heads, tokens, head size). `None`: they were moved away.
Layers = list[tuple[torch.Tensor, torch.Tensor] | None]


@dataclass(eq=False)
class CachedSequence:
    """
    A sequence of tokens whose keys and values are there already or are to be computed.

    Args:
        tokens (`np.ndarray` of shape `(T,)`):
            Token ids.
        source (`CachedSequence`, *optional*):
            The one that has this one's first `start` keys and values. Let go as soon as they have been taken.
        start (`int`, *optional*, defaults to `0`):
            Number of tokens that need not be computed.
        layers (`list`, *optional*, defaults to `[]`):
            Keys and values, once they are there.
    """

    tokens: np.ndarray
    source: "CachedSequence | None" = None
    start: int = 0
    layers: Layers = field(default_factory=list)

    @property
    def num_new(self) -> int:
        """Number of tokens to compute."""
        return len(self.tokens) - self.start

    def consider(self, source: "CachedSequence") -> None:
        """Make `source` the source if it has more of this sequence's tokens than the present one."""
        shared = common_prefix(source.tokens, self.tokens)
        if shared > self.start:
            self.source, self.start = source, shared

    def take_from_source(self) -> Layers:
        """Views of the first `start` keys and values."""
        layers = [] if self.source is None else self.source.layers
        self.source = None
        return [(keys[:, : self.start], values[:, : self.start]) for keys, values in layers]


def share_beginnings(sequences: list[CachedSequence]) -> list[CachedSequence]:
    """
    Have what several sequences begin with computed once, where that saves each of them at least half of its new
    tokens.

    Args:
        sequences (`list[CachedSequence]`):
            Sequences to compute, different from one another. Those that share a beginning get a new source.

    Returns:
        `list[CachedSequence]`:
            The new sources, to be computed first.
    """
    beginnings = []
    sequences = sorted(sequences, key=lambda sequence: sort_key(sequence.tokens))
    while sequences:
        group, length = sequences[:1], len(sequences[0].tokens)
        for sequence in sequences[1:]:
            shared = min(length, common_prefix(sequences[0].tokens, sequence.tokens))
            saved = [(shared - member.start, member.num_new) for member in (*group, sequence)]
            if any(tokens < max(MIN_SHARED_TOKENS, num_new / 2) for tokens, num_new in saved):
                break
            group.append(sequence)
            length = shared
        if len(group) > 1:
            nearest = max(group, key=lambda sequence: sequence.start)
            beginning = CachedSequence(nearest.tokens[:length], nearest.source, nearest.start)
            for sequence in group:
                sequence.source, sequence.start = beginning, length
            beginnings.append(beginning)
        sequences = sequences[len(group) :]
    return beginnings


def into_batches(sequences: list[CachedSequence]) -> list[list[CachedSequence]]:
    """
    Distribute the sequences that have something to compute over forward passes. In each of them the numbers of new
    tokens differ by a factor of two at most, which bounds padding, and padded there are at most `MAX_TOKENS_PER_PASS`
    new tokens, unless a single sequence has more.

    Args:
        sequences (`list[CachedSequence]`):
            The sequences.

    Returns:
        `list[list[CachedSequence]]`
    """
    batches: list[list[CachedSequence]] = []
    longest = 0
    unfinished = [sequence for sequence in sequences if sequence.num_new]
    for sequence in sorted(unfinished, key=lambda sequence: -sequence.num_new):
        if not batches or 2 * sequence.num_new < longest or (len(batches[-1]) + 1) * longest > MAX_TOKENS_PER_PASS:
            batches.append([])
            longest = sequence.num_new
        batches[-1].append(sequence)
    return batches


def compute(model: nn.Module, sequences: list[CachedSequence], device: torch.device) -> None:
    """
    Compute the new tokens of some sequences in one forward pass, and set the sequences' `layers`.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        sequences (`list[CachedSequence]`):
            Sequences whose sources are there.
        device (`torch.device`):
            Where the model computes.
    """
    past, new = max(sequence.start for sequence in sequences), max(sequence.num_new for sequence in sequences)
    input_ids = torch.zeros(len(sequences), new, dtype=torch.long)
    mask = torch.zeros(len(sequences), past + new, dtype=torch.long)
    for i, sequence in enumerate(sequences):  # padding at both ends, so that a row is one piece
        input_ids[i, : sequence.num_new] = torch.from_numpy(sequence.tokens[sequence.start :])
        mask[i, past - sequence.start : past + sequence.num_new] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
    spans = [(past - sequence.start, past + sequence.num_new) for sequence in sequences]
    cache = as_batch([sequence.take_from_source() for sequence in sequences], past)

    accepted = inspect.signature(model.forward).parameters
    options = {"position_ids": positions.to(device)} if "position_ids" in accepted else {}
    if "logits_to_keep" in accepted:
        options["logits_to_keep"] = 1
    model(
        input_ids=input_ids.to(device),
        attention_mask=mask.to(device),
        use_cache=True,
        **{cache_argument(model): cache},
        **options,
    )
    for sequence, layers in zip(sequences, as_rows(cache, spans), strict=True):
        sequence.layers = layers


def cache_argument(model: nn.Module) -> str:
    """Name under which a model takes keys and values: models of transformers 5.24 and later call it `cache`."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def as_batch(rows: list[Layers], width: int) -> DynamicCache:
    """
    Put rows into a left-padded batch. The rows are emptied layer by layer on the way.

    Args:
        rows (`list[Layers]`):
            Keys and values of each row; an empty list for a row without tokens. A list may occur several times.
        width (`int`):
            Number of positions, at least that of the longest row.

    Returns:
        [`~transformers.DynamicCache`]
    """
    cache = DynamicCache()
    for layer in range(max(map(len, rows))):
        pairs = [row[layer] if row else None for row in rows]
        for row in rows:
            if row:
                row[layer] = None
        cache.update(
            _pad_left([pair and pair[0] for pair in pairs], width),
            _pad_left([pair and pair[1] for pair in pairs], width),
            layer,
        )
    return cache


def _pad_left(rows: list[torch.Tensor | None], width: int) -> torch.Tensor:
    some = next(row for row in rows if row is not None)
    batch = some.new_zeros(len(rows), some.shape[0], width, some.shape[2])
    for i, row in enumerate(rows):
        if row is not None:
            batch[i, :, width - row.shape[1] :] = row
    return batch


def as_rows(cache: DynamicCache, spans: list[tuple[int, int]]) -> list[Layers]:
    """
    Cut a batch into rows with memory of their own. The batch is emptied layer by layer on the way.

    Args:
        cache ([`~transformers.DynamicCache`]):
            Keys and values of a batch.
        spans (`list[tuple[int, int]]`):
            First position of each row, and the one after its last.

    Returns:
        `list[Layers]`
    """
    rows: list[Layers] = [[] for _ in spans]
    for layer in cache.layers:
        for i, (start, end) in enumerate(spans):
            rows[i].append((layer.keys[i, :, start:end].clone(), layer.values[i, :, start:end].clone()))
        layer.keys = layer.values = None
    return rows
