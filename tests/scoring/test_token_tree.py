"""Token trees hold what sequences share once, and change neither log-probabilities nor gradients."""

from itertools import pairwise, product
from math import inf

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import token_logps
from tiny import load_tiny_model
from torch.nn.attention.flex_attention import create_block_mask

from seeupo_trl import SeeUPOConfig
from seeupo_trl.scoring import trees
from seeupo_trl.scoring.rows import RowBatch
from seeupo_trl.scoring.token_tree import build_tree, common_prefix, partition, tree_size
from seeupo_trl.scoring.tree_attention import FLEX, FLEX_BLOCK, SHORTEST_FLEX_LENGTH, flex_length, tree_block_mask
from seeupo_trl.scoring.trees import TreeBatch, TreeScorer
from seeupo_trl.scoring.turn_buffer import TurnBuffer
from seeupo_trl.trajectory import Trajectory, Turn


TEMPERATURE = 0.8

# few different tokens, so that sequences share prefixes, repeat and extend one another
few_tokens = st.integers(5, 7)
sequences = st.lists(st.lists(few_tokens, min_size=1, max_size=9), min_size=1, max_size=8)
turns = st.tuples(st.lists(few_tokens, min_size=1, max_size=7), st.lists(few_tokens, min_size=1, max_size=4))
episodes = st.lists(st.lists(turns, min_size=1, max_size=3), min_size=1, max_size=5)


def arrays(lists):
    return [np.array(tokens, dtype=np.int32) for tokens in lists]


def buffer_of(episodes) -> TurnBuffer:
    trajectories = [Trajectory([Turn(context, action) for context, action in turns]) for turns in episodes]
    return TurnBuffer(trajectories)


def keys_of(buffer: TurnBuffer) -> list[tuple[int, int]]:
    return [(i, turn + 1) for i, t in enumerate(buffer.trajectories) for turn in range(len(t.turns))]


@pytest.fixture(scope="module")
def model(tiny_dir):
    return load_tiny_model(tiny_dir, torch.float64)


def scorer_of(model, packing="tree", **options) -> TreeScorer:
    return TreeScorer(model, 0, TEMPERATURE, packing=packing, **options)


# --- The tree --------------------------------------------------------------------------------------------------------


@given(sequences)
def test_tree_has_one_token_for_each_distinct_prefix(lists):
    prefixes = {tuple(tokens[: n + 1]) for tokens in lists for n in range(len(tokens))}
    assert len(build_tree(arrays(lists))) == tree_size(arrays(lists)) == len(prefixes)


@given(sequences)
def test_paths_spell_their_sequences(lists):
    tree = build_tree(arrays(lists))
    for tokens, path in zip(lists, tree.paths, strict=True):
        assert tree.input_ids[path].tolist() == tokens
        assert tree.depths[path].tolist() == list(range(len(tokens)))


@given(sequences)
def test_a_token_sees_its_ancestors_and_itself(lists):
    tree = build_tree(arrays(lists))
    prefix_of = {}
    for path in tree.paths:
        for depth, position in enumerate(path.tolist()):
            prefix_of[position] = path[: depth + 1].tolist()
    for query in range(len(tree)):
        seen = [key for key in range(len(tree)) if key <= query < tree.subtree_ends[key]]
        assert seen == prefix_of[query]


@given(sequences)
def test_branches_hold_every_token_once_and_end_at_the_leaves(lists):
    tree = build_tree(arrays(lists))
    assert [position for branch in tree.branches for position in range(branch.start, branch.end)] == list(
        range(len(tree))
    )
    for branch in tree.branches:
        assert branch.path[-(branch.end - branch.start) :].tolist() == list(range(branch.start, branch.end))
        assert tree.subtree_ends[branch.end - 1] == branch.end


@given(st.lists(few_tokens), st.lists(few_tokens))
def test_common_prefix(first, second):
    length = common_prefix(*arrays([first, second]))
    assert first[:length] == second[:length]
    assert length == min(len(first), len(second)) or first[length] != second[length]


