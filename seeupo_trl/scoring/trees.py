"""
Log-probabilities of turns computed on token trees, with rows as the alternative.

Trees change nothing but the cost. They are used where every layer of the model attends to all earlier positions.
Before the first tree that branches, their attention is tried forward and backward, and that tree is scored in rows as
well: should something fail or the two disagree, the run goes on in rows.
"""

import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import inf
from typing import Any

import numpy as np
import torch
from torch import nn

from ..distributed.lock_step import LockStep
from .causal_lm import causal_lm_of
from .deterministic import without_noise
from .interface import MicroBatch, Scores, TurnScores
from .rows import RowBatch, RowScorer, build_rows, group_rows
from .token_tree import TokenTree, build_tree, partition, tree_size
from .tree_attention import (
    FLEX,
    TreeBranches,
    flex_length,
    on_device,
    reason_against_trees,
    tree_block_mask,
    tree_implementation,
    use_attention,
)
from .tree_check import logps_tolerance, reason_against_attention
from .turn_buffer import Key, TurnBuffer


# "auto" takes trees where they save at least a tenth of the estimated cost: rows run in fewer, larger kernels
_WORTHWHILE = 0.9
# What else could be computed in the time that it takes to call attention for a branch: about 0.1 ms of a CPU's core.
_OPERATIONS_OF_A_CALL = 2e6
# A tree of two branches for a process that has none, so that all processes make the same passes.
_TINY_BRANCHES = ((0, 0, 0), (0, 1))


@dataclass
class TreeBatch:
    """
    The token tree of one forward pass.

    Args:
        leaves (`dict[tuple[int, int], np.ndarray]`):
            Sequences, named by `(trajectory, chain)`.
        spans (`dict[tuple[int, int], tuple[tuple[int, int], int, int]]`):
            For each turn its leaf, and where in that sequence its action starts and ends.
        padded (`bool`):
            Whether the tree is padded for `flex_attention`.
    """

    leaves: dict[tuple[int, int], np.ndarray]
    spans: dict[Key, tuple[tuple[int, int], int, int]]
    padded: bool

    @cached_property
    def tree(self) -> TokenTree:
        """The sequences as a tree, with their paths in the order of the leaves."""
        return build_tree(list(self.leaves.values()))

    @property
    def num_tokens(self) -> int:
        """Tokens that the forward pass computes, padding included."""
        return flex_length(len(self.tree)) if self.padded else len(self.tree)

    @property
    def num_pairs(self) -> int:
        """Query-key pairs that attention computes."""
        return sum(branch.num_pairs for branch in self.tree.branches)

    def scored(self) -> tuple[np.ndarray, np.ndarray, dict[Key, int]]:
        """Positions whose hidden states are scored, the labels they are scored for, and each action's length."""
        paths = dict(zip(self.leaves, self.tree.paths, strict=True))
        # a token is predicted by its parent
        positions = [paths[leaf][start - 1 : end - 1] for leaf, start, end in self.spans.values()]
        labels = [self.leaves[leaf][start:end] for leaf, start, end in self.spans.values()]
        sizes = {key: end - start for key, (_, start, end) in self.spans.items()}
        return np.concatenate(positions), np.concatenate(labels), sizes


def tree_batch(buffer: TurnBuffer, keys: Iterable[Key], padded: bool) -> TreeBatch:
    """Lay turns out in one tree, with a leaf for the last turn of each chain of turns that extend one another."""
    leaves: dict[tuple[int, int], np.ndarray] = {}
    spans: dict[Key, tuple[tuple[int, int], int, int]] = {}
    for key in sorted(keys, key=lambda key: (key[0], -key[1])):
        sequence, leaf = buffer.sequence(key), (key[0], buffer.chain(key))
        leaves.setdefault(leaf, sequence)
        spans[key] = (leaf, len(sequence) - len(buffer.turn(key).action_ids), len(sequence))
    return TreeBatch(leaves, spans, padded)


