"""
The keys and values of all episodes as a tree of token segments, so that what contexts begin with is stored once.

An episode's context is the way from the root to its leaf. The leaf belongs to the episode alone and grows with its
responses; the segments above it are what it has in common with others. They come from the tokens: a new context goes
down the tree as far as it agrees with what is there, and where it parts from a segment, that segment is cut in two.
"""

from collections.abc import Hashable, Iterator

import numpy as np

from ..scoring.token_tree import common_prefix
from .key_values import MIN_SHARED_TOKENS
from .segments import Segment


class SegmentTree:
    """Segments of all episodes. An episode is known by a key."""

    def __init__(self) -> None:
        self._root = Segment(np.empty(0, dtype=np.int64), 0, None)
        self._leaves: dict[Hashable, Segment] = {}

    def __iter__(self) -> Iterator[Segment]:
        """All segments, parents before their children."""
        waiting = [self._root]
        while waiting:
            for segments in list(waiting.pop().children.values()):
                yield from segments
                waiting.extend(segments)

    def put(self, key: Hashable, tokens: np.ndarray) -> Segment:
        """
        Make `tokens` the context of an episode.

        Args:
            key (`Hashable`):
                The episode.
            tokens (`np.ndarray` of shape `(T,)`):
                Token ids, any number.

        Returns:
            [`Segment`]:
                Its leaf, whose path is the context. The keys and values of what is new on this path are missing.
        """
        leaf = self._leaves.get(key)
        if leaf is not None and _begins_with(tokens, leaf.path()[:-1]):
            own = tokens[leaf.depth :]
            self._detach(leaf)
            leaf.keep_first(
                common_prefix(np.concatenate([leaf.tokens, np.array(leaf.generated, dtype=np.int64)]), own)
            )
            if leaf.num_computed:
                leaf.tokens = own
                self._attach(leaf)
                return leaf
            self._attach(leaf)
        parent = self._way_down(tokens)
        new = Segment(tokens[parent.depth + len(parent.tokens) :], parent.depth + len(parent.tokens), parent)
        self._attach(new)
        self.forget(key)
        self._leaves[key] = new
        return new

    def forget(self, key: Hashable) -> None:
        """Free what only this episode has."""
        segment = self._leaves.pop(key, None)
        while segment is not None and segment.parent is not None and not any(segment.children.values()):
            self._detach(segment)
            if segment.slab is not None:
                segment.slab.remove(segment)
            segment = segment.parent

    def _way_down(self, tokens: np.ndarray) -> Segment:
        """The segment after which a new leaf for the tokens goes."""
        segment = self._root
        while True:
            rest = tokens[segment.depth + len(segment.tokens) :]
            nearby = segment.children.get(int(rest[0]), []) if len(rest) else []
            shared, best = max(
                ((common_prefix(child.tokens, rest), i) for i, child in enumerate(nearby)), default=(0, -1)
            )
            if best < 0:
                return segment
            child = nearby[best]
            if shared == len(child.tokens) and any(child.children.values()):
                segment = child
            elif shared >= MIN_SHARED_TOKENS:
                return self._cut(child, shared)
            else:
                return segment

    def _cut(self, segment: Segment, length: int) -> Segment:
        """Give the first tokens of a segment to a new one before it."""
        segment.leave_slab()
        head = Segment(segment.tokens[:length], segment.depth, segment.parent)
        head.num_computed = min(segment.num_computed, length)
        if head.num_computed:
            head.layers = [(k[:, :length].clone(), v[:, :length].clone()) for k, v in segment.layers]
        self._detach(segment)
        segment.layers = [(k[:, length:].clone(), v[:, length:].clone()) for k, v in segment.layers]
        segment.num_computed -= head.num_computed
        segment.tokens, segment.depth, segment.parent = segment.tokens[length:], segment.depth + length, head
        self._attach(segment)
        self._attach(head)
        return head

    def _attach(self, segment: Segment) -> None:
        segment.parent.children[segment.first_token].append(segment)

    def _detach(self, segment: Segment) -> None:
        segment.parent.children[segment.first_token].remove(segment)


def _begins_with(tokens: np.ndarray, segments: list[Segment]) -> bool:
    """Whether the first tokens are those of all the segments."""
    return all(
        np.array_equal(segment.tokens, tokens[segment.depth : segment.depth + len(segment.tokens)])
        for segment in segments
    )