# --- Distribution over micro-batches ---------------------------------------------------------------------------------


def group(prompt: int, sizes: list[int]) -> list[list[np.ndarray]]:
    """Trajectories with a prompt of 10 tokens of their own kind and actions of the given sizes."""
    return [[np.array([prompt] * 10 + [100 + i] * size, dtype=np.int32)] for i, size in enumerate(sizes)]


def test_groups_are_kept_together():
    units = group(1, [5] * 3) + group(2, [5] * 3)
    shuffled = [4, 0, 3, 2, 5, 1]
    parts = partition([units[i] for i in shuffled], max_units=4)
    assert sorted(sorted(shuffled[i] for i in part) for part in parts) == [[0, 1, 2], [3, 4, 5]]


def test_a_tree_over_the_budget_is_split_between_siblings_in_parts_of_similar_size():
    parts = partition(group(1, [5] * 6), max_tokens=35)
    assert [len(part) for part in parts] == [3, 3]


def test_what_fits_into_one_tree_is_one_tree():
    assert len(partition(group(1, [5] * 4) + group(2, [5] * 4), max_tokens=60)) == 1


@given(st.lists(st.lists(st.lists(few_tokens, min_size=1, max_size=9), min_size=1, max_size=3), max_size=8), st.data())
def test_partition_keeps_units_whole_and_limits(units, data):
    units = [arrays(unit) for unit in units]
    max_units, max_tokens = data.draw(st.integers(1, 4)), data.draw(st.integers(9, 40))
    parts = partition(units, max_units, max_tokens)
    assert sorted(index for part in parts for index in part) == list(range(len(units)))
    for part in parts:
        assert len(part) <= max_units
        assert len(part) == 1 or tree_size([seq for index in part for seq in units[index]]) <= max_tokens


def cuts(length: int):
    """All ways to cut a list of the given length into stretches."""
    for is_cut in product((False, True), repeat=max(length - 1, 0)):
        ends = [position for position, cut in enumerate(is_cut, start=1) if cut]
        yield list(pairwise([0, *ends, length])) if length else []


# trajectories of at most two groups, which share their prompt alone: many cuts of them cost alike
groups = st.lists(st.tuples(st.integers(5, 6), st.integers(1, 3)), max_size=8).map(
    lambda members: [[prompt] * 4 + [7 + index] * size for index, (prompt, size) in enumerate(members)]
)