class TreeScorer(RowScorer):
    """
    Scores turns of text-only trajectories on token trees or in rows.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            As in [`~seeupo_trl.scoring.rows.RowScorer`]; so are the arguments not listed here.
        packing (`str`, *optional*, defaults to `"auto"`):
            `"tree"`, `"rows"`, or `"auto"` for what an estimate of the cost says is cheaper.
    """

    def __init__(self, model: nn.Module, *args, packing: str = "auto", aux_loss: bool = False, **kwargs):
        super().__init__(model, *args, aux_loss=aux_loss, **kwargs)
        causal_lm = causal_lm_of(model)
        self._causal_lm = causal_lm
        self._packing = packing
        if packing != "rows":
            reason = reason_against_trees(model)
            if aux_loss:
                # the load-balancing loss is a mean over tokens, where sharing would count a shared token once
                reason = "its load-balancing loss is a mean over the tokens of a micro-batch"
            if reason is not None:
                self._packing = "rows"
                if packing == "tree":
                    warnings.warn(f"`packing='tree'` is not possible for this model: {reason}. Using rows.")
        self._checked = self._packing == "rows"

    @property
    def packing(self) -> str:
        """Layout in use: `"tree"`, `"auto"` or `"rows"`."""
        return self._packing

    @property
    def _pads(self) -> bool:
        return self._implementation == FLEX

    @property
    def _implementation(self) -> str:
        return tree_implementation(self._causal_lm, self._device)

    def _computed(self, num_tokens: int) -> int:
        """Tokens computed for a tree of `num_tokens`."""
        return flex_length(num_tokens) if self._pads else num_tokens

    def check(self, buffer: TurnBuffer, keys: Iterable[Key], model: nn.Module, lock_step: LockStep) -> None:
        """
        Try the attention of trees forward and backward, and compare a tree with rows, once in a run, on the first
        turns that make a branching tree. All processes run the same number of forward passes and come to the same
        decision.
        """
        if self._checked:
            return
        sample = self._branching_sample(buffer, keys)
        if not lock_step.max_over_processes(int(bool(sample))):
            return
        self._checked = True
        with lock_step.autocast():
            autocast = torch.is_autocast_enabled(lock_step.device.type)
            dtype = torch.get_autocast_dtype(lock_step.device.type) if autocast else self._causal_lm.dtype
            problem = reason_against_attention(self._causal_lm, self._implementation, dtype, lock_step.device)
        # together: a process that went on with trees alone would wait for the others for ever
        if not lock_step.max_over_processes(int(problem is not None)):
            problem = self._compare_with_rows(buffer, sample, model, lock_step, dtype)
        if lock_step.max_over_processes(int(problem is not None)):
            self._packing = "rows"
            warnings.warn(
                f"Trees cannot be used for this model: {problem or 'another process met an error'}. Using rows for "
                "the rest of the run; `packing='rows'` does so from the start."
            )

    def _compare_with_rows(
        self, buffer: TurnBuffer, sample: list[Key], model: nn.Module, lock_step: LockStep, dtype: torch.dtype
    ) -> str | None:
        """What is wrong with the log-probabilities of a tree; sets the ratio's noise floor. On every process."""
        tree = self._tree(buffer, sample) if sample else self._tiny_tree()
        rows = group_rows(build_rows(buffer, sample), len(sample), self._max_tokens, together=False)
        scores: list[dict[Key, TurnScores]] = []
        problem = None
        for batches in ([tree], rows):
            scores.append({})
            for number in range(lock_step.max_over_processes(len(batches))):
                batch = batches[number] if number < len(batches) else self.dummy_batch()
                try:
                    with without_noise(model), lock_step.inference(), self.attention(batch):
                        scores[-1].update(self.score(model, batch)[0])
                except Exception as error:
                    if batch is not tree:
                        raise
                    problem = f"a forward pass of a tree fails ({type(error).__name__}: {error})"
        measured = sample if problem is None else []
        by_turn = [(scores[0][key].logps - scores[1][key].logps).double() for key in measured]
        differences = torch.cat([*by_turn, torch.zeros(int(not by_turn), device=lock_step.device)])
        squares = [difference.mean() ** 2 for difference in by_turn]
        sums = [differences.abs().mean(), sum(squares, torch.zeros_like(differences[0])), len(squares)]
        sums = lock_step.gather(torch.tensor(sums, dtype=torch.float64)).nan_to_num(nan=torch.inf)  # (P, 3)
        difference, tolerance = sums[:, 0].max().item(), logps_tolerance(dtype, lock_step.device)
        self.noise_floor = (sums[:, 1].sum() / sums[:, 2].sum().clamp(min=1)).sqrt().item()
        if problem is None and difference > tolerance:
            problem = (
                f"log-probabilities computed on a token tree differ from those of plain rows by {difference:.2g} on "
                f"average, more than the {tolerance:.2g} that rounding explains in {dtype}, so it does not honour the "
                "tree's attention or position ids"
            )
        return problem

    def micro_batches(
        self, buffer: TurnBuffer, keys: Iterable[Key], max_rows: int, together: bool = True
    ) -> Sequence[MicroBatch]:
        """
        Lay the requested turns out in trees or in rows.

        A micro-batch holds at most `max_rows` rows, or the tree of at most `max_rows` trajectories with no more tokens
        than `max_rows` rows of the longest sequence. Where `max_tokens` is set, that is the only limit.
        """
        keys = list(keys)
        if self._packing == "rows":
            return super().micro_batches(buffer, keys, max_rows, together)
        if self._packing == "tree":
            return self._trees(buffer, keys, max_rows, together)
        rows = group_rows(build_rows(buffer, keys), max_rows, self._max_tokens, self._pad_to_multiple_of, together)
        fits = self._max_tokens is None or all(batch.num_tokens <= self._max_tokens for batch in rows)
        worthwhile = _WORTHWHILE * sum(map(self._cost, rows))
        # rows that do not repeat one another are as many branches
        if fits and self._cost_of_branches(sum(len(batch.rows) for batch in rows)) > worthwhile:
            return rows
        trees = self._trees(buffer, keys, max_rows, together)
        return rows if fits and sum(map(self._cost, trees)) > worthwhile else trees

    def num_tokens(self, buffer: TurnBuffer, keys: Iterable[Key]) -> int:
        """Tokens that a micro-batch of the requested turns would compute."""
        if self._packing == "rows":
            return super().num_tokens(buffer, keys)
        return self._computed(tree_size(_leaves(buffer, keys)))

    def attention(self, batch: Any) -> AbstractContextManager:
        """The attention implementation that a batch needs."""
        if isinstance(batch, RowBatch):
            return super().attention(batch)
        return use_attention(self._causal_lm.config, self._implementation)

    def score(self, model: nn.Module, batch: Any) -> tuple[Scores, torch.Tensor | None]:
        """One forward pass, see [`~seeupo_trl.scoring.rows.RowScorer.score`]."""
        if isinstance(batch, RowBatch):
            return super().score(model, batch)
        device = self._device
        tree, length = batch.tree, batch.num_tokens
        padding = (0, length - len(tree))
        inputs = {
            "input_ids": np.pad(tree.input_ids, padding, constant_values=self._pad_token_id),
            "position_ids": np.pad(tree.depths, padding),
        }
        inputs = {name: on_device(values.astype(np.int64), device)[None] for name, values in inputs.items()}  # (1, S)
        if batch.padded:
            inputs["attention_mask"] = tree_block_mask(tree.subtree_ends, length, device)
        else:
            inputs["tree_branches"] = TreeBranches(tree, device)
        positions, labels, sizes = batch.scored()
        positions = on_device(positions, device)
        labels = on_device(labels.astype(np.int64), device)[None]
        return self._scores(model, inputs, (torch.zeros_like(positions), positions, length), labels, sizes)

    def _trees(self, buffer: TurnBuffer, keys: list[Key], max_rows: int, together: bool) -> list[TreeBatch]:
        turns_of: dict[int, list[Key]] = {}
        for key in keys:
            turns_of.setdefault(key[0], []).append(key)
        units = list(turns_of.values())
        if self._max_tokens is not None and not together:
            units = [part for unit in units for part in self._split(buffer, unit)]
        leaves = [_leaves(buffer, unit) for unit in units]
        if self._max_tokens is not None:
            max_units, max_tokens = inf, self._max_tokens
        else:
            longest = max((len(leaf) for unit in leaves for leaf in unit), default=0)
            max_units, max_tokens = max_rows, max_rows * self._computed(longest)
        parts = partition(leaves, max_units, max_tokens, flex_length if self._pads else None)
        return [self._tree(buffer, [key for unit in part for key in units[unit]]) for part in parts]

    def _split(self, buffer: TurnBuffer, keys: list[Key]) -> list[list[Key]]:
        """Distribute turns of a trajectory over as few trees as the budget allows; later turns share the most."""
        if self.num_tokens(buffer, keys) <= self._max_tokens:
            return [keys]
        parts: list[list[Key]] = []
        for key in sorted(keys, reverse=True):
            if parts and self.num_tokens(buffer, [*parts[-1], key]) <= self._max_tokens:
                parts[-1].append(key)
            else:
                parts.append([key])
        return parts

    def _tree(self, buffer: TurnBuffer, keys: list[Key]) -> TreeBatch:
        return tree_batch(buffer, keys, self._pads)

    def _tiny_tree(self) -> TreeBatch:
        leaves = {(index, 0): np.array(tokens, dtype=np.int32) for index, tokens in enumerate(_TINY_BRANCHES)}
        spans = {
            (index, 1): (leaf, len(tokens) - 1, len(tokens)) for index, (leaf, tokens) in enumerate(leaves.items())
        }
        return TreeBatch(leaves, spans, self._pads)

    def _branching_sample(self, buffer: TurnBuffer, keys: Iterable[Key]) -> list[Key]:
        """
        Two turns each of one or two trajectories whose tree branches and fits into a micro-batch; empty when there are
        none.
        """
        keys = list(keys)
        if self._max_tokens is None:
            return self._branching_turns(buffer, keys)
        # a part of a tree that fits into the budget fits, too
        for tree in self._trees(buffer, keys, 1, together=False):
            if tree.num_tokens <= self._max_tokens and (sample := self._branching_turns(buffer, tree.spans)):
                return sample
        return []

    def _branching_turns(self, buffer: TurnBuffer, keys: Iterable[Key]) -> list[Key]:
        last_turns: dict[int, list[Key]] = {}
        for key in sorted(keys, reverse=True):
            turns = last_turns.setdefault(key[0], [])
            if len(turns) < 2:
                turns.append(key)
        # a trajectory and the one before it, which mostly is of the same group
        for one, two in pairwise([[], *last_turns.values()]):
            sample = one + two
            if len(self._tree(buffer, sample).tree.branches) > 1:
                return sample
        return []

    def _cost(self, batch: TreeBatch | RowBatch) -> float:
        """
        Estimate of the computation, in units of `4 x hidden size` operations a layer: a transformer layer has about
        `12 x hidden size ** 2` weights, and a query-key pair takes `4 x hidden size` operations.
        """
        cost = 6 * self._causal_lm.config.hidden_size * batch.num_tokens + batch.num_pairs
        return cost + self._cost_of_branches(len(batch.tree.branches)) if isinstance(batch, TreeBatch) else cost

    def _cost_of_branches(self, number: int) -> float:
        """The part of it that calling attention for each branch takes, which one kernel for the tree does not."""
        return 0.0 if self._pads else number * _OPERATIONS_OF_A_CALL / (4 * self._causal_lm.config.hidden_size)


def _leaves(buffer: TurnBuffer, keys: Iterable[Key]) -> list[np.ndarray]:
    return list(tree_batch(buffer, keys, padded=False).leaves.values())
