"""
Token trees, and how trajectories are distributed over micro-batches.

A token tree stores tokens with the same ancestors once: the prompt that a group shares, the history that the turns of
a trajectory share, and whatever is left in common when a context was rewritten. In depth-first order a token `q` sees
exactly the tokens `k` with `k <= q < subtree_end[k]`, and its position is its depth.

Where branches part, several tokens follow the same one. Its hidden state is scored once for each of them, so no token
needs a copy and a tree computes exactly its distinct tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf

import numpy as np


@dataclass
class Branch:
    """
    Tokens of a tree that follow one another on the way to one leaf, after the last one on the way to the leaf before.

    Args:
        start (`int`):
            First position of the branch in the tree.
        end (`int`):
            Last position, exclusive.
        path (`np.ndarray`):
            Positions of all tokens from the root to the end of the branch, the branch's own ones last.
    """

    start: int
    end: int
    path: np.ndarray

    @property
    def num_pairs(self) -> int:
        """Query-key pairs that attention computes for the branch."""
        return (self.end - self.start) * len(self.path)


@dataclass
class TokenTree:
    """
    Sequences stored as a tree, in depth-first order.

    Args:
        input_ids (`np.ndarray` of shape `(S,)`):
            Token ids.
        depths (`np.ndarray` of shape `(S,)`):
            Number of ancestors of each token, which is its position in the sequences it belongs to.
        subtree_ends (`np.ndarray` of shape `(S,)`):
            End, exclusive, of the positions of each token's descendants.
        branches (`list[Branch]`):
            The tree cut into one branch a leaf; together they hold every position once, in order.
        paths (`list[np.ndarray]`):
            Positions of the tokens of each sequence.
    """

    input_ids: np.ndarray
    depths: np.ndarray
    subtree_ends: np.ndarray
    branches: list[Branch]
    paths: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.input_ids)


def common_prefix(first: np.ndarray, second: np.ndarray) -> int:
    """Number of leading tokens that two sequences have in common."""
    length = min(len(first), len(second))
    different = first[:length] != second[:length]
    position = int(different.argmax()) if length else 0
    return position if length and different[position] else length


def sort_key(sequence: np.ndarray) -> bytes:
    """Key under which sequences with a common prefix lie next to each other, a prefix before what extends it."""
    return sequence.astype(">u4").tobytes()


def build_tree(sequences: Sequence[np.ndarray]) -> TokenTree:
    """
    Store sequences as a tree.

    Args:
        sequences (`Sequence[np.ndarray]`):
            Token ids, at least one sequence and one token each. Sequences may repeat or extend one another.

    Returns:
        [`TokenTree`]
    """
    order = sorted(range(len(sequences)), key=lambda index: sort_key(sequences[index]))
    shared = [0] + [common_prefix(sequences[one], sequences[two]) for one, two in pairwise(order)] + [0]
    branches: list[Branch] = []
    pieces: list[np.ndarray] = []
    closed: list[tuple[np.ndarray, int]] = []  # positions, and where their subtrees end
    paths: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * len(sequences)
    path = np.empty(0, dtype=np.int64)
    within: list[int] = []  # sequences that the next leaf extends
    depth = size = 0
    for rank, index in enumerate(order):
        sequence = sequences[index]
        if not within:
            depth = shared[rank]  # tokens in common with the leaf before
        within.append(index)
        if rank + 1 < len(order) and shared[rank + 1] == len(sequence):
            continue
        closed.append((path[depth:], size))
        start, size = size, size + len(sequence) - depth
        path = np.concatenate([path[:depth], np.arange(start, size)])
        branches.append(Branch(start, size, path))
        pieces.append(sequence[depth:])
        for covered in within:
            paths[covered] = path[: len(sequences[covered])]
        within = []
    closed.append((path, size))
    subtree_ends = np.empty(size, dtype=np.int64)
    for positions, end in closed:
        subtree_ends[positions] = end
    depths = np.concatenate([np.arange(len(one.path) - (one.end - one.start), len(one.path)) for one in branches])
    return TokenTree(np.concatenate(pieces), depths, subtree_ends, branches, paths)


def tree_size(sequences: Sequence[np.ndarray]) -> int:
    """Number of tokens of the tree of some sequences."""
    if len(sequences) == 1:
        return len(sequences[0])
    ordered = sorted(sequences, key=sort_key)
    return sum(map(len, ordered)) - sum(common_prefix(one, two) for one, two in pairwise(ordered))


def partition(
    units: list[list[np.ndarray]],
    max_units: float = inf,
    max_tokens: float = inf,
    padded: Callable[[np.ndarray], np.ndarray] | None = None,
) -> list[list[int]]:
    """
    Distribute units over trees: as few tokens as possible, then as few trees as possible, then trees of similar size.

    A unit is never split. Units that share much lie next to each other in lexicographic order, so every tree takes a
    stretch of that order, and a tree that would be too large is split between siblings.

    Args:
        units (`list[list[np.ndarray]]`):
            Sequences of each unit.
        max_units (`float`, *optional*):
            Largest number of units of a tree.
        max_tokens (`float`, *optional*):
            Largest number of tokens of a tree. A unit that exceeds it gets a tree of its own.
        padded (`Callable`, *optional*):
            Tokens that are computed for trees of given numbers of tokens, an array; by default no more than those.

    Returns:
        `list[list[int]]`:
            Indices of the units of each tree, largest tree first.
    """
    order = sorted(range(len(units)), key=lambda index: min(map(sort_key, units[index])))
    own = np.array([tree_size(units[index]) for index in order], dtype=np.int64)
    # tokens that a unit adds to a tree that holds its predecessor; an upper bound where a unit has several sequences
    added = [tokens_added(units[one], units[two]) for one, two in pairwise(order)]
    added_before = np.concatenate([[0], np.cumsum(added, dtype=np.int64)])

    def tokens_of(start: np.ndarray | int, end: int) -> np.ndarray:
        """Tokens of the trees of some stretches of the order, which end at the same unit."""
        tokens = own[start] + added_before[end - 1] - added_before[start]
        return tokens if padded is None else padded(tokens)

    if order and padded is None and len(order) <= max_units and tokens_of(0, len(order)) <= max_tokens:
        return [order]  # a cut only loses what the units on its sides share

    best = np.zeros((len(order) + 1, 3))  # tokens, trees and sum of squared sizes of the first units
    start_of_last: list[int] = []  # where the last of those trees starts
    first = 0
    for end in range(1, len(order) + 1):
        # a longer stretch is no smaller, so what was too large for the last unit is too large for this one
        while first < end - 1 and (end - first > max_units or tokens_of(first, end) > max_tokens):
            first += 1
        starts = np.arange(first, end)
        sizes = tokens_of(starts, end)
        costs = best[starts] + np.stack([sizes, np.ones(len(starts)), sizes.astype(float) ** 2], axis=1)
        for criterion in range(3):
            least = costs[:, criterion] == costs[:, criterion].min()
            starts, costs = starts[least], costs[least]
        best[end] = costs[0]
        start_of_last.append(int(starts[0]))

    stretches: list[tuple[int, int]] = []
    end = len(order)
    while end > 0:
        stretches.append((start_of_last[end - 1], end))
        end = start_of_last[end - 1]
    stretches.sort(key=lambda stretch: tokens_of(*stretch), reverse=True)
    return [order[start:end] for start, end in stretches]


def tokens_added(unit: list[np.ndarray], following: list[np.ndarray]) -> int:
    """How many tokens the tree of a unit gains from another unit."""
    if len(unit) == len(following) == 1:
        return len(following[0]) - common_prefix(unit[0], following[0])
    return tree_size(unit + following) - tree_size(unit)
