"""The kernel that attends on trees on GPUs, as far as a CPU tells; `tests/cuda` asks the same of a card."""

import pytest
import torch
from tiny import load_tiny_model
from tree_kernel import a_tree, attention_errors, autocast, num_graphs, score_trees_of_twenty_lengths, tree_kernel

from seeupo_trl.scoring import tree_attention
from seeupo_trl.scoring.tree_attention import (
    attend_on_tree,
    compiled_attention,
    flex_length,
    tree_block_mask,
)


CPU = torch.device("cpu")


@pytest.fixture
def kernel():
    with tree_kernel("cpu"):
        yield


def attend(num_tokens=300, heads=(4, 2), head_dim=8, dtypes=(torch.float32,) * 3, grad=True):
    tree = a_tree(num_tokens)
    length = flex_length(len(tree))
    numbers = (heads[0], heads[1], heads[1])
    tensors = [
        torch.randn(1, number, length, head_dim, dtype=dtype, requires_grad=grad)
        for number, dtype in zip(numbers, dtypes, strict=True)
    ]
    mask = tree_block_mask(tree.subtree_ends, length, CPU)
    with torch.set_grad_enabled(grad):
        return attend_on_tree(None, *tensors, mask, scaling=0.3)[0]


def test_what_would_be_a_ninth_variant_is_compiled_too(kernel):
    variants = [(heads, size) for heads in ((2, 1), (4, 2), (5, 1), (6, 2), (3, 3)) for size in (8, 16)]
    for heads, head_dim in variants:
        attend(heads=heads, head_dim=head_dim, grad=False)
    assert num_graphs() == len(variants) > torch._dynamo.config.recompile_limit


def test_more_variants_than_are_allowed_are_an_error_and_not_an_eager_fallback(kernel, monkeypatch):
    monkeypatch.setattr(tree_attention, "MOST_COMPILED_VARIANTS", 2)
    for head_dim in (8, 16):
        attend(head_dim=head_dim, grad=False)
    with pytest.raises(Exception, match="fullgraph"):
        attend(head_dim=32, grad=False)
    assert num_graphs() == 2


@pytest.mark.parametrize("autocasts", [False, True])
def test_queries_keys_and_values_get_one_dtype(autocasts, kernel):
    """As under autocast with float32 weights: norms and rotary embeddings return float32, projections bfloat16."""
    dtypes = (torch.float32, torch.float32, torch.bfloat16)
    with autocast("cpu", autocasts):
        output = attend(dtypes=dtypes)
    assert output.dtype == torch.bfloat16 and output.requires_grad


@pytest.mark.parametrize("heads", [(4, 2), (5, 1)])
def test_output_and_gradients_are_those_of_attention_with_the_dense_mask(heads, kernel):
    for name, (error, _) in attention_errors("cpu", torch.float32, heads, 8, 400).items():
        assert error < 1e-4, name


def test_what_is_not_plain_attention_is_refused(kernel):
    tensors = [torch.zeros(1, 2, 256, 8)] * 3
    mask = tree_block_mask(a_tree(200).subtree_ends, 256, CPU)
    with pytest.raises(ValueError, match="softcap"):
        attend_on_tree(None, *tensors, mask, softcap=30.0)
    with pytest.raises(ValueError, match="does not hand the tree's mask on"):
        attend_on_tree(None, *tensors, None)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["", "non-reentrant", "reentrant"])
def test_a_run_compiles_at_most_eight_graphs(checkpointing, kernel, tiny_dir):
    """Policy and reference, with and without gradient, over trees of twenty lengths."""
    score_trees_of_twenty_lengths(lambda: load_tiny_model(tiny_dir), checkpointing)
    assert 2 <= num_graphs() <= 8


def test_it_is_compiled_once_a_process():
    assert compiled_attention() is compiled_attention()
