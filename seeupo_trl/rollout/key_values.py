"""
Keys and values of token sequences: kept row by row without padding, computed and used in left-padded batches.

A row's keys and values are tensors of its own, so the memory of an episode is free when it ends. Wherever rows become
a batch or a batch becomes rows, it goes layer by layer and what was read is let go: there is never more than one
layer's worth too many.
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

# Keys and values of a row, a pair for each layer, each (heads, tokens, head size). `None` where they were moved away.
Layers = list[tuple[torch.Tensor, torch.Tensor] | None]


@dataclass(eq=False)
class Row:
    """
    A sequence of tokens whose keys and values are there already or are to be computed.

    Args:
        tokens (`np.ndarray` of shape `(T,)`):
            Token ids.
        source (`Row`, *optional*):
            The row that has this row's first `start` keys and values. Let go as soon as they have been taken.
        start (`int`, *optional*, defaults to `0`):
            Number of tokens that need not be computed.
        layers (`list`, *optional*, defaults to `[]`):
            Keys and values, once they are there.
    """

    tokens: np.ndarray
    source: "Row | None" = None
    start: int = 0
    layers: Layers = field(default_factory=list)

    @property
    def num_new(self) -> int:
        """Number of tokens to compute."""
        return len(self.tokens) - self.start

    def consider(self, source: "Row") -> None:
        """Make `source` the source if it has more of this row's tokens than the present one."""
        shared = common_prefix(source.tokens, self.tokens)
        if shared > self.start:
            self.source, self.start = source, shared

    def take_from_source(self) -> Layers:
        """Views of the first `start` keys and values."""
        layers = [] if self.source is None else self.source.layers
        self.source = None
        return [(keys[:, : self.start], values[:, : self.start]) for keys, values in layers]


def share_beginnings(rows: list[Row]) -> list[Row]:
    """
    Have what several rows begin with computed once, where that saves each of them at least half of its new tokens.

    Args:
        rows (`list[Row]`):
            Rows to compute, different from one another. Those that share a beginning get a new source.

    Returns:
        `list[Row]`:
            The new sources, to be computed first.
    """
    beginnings = []
    rows = sorted(rows, key=lambda row: sort_key(row.tokens))
    while rows:
        group, length = rows[:1], len(rows[0].tokens)
        for row in rows[1:]:
            shared = min(length, common_prefix(rows[0].tokens, row.tokens))
            saved = [(shared - member.start, member.num_new) for member in (*group, row)]
            if any(tokens < max(MIN_SHARED_TOKENS, num_new / 2) for tokens, num_new in saved):
                break
            group.append(row)
            length = shared
        if len(group) > 1:
            nearest = max(group, key=lambda row: row.start)
            beginning = Row(nearest.tokens[:length], nearest.source, nearest.start)
            for row in group:
                row.source, row.start = beginning, length
            beginnings.append(beginning)
        rows = rows[len(group) :]
    return beginnings


def into_batches(rows: list[Row]) -> list[list[Row]]:
    """
    Distribute the rows that have something to compute over forward passes. In each of them the numbers of new tokens
    differ by a factor of two at most, which bounds padding, and padded there are at most `MAX_TOKENS_PER_PASS` new
    tokens, unless a single row has more.

    Args:
        rows (`list[Row]`):
            The rows.

    Returns:
        `list[list[Row]]`
    """
    batches: list[list[Row]] = []
    longest = 0
    for row in sorted((row for row in rows if row.num_new), key=lambda row: -row.num_new):
        if not batches or 2 * row.num_new < longest or (len(batches[-1]) + 1) * longest > MAX_TOKENS_PER_PASS:
            batches.append([])
            longest = row.num_new
        batches[-1].append(row)
    return batches


def compute(model: nn.Module, rows: list[Row], device: torch.device) -> None:
    """
    Compute the new tokens of some rows in one forward pass, and set the rows' `layers`.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        rows (`list[Row]`):
            Rows whose sources are there.
        device (`torch.device`):
            Where the model computes.
    """
    past, new = max(row.start for row in rows), max(row.num_new for row in rows)
    input_ids = torch.zeros(len(rows), new, dtype=torch.long)
    mask = torch.zeros(len(rows), past + new, dtype=torch.long)
    for i, row in enumerate(rows):  # padding at both ends, so that a row is one piece
        input_ids[i, : row.num_new] = torch.from_numpy(row.tokens[row.start :])
        mask[i, past - row.start : past + row.num_new] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
    spans = [(past - row.start, past + row.num_new) for row in rows]
    cache = as_batch([row.take_from_source() for row in rows], past)

    accepted = inspect.signature(model.forward).parameters
    options = {"position_ids": positions.to(device)} if "position_ids" in accepted else {}
    if "logits_to_keep" in accepted:
        options["logits_to_keep"] = 1
    model(
        input_ids=input_ids.to(device),
        attention_mask=mask.to(device),
        past_key_values=cache,
        use_cache=True,
        **options,
    )
    for row, layers in zip(rows, as_rows(cache, spans), strict=True):
        row.layers = layers


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
