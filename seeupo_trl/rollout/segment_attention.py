"""
Attention of forward passes over segments: of new tokens of a context, and of one token for each of many rows.

The models of transformers call an attention function by the name in their configuration. Here it is one that hands
the layer's queries, keys and values to the pass which is under way.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .segments import Segment, Slab


SEGMENTS = "seeupo_segments"


class ForwardPass(Protocol):
    """What computes the attention of a forward pass, from tensors of shape `(B, heads, T, head size)`."""

    @property
    def num_layers(self) -> int:
        """Number of layers computed so far."""

    def attend(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        """The layer's output, of shape `(B, T, heads, head size)`."""


_under_way: ContextVar[ForwardPass] = ContextVar("_under_way")


@contextmanager
def under_way(forward_pass: ForwardPass) -> Iterator[None]:
    """Have models whose attention is [`SEGMENTS`] ask `forward_pass`."""
    token = _under_way.set(forward_pass)
    try:
        yield
    finally:
        _under_way.reset(token)


def attend_over_segments(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention function of transformers, for models whose attention is causal and nothing else."""
    own = [name for name in ("s_aux", "softcap", "position_bias") if kwargs.get(name) is not None]
    own += ["attention_mask"] * (attention_mask is not None)
    if own:
        raise NotImplementedError(
            f"{type(module).__name__} has a `{own[0]}` of its own, for which single requests are not made. Play with "
            "`lock_step_rollouts=True`."
        )
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    tensors = (tensor.to(dtype) for tensor in (query, key, value))
    return _under_way.get().attend(module, *tensors, scaling), None


AttentionInterface.register(SEGMENTS, attend_over_segments)


class ContextPass:
    """
    New tokens of some segments in one row, one segment after the other and without padding. Each token sees those
    before it in its segment and everything above that.

    Args:
        segments (`list[tuple[Segment, int]]`):
            Segments and how many of their missing tokens to compute. What is above them is there.
    """

    def __init__(self, segments: list[tuple[Segment, int]]):
        self.segments = segments
        self._new: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def num_layers(self) -> int:
        """Number of layers computed."""
        return len(self._new)

    def attend(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        counts = [count for _, count in self.segments]
        layer = self.num_layers
        self._new.append((key, value))
        outputs = []
        for (segment, count), q, k, v in zip(
            self.segments, query.split(counts, 2), key.split(counts, 2), value.split(counts, 2), strict=True
        ):
            past = [part.key_values(layer) for part in segment.path() if part.num_computed]
            k = torch.cat([keys[None] for keys, _ in past] + [k], dim=2)
            v = torch.cat([values[None] for _, values in past] + [v], dim=2)
            mask = None
            if 1 < count < k.shape[2]:
                mask = torch.ones(count, k.shape[2], dtype=torch.bool, device=k.device)
                mask = mask.tril_(k.shape[2] - count)[None, None]
            outputs.append(sdpa_attention_forward(module, q, k, v, mask, scaling=scale)[0])
        return torch.cat(outputs, dim=1)

    def store(self) -> None:
        """Give the segments their new keys and values."""
        start = 0
        for segment, count in self.segments:
            end = start + count
            segment.extend([(keys[0, :, start:end], values[0, :, start:end]) for keys, values in self._new])
            start = end


@dataclass
class SharedPart:
    """
    What some rows see of segments that they share, read once.

    Args:
        slab (`Slab`):
            The segments.
        lengths (`torch.Tensor` of shape `(G,)`):
            Tokens of each.
        longest (`int`):
            Tokens of the longest.
        readers (`torch.Tensor` of shape `(G, R)`):
            Rows of each segment, repeated where there are fewer than `R`.
        places (`list[tuple[torch.Tensor, torch.Tensor]]`):
            Where among the `G * R` each row is, of shape `(B,)`, and what to add to the log-sum-exp there: minus
            infinity for rows that are not, of shape `(B, 1, 1)`. Several where rows read several of the segments.
    """

    slab: Slab
    lengths: torch.Tensor
    longest: int
    readers: torch.Tensor
    places: list[tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    def of(cls, slab: Slab, readers: list[list[int]], num_rows: int, device: torch.device) -> "SharedPart":
        """
        Args:
            slab (`Slab`):
                The segments.
            readers (`list[list[int]]`):
                Rows that read each segment, at least one.
            num_rows (`int`):
                Number of rows, those that read none of the segments included.
            device (`torch.device`):
                Where the model is.
        """
        most = max(map(len, readers))
        places: list[tuple[torch.Tensor, torch.Tensor]] = []
        found: list[list[int]] = [[] for _ in range(num_rows)]
        for group, rows in enumerate(readers):
            for i, row in enumerate(rows):
                found[row].append(group * most + i)
        for time in range(max(map(len, found))):
            place = torch.tensor([there[time] if time < len(there) else 0 for there in found], device=device)
            absent = [0.0 if time < len(there) else -math.inf for there in found]
            places.append((place, torch.tensor(absent, device=device)[:, None, None]))
        lengths = torch.tensor([segment.num_computed for segment in slab.segments], device=device)
        return cls(
            slab=slab,
            lengths=lengths,
            longest=max(segment.num_computed for segment in slab.segments),
            readers=torch.tensor([rows + rows[:1] * (most - len(rows)) for rows in readers], device=device),
            places=places,
        )


class DecodingPass:
    """
    One token for each of many rows, again and again. Each row has a leaf of its own, where its keys and values go, and
    reads what it shares with others in [`SharedPart`]s. The parts of the softmax are merged by their log-sum-exp.

    Args:
        leaves (`list[Slab]`):
            The slabs of the leaves. Rows are in their order.
        shared (`list[SharedPart]`):
            What else they read.
        device (`torch.device`):
            Where the model is.
    """

    def __init__(self, leaves: list[Slab], shared: list[SharedPart], device: torch.device):
        self._leaves, self._shared = leaves, shared
        self._sizes = [len(slab.segments) for slab in leaves]
        self._lengths = [
            torch.tensor([segment.num_computed for segment in slab.segments], device=device) for slab in leaves
        ]
        self._longest = [max(segment.num_computed for segment in slab.segments) for slab in leaves]
        self._slots = [torch.arange(size, device=device) for size in self._sizes]
        self._masks: list[torch.Tensor] = []  # of the leaves, anew in every step
        self._shared_masks: list[torch.Tensor] = []
        self.num_layers = 0  # computed in this step

    @property
    def is_full(self) -> bool:
        """Whether there is no room for another token of some row."""
        return any(longest == slab.capacity for longest, slab in zip(self._longest, self._leaves, strict=True))

    def begin_step(self) -> None:
        """Get ready for the next token of every row."""
        self.num_layers, self._masks = 0, []
        self._longest = [longest + 1 for longest in self._longest]

    def end_step(self) -> None:
        """The keys and values of the tokens are there."""
        for lengths, slab in zip(self._lengths, self._leaves, strict=True):
            lengths += 1
            for segment in slab.segments:
                segment.num_computed += 1

    def attend(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        rows, heads, _, size = query.shape
        kv_heads = key.shape[1]
        scale = size**-0.5 if scale is None else scale
        query = query.reshape(rows, kv_heads, heads // kv_heads, size)
        if not self._masks:
            self._masks = [
                mask_after(lengths + 1, longest, query.dtype)
                for lengths, longest in zip(self._lengths, self._longest, strict=True)
            ]
        if not self._shared_masks:
            self._shared_masks = [mask_after(part.lengths, part.longest, query.dtype) for part in self._shared]
        parts = []
        start = 0
        for i, slab in enumerate(self._leaves):
            end = start + self._sizes[i]
            keys, values = slab.room(self.num_layers, key[start:end], value[start:end])
            keys[self._slots[i], :, self._lengths[i]] = key[start:end, :, 0]
            values[self._slots[i], :, self._lengths[i]] = value[start:end, :, 0]
            keys, values = (tensor[: self._sizes[i], :, : self._longest[i]] for tensor in (keys, values))
            parts.append(attention(query[start:end], keys, values, self._masks[i], scale))
            start = end
        output, lse = parts[0] if len(parts) == 1 else (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        for part, mask in zip(self._shared, self._shared_masks, strict=True):
            output, lse = self._merged(query, output, lse, part, mask, scale)
        self.num_layers += 1
        return output.reshape(rows, 1, heads, -1)

    def _merged(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,
        part: SharedPart,
        mask: torch.Tensor,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        (groups, readers), (_, kv_heads, repeats, size) = part.readers.shape, query.shape
        grouped = query[part.readers].transpose(1, 2).reshape(groups, kv_heads, readers * repeats, size)
        keys, values = (tensor[:groups, :, : part.longest] for tensor in part.slab.layers[self.num_layers])
        there, lse_there = attention(grouped, keys, values, mask, scale)
        there = there.reshape(groups, kv_heads, readers, repeats, -1).transpose(1, 2).flatten(0, 1)
        lse_there = lse_there.reshape(groups, kv_heads, readers, repeats).transpose(1, 2).flatten(0, 1)
        for place, absent in part.places:
            other = lse_there[place] + absent
            weight = torch.sigmoid(other - lse)
            output = torch.lerp(output, there[place], weight[..., None].to(output.dtype))
            lse = torch.logaddexp(lse, other)
        return output, lse


def mask_after(lengths: torch.Tensor, longest: int, dtype: torch.dtype) -> torch.Tensor:
    """Zero, and minus infinity after the end of each row, of shape `(B, 1, 1, longest)`."""
    outside = torch.arange(longest, device=lengths.device) >= lengths[:, None]
    return torch.zeros(outside.shape, dtype=dtype, device=lengths.device).masked_fill_(outside, -math.inf)[
        :, None, None
    ]


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Attention of queries that all see the same keys, and the log-sum-exp of their scores.

    Args:
        query (`torch.Tensor` of shape `(B, heads, Q, head size)`):
            Queries.
        key (`torch.Tensor` of shape `(B, heads, K, head size)`):
            Keys.
        value (`torch.Tensor` of shape `(B, heads, K, value size)`):
            Values.
        mask (`torch.Tensor` of shape `(B, 1, 1, K)`, *optional*):
            What is added to the scores.
        scale (`float`):
            Factor of the scores.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`:
            Of shape `(B, heads, Q, value size)` and `(B, heads, Q)`, the second in float32 or float64.
    """
    if query.device.type == "cpu" and query.shape[-1] == value.shape[-1]:
        # what scaled_dot_product_attention calls on a CPU (torch 2.6 to 2.13); it alone does not return the second
        if mask is not None:
            mask = mask.expand(-1, -1, query.shape[2], -1)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=mask, scale=scale
        )
    scores = torch.matmul(query, key.transpose(2, 3))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
    if mask is not None:
        scores = scores + mask
    lse = scores.logsumexp(-1)
    return torch.matmul((scores - lse[..., None]).exp().to(value.dtype), value), lse
