"""
Segments of contexts with their keys and values: those that are being read side by side in buffers with room for more
tokens, all others without padding.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch


FEWEST_TOKENS = 128


def room_for(length: int) -> int:
    """Tokens that are allocated for a segment which grows: less than twice as many as it has."""
    return max(FEWEST_TOKENS, 1 << length.bit_length())


def room_for_all(length: int) -> int:
    """Tokens that are allocated for a segment which does not grow, so that few differ from one another."""
    return -(-length // 64) * 64


@dataclass(eq=False)
class Segment:
    """
    Tokens that follow one another in the contexts of one or more episodes.

    Args:
        tokens (`np.ndarray` of shape `(T,)`):
            Token ids of the context.
        depth (`int`):
            Number of tokens above it.
        parent (`Segment`, *optional*):
            The segment before it.
        generated (`list[int]`, *optional*):
            Token ids that came by decoding, after `tokens`; in leaves only.
        num_computed (`int`, *optional*, defaults to `0`):
            Number of tokens, from the first on, whose keys and values are there.
        layers (`list[tuple[torch.Tensor, torch.Tensor]]`, *optional*):
            These keys and values, a pair of shape `(heads, tokens, head size)` for each layer; empty in a slab.
        slab (`Slab`, *optional*):
            Where they are while the segment is read by rows that are decoded.
        slot (`int`, *optional*, defaults to `0`):
            Its place there.
        children (`dict`, *optional*):
            The segments after it, by their first token; a leaf without tokens is under `None`.
    """

    tokens: np.ndarray
    depth: int
    parent: "Segment | None"
    generated: list[int] = field(default_factory=list)
    num_computed: int = 0
    layers: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    slab: "Slab | None" = None
    slot: int = 0
    children: dict[int | None, list["Segment"]] = field(default_factory=lambda: defaultdict(list))

    @property
    def num_missing(self) -> int:
        """Number of tokens whose keys and values are yet to be computed."""
        return len(self.tokens) + len(self.generated) - self.num_computed

    @property
    def first_token(self) -> int | None:
        return int(self.tokens[0]) if len(self.tokens) else None

    def path(self) -> list["Segment"]:
        """The segments from the root, which has no tokens and is left out, to this one."""
        segments: list[Segment] = []
        segment = self
        while segment.parent is not None:
            segments.append(segment)
            segment = segment.parent
        return segments[::-1]

    def key_values(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the keys and values that are there, each of shape `(heads, num_computed, head size)`."""
        if self.slab is not None:
            keys, values = self.slab.layers[layer]
            return keys[self.slot, :, : self.num_computed], values[self.slot, :, : self.num_computed]
        return self.layers[layer]

    def leave_slab(self) -> None:
        """Keep the keys and values without padding, in memory of their own."""
        if self.slab is not None:
            self.layers = [
                (keys.clone(), values.clone())
                for keys, values in (self.key_values(layer) for layer in range(len(self.slab.layers)))
            ]
            self.slab.remove(self)

    def extend(self, layers: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Append keys and values of the next tokens, one pair of shape `(heads, tokens, head size)` for each layer."""
        self.leave_slab()
        if self.num_computed:
            for i, (keys, values) in enumerate(layers):
                own_keys, own_values = self.layers[i]
                self.layers[i] = (torch.cat([own_keys, keys], dim=1), torch.cat([own_values, values], dim=1))
        else:
            self.layers = [(keys.clone(), values.clone()) for keys, values in layers]
        self.num_computed += layers[0][0].shape[1]

    def keep_first(self, count: int) -> None:
        """Drop all tokens but the first."""
        self.tokens = np.concatenate([self.tokens, np.array(self.generated, dtype=np.int64)])[:count]
        self.generated = []
        if count < self.num_computed:
            self.leave_slab()
            self.num_computed = count
            self.layers = [(keys[:, :count].clone(), values[:, :count].clone()) for keys, values in self.layers]


class Slab:
    """
    A buffer of equal places. The places taken are the first ones.

    Args:
        capacity (`int`):
            Tokens of a place.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.segments: list[Segment] = []
        # keys and values of each layer, each of shape (places, heads, capacity, head size)
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, segments: list[Segment]) -> None:
        """Move the keys and values of segments here."""
        start = len(self.segments)
        self.segments += segments
        for slot, segment in enumerate(segments, start):
            for layer, (keys, values) in enumerate(segment.layers):
                own_keys, own_values = self.room(layer, keys, values)
                own_keys[slot, :, : keys.shape[1]] = keys
                own_values[slot, :, : values.shape[1]] = values
            segment.slab, segment.slot, segment.layers = self, slot, []

    def remove(self, segment: Segment) -> None:
        """Free a place. The last segment moves there."""
        last = self.segments.pop()
        if last is not segment:
            for tensors in self.layers:
                for tensor in tensors:
                    tensor[segment.slot, :, : last.num_computed] = tensor[last.slot, :, : last.num_computed]
            last.slot = segment.slot
            self.segments[last.slot] = last
        segment.slab = None

    def shrink(self) -> None:
        """Give back memory if fewer than half of the places are taken."""
        if self.layers and 2 * len(self.segments) < len(self.layers[0][0]):
            for layer, tensors in enumerate(self.layers):
                self.layers[layer] = tuple(tensor[: len(self.segments)].clone() for tensor in tensors)

    def room(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Buffers of a layer with a place for every segment.

        Args:
            layer (`int`):
                Number of the layer; those before it have their buffers.
            keys (`torch.Tensor` of shape `(..., heads, tokens, head size)`):
                Keys as they are stored.
            values (`torch.Tensor` of shape `(..., heads, tokens, head size)`):
                Values as they are stored.
        """
        if layer == len(self.layers):
            places = len(self.segments)
            self.layers.append((self._buffer(keys, places), self._buffer(values, places)))
        elif len(self.layers[layer][0]) < len(self.segments):
            missing = len(self.segments) - len(self.layers[layer][0])
            spare = len(self.layers[layer][0]) // 4  # so that not every new segment has all others moved
            self.layers[layer] = tuple(
                torch.cat([tensor, self._buffer(tensor, missing + spare)]) for tensor in self.layers[layer]
            )
        return self.layers[layer]

    def _buffer(self, like: torch.Tensor, places: int) -> torch.Tensor:
        # what is masked counts for nothing only if it is finite
        return like.new_zeros(places, like.shape[-3], self.capacity, like.shape[-1])