@given(
    st.lists(st.lists(few_tokens, min_size=1, max_size=9), max_size=8) | groups,
    st.sampled_from([1, 2, 3, inf]),
    st.sampled_from([9, 12, 20, inf]),
    st.sampled_from([1, 4]),
)
def test_no_other_cut_of_the_sorted_units_costs_less(lists, max_units, max_tokens, multiple):
    def padded(tokens):
        return -(-tokens // multiple) * multiple

    def size_of(part) -> int:
        return padded(tree_size(arrays(part)))

    def cost_of(parts) -> tuple[int, int, int]:
        sizes = [size_of(part) for part in parts]
        return sum(sizes), len(sizes), sum(size**2 for size in sizes)

    def is_allowed(part) -> bool:
        return len(part) == 1 or len(part) <= max_units and size_of(part) <= max_tokens

    ordered = sorted(lists)
    candidates = [[ordered[start:end] for start, end in cut] for cut in cuts(len(lists))]
    parts = partition([arrays([tokens]) for tokens in lists], max_units, max_tokens, padded)
    found = [[lists[index] for index in part] for part in parts]
    assert cost_of(found) == min(cost_of(parts) for parts in candidates if all(map(is_allowed, parts)))
    assert [size_of(part) for part in found] == sorted(map(size_of, found), reverse=True)


# --- Scores and gradients --------------------------------------------------------------------------------------------


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def assert_equal_to_sequences(model, buffer, batches, scorer):
    """Every turn scored once, as on its own, and so are the gradients of a weighted sum of all log-probabilities."""
    scores = {}
    loss = 0
    total = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for batch in batches:
        with scorer.attention(batch):
            new, _ = scorer.score(model, batch)
            assert not new.keys() & scores.keys()
            loss = sum((key[0] + 1) / key[1] * score.logps.sum() for key, score in new.items())
            total = [sum(pair) for pair in zip(total, gradients(model, loss), strict=True)]
        scores |= new
    assert set(scores) == set(keys_of(buffer))
    expected = 0
    for key, score in scores.items():
        turn = buffer.turn(key)
        logps = token_logps(model, turn.context_ids, turn.action_ids, TEMPERATURE)
        torch.testing.assert_close(score.logps, logps, atol=1e-10, rtol=0)
        expected += (key[0] + 1) / key[1] * logps.sum()
    for actual, gradient in zip(total, gradients(model, expected), strict=True):
        torch.testing.assert_close(actual, gradient, atol=1e-9, rtol=1e-9)


@settings(max_examples=25, deadline=None)
@given(episodes, st.sampled_from([None, 11, 15, 25]), st.integers(1, 5), st.booleans())
def test_scores_and_gradients_are_those_of_each_sequence(model, episodes, max_tokens, max_rows, together):
    buffer = buffer_of(episodes)
    scorer = scorer_of(model, max_tokens=max_tokens)
    batches = scorer.micro_batches(buffer, keys_of(buffer), max_rows, together)
    assert all(isinstance(batch, TreeBatch) for batch in batches)
    assert_equal_to_sequences(model, buffer, batches, scorer)
    for batch in batches:
        trajectories = {index for index, _ in batch.spans}
        if max_tokens is None:
            assert len(trajectories) <= max_rows
        elif not together:
            assert batch.num_tokens <= max_tokens
        else:
            assert batch.num_tokens <= max_tokens or len(trajectories) == 1
    if together:
        assert sum(len({index for index, _ in batch.spans}) for batch in batches) == len(episodes)


@settings(max_examples=10, deadline=None)
@given(episodes, st.sampled_from([None, 33, 50]), st.booleans())
def test_rows_under_a_budget_are_exact_too(model, episodes, max_tokens, together):
    buffer = buffer_of(episodes)
    scorer = scorer_of(model, "rows", max_tokens=max_tokens)
    batches = scorer.micro_batches(buffer, keys_of(buffer), 3, together)
    assert all(isinstance(batch, RowBatch) for batch in batches)
    assert max_tokens is None or all(batch.num_tokens <= max_tokens for batch in batches)
    assert_equal_to_sequences(model, buffer, batches, scorer)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_recomputes_the_tree(tiny_dir, use_reentrant):
    model = load_tiny_model(tiny_dir, torch.float64).train()
    episodes = [[([5, 6, 7], [8, 9]), ([5, 7, 8, 9, 10], [11])], [([5, 6, 7], [8, 10, 11])]]
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        scorer = scorer_of(model)
        buffer = buffer_of(episodes)
        (batch,) = scorer.micro_batches(buffer, keys_of(buffer), 2)
        with scorer.attention(batch):
            scores, _ = scorer.score(model, batch)
            sum(score.logps.sum() for score in scores.values()).backward()
        results.append([parameter.grad.clone() for parameter in model.parameters()])
        model.zero_grad()
    assert all(torch.allclose(*pair, rtol=1e-12, atol=1e-12) for pair in zip(*results, strict=True))
    assert model.config._attn_implementation == "sdpa"


# --- The choice of the layout ----------------------------------------------------------------------------------------


def test_auto_takes_trees_where_they_save(model):
    prompt = list(range(5, 65)) * 10
    shared = buffer_of([[(prompt, [5 + i, 6])] for i in range(4)])
    alone = buffer_of([[([5 + i, *prompt], [6, 7])] for i in range(4)])
    short = buffer_of([[(prompt[:6], [5 + i, 6])] for i in range(4)])  # a branch costs more than it shares
    for buffer, layout in ((shared, TreeBatch), (alone, RowBatch), (short, RowBatch)):
        (batch,) = scorer_of(model, "auto").micro_batches(buffer, keys_of(buffer), 4)
        assert isinstance(batch, layout)


def test_auto_keeps_the_budget_that_rows_would_break(model):
    buffer = buffer_of([[([5, 6, 7, 8], [9] * 4), ([5, 6, 7, 8], [10] * 4)]])
    (batch,) = scorer_of(model, "auto", max_tokens=12).micro_batches(buffer, keys_of(buffer), 1)
    assert isinstance(batch, TreeBatch)
    assert batch.num_tokens == scorer_of(model, max_tokens=12).num_tokens(buffer, keys_of(buffer)) == 12


# --- flex_attention, as far as a CPU runs it -------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 300), st.lists(st.integers(1, 200), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_block_mask_is_the_mask_of_the_tree(prompt, lengths, seed):
    rng = np.random.default_rng(seed)
    tree = build_tree([np.concatenate([np.zeros(prompt), rng.integers(0, 2, n)]).astype(np.int32) for n in lengths])
    length = flex_length(len(tree))
    mask = tree_block_mask(tree.subtree_ends, length, torch.device("cpu"))
    expected = create_block_mask(mask.mask_mod, 1, None, length, length, device="cpu")
    assert torch.equal(mask.to_dense(), expected.to_dense())
    positions = torch.arange(length)
    dense = mask.mask_mod(0, 0, positions[:, None], positions)
    ends = np.concatenate([tree.subtree_ends, np.arange(len(tree), length) + 1])
    query, key = np.arange(length)[:, None], np.arange(length)
    assert np.array_equal(dense.numpy(), (key <= query) & (query < ends))
    blocks = dense.unflatten(0, (-1, FLEX_BLOCK)).unflatten(2, (-1, FLEX_BLOCK)).transpose(1, 2)
    for row, (count, indices) in enumerate(
        zip(mask.full_kv_num_blocks[0, 0], mask.full_kv_indices[0, 0], strict=True)
    ):
        assert blocks[row, indices[:count]].all()


@pytest.mark.parametrize("num_tokens", [1, 127, 128, 129, 5000, 8193, 13080, 40000])
def test_padding_for_flex_attention_is_small_and_takes_few_lengths(num_tokens):
    length = flex_length(num_tokens)
    assert length >= num_tokens and length % FLEX_BLOCK == 0
    assert length == SHORTEST_FLEX_LENGTH or length - num_tokens < max(FLEX_BLOCK, num_tokens / 31)
    assert length >= SHORTEST_FLEX_LENGTH
    assert len({flex_length(n) for n in range(8193, 16385)}) == 32


def test_flex_attention_scores_are_those_of_branches(tiny_dir, monkeypatch):
    model = load_tiny_model(tiny_dir).eval()
    prompt = [5 + i % 50 for i in range(300)]
    buffer = buffer_of([[(prompt, [60 + i, 61, 62]), (prompt[:100] + [60 + i], [70 + i] * 30)] for i in range(3)])
    scores = []
    for implementation in (None, FLEX):
        if implementation is not None:
            monkeypatch.setattr(trees, "tree_implementation", lambda model, device: FLEX)
        scorer = scorer_of(model)
        scorer._fused_head = False
        (batch,) = scorer.micro_batches(buffer, keys_of(buffer), 3)
        # its compiled form has no backward on a CPU, and its eager form is the reference that torch tests it with
        with torch.no_grad(), scorer.attention(batch), torch.compiler.set_stance("force_eager"):
            scores.append(scorer.score(model, batch)[0])
    assert batch.num_tokens == 512
    for key in keys_of(buffer):
        torch.testing.assert_close(scores[0][key].logps, scores[1][key].logps, atol=1e-5, rtol=0)


# --- Configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [({"packing": "trees"}, "'auto', 'tree', 'rows'"), ({"max_tokens_per_microbatch": 0}, "at least 1")],
)
def test_wrong_options_are_named(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        SeeUPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)
