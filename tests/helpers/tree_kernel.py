"""The attention of trees on a device, against float64; on a CPU its eager form behind the same compiled function."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention
from trl.trainer.utils import add_fused_lm_head

from seeupo_trl.scoring import tree_attention, trees
from seeupo_trl.scoring.token_tree import build_tree
from seeupo_trl.scoring.tree_attention import FLEX, attend_on_tree, compiled_attention, flex_length, tree_block_mask
from seeupo_trl.scoring.trees import TreeScorer
from seeupo_trl.scoring.turn_buffer import TurnBuffer
from seeupo_trl.trajectory import Trajectory, Turn


@contextmanager
def tree_kernel(device: str) -> Iterator[None]:
    """
    The compiled kernel as a run has it, nothing compiled yet. On a CPU everything is the same up to the code that is
    generated: PyTorch has none with a backward pass there, so graphs are run operation by operation, and PyTorch's
    refusal of gradients is left out.
    """
    torch._dynamo.reset()
    counters.clear()
    compiled_attention.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        if device == "cpu":
            patch.setattr(flex_attention, "_validate_device", lambda *args: None)
            compiled = compiled_attention("aot_eager")
            patch.setattr(tree_attention, "compiled_attention", lambda: compiled)
            patch.setattr(trees, "tree_implementation", lambda model, device: FLEX)
        yield
    torch._dynamo.reset()


def num_graphs() -> int:
    """Graphs compiled since the kernel was made."""
    return counters["stats"]["unique_graphs"]


def a_tree(num_tokens: int, branches: int = 3):
    """A tree of about so many tokens: half of them shared, three branches, the last one with a branch of its own."""
    own = max(num_tokens // (2 * branches), 1)
    shared = np.zeros(num_tokens - own * branches, np.int32)
    sequences = [np.r_[shared, np.full(own, i + 1, np.int32)] for i in range(branches)]
    sequences.append(np.r_[sequences[-1][: -max(own // 2, 1)], np.full(2, 99, np.int32)])
    return build_tree(sequences)


def plain_attention(query, key, value, mask, scale):
    """Attention with a dense mask of booleans, in the dtype of its inputs."""
    groups = query.size(1) // key.size(1)
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scale
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value.repeat_interleave(groups, 1)


def attention_errors(
    device: str, dtype: torch.dtype, heads: tuple[int, int], head_dim: int, num_tokens: int
) -> dict[str, tuple[float, float]]:
    """
    Largest errors of output and gradients on a tree against float64, of the kernel and of PyTorch's scaled dot product
    attention with the same mask in the same dtype, by name: `output`, `query`, `key`, `value`. Where a dense float64
    computation of all heads would not fit, it takes the first group of query heads.
    """
    tree = a_tree(num_tokens)
    length = flex_length(len(tree))
    query_heads, kv_heads = heads
    groups = query_heads // kv_heads
    if length > 4096:
        query_heads, kv_heads = groups, 1
    generator = torch.Generator(device).manual_seed(num_tokens)
    shapes = [(1, number, length, head_dim) for number in (query_heads, kv_heads, kv_heads, query_heads)]
    *inputs, gradient = (torch.randn(s, generator=generator, device=device).to(dtype) for s in shapes)
    block_mask = tree_block_mask(tree.subtree_ends, length, torch.device(device))
    positions = torch.arange(length, device=device)
    dense = block_mask.mask_mod(0, 0, positions[:, None], positions)
    scale = head_dim**-0.5

    def with_gradients(attend, tensors):
        tensors = [tensor.detach().requires_grad_() for tensor in tensors]
        output = attend(*tensors)
        return [output, *torch.autograd.grad(output, tensors, gradient.to(output.dtype))]

    def kernel(query, key, value):
        module = SimpleNamespace(num_key_value_groups=groups)
        return attend_on_tree(module, query, key, value, block_mask, scaling=scale)[0].transpose(1, 2)

    def sdpa(query, key, value):
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=dense, scale=scale)

    exact = with_gradients(
        lambda *tensors: plain_attention(*tensors, dense, scale), [tensor.double() for tensor in inputs]
    )
    errors = {}
    results = [with_gradients(attend, inputs) for attend in (kernel, sdpa)]
    for name, expected, *actual in zip(("output", "query", "key", "value"), exact, *results, strict=True):
        errors[name] = tuple((one.double() - expected).abs().max().item() for one in actual)
    return errors


def autocast(device: str, enabled: bool):
    """bfloat16 autocast, or nothing."""
    return torch.autocast(device, torch.bfloat16) if enabled else nullcontext()


def score_trees_of_twenty_lengths(load_model, checkpointing: bool | None) -> None:
    """
    Score trees by a policy with and without gradient and by a reference, as a run does; `checkpointing` says whether
    gradient checkpointing is reentrant, `None` that there is none.
    """
    scorers = []
    for _ in range(2):
        model = load_model().train()
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            model.enable_input_require_grads()
        scorers.append((TreeScorer(model, 0, 1.0, packing="tree"), model))
    for number in range(20):
        prompt = [5] * (60 + 37 * number)
        buffer = TurnBuffer([Trajectory([Turn(prompt, [6 + i] * 20)]) for i in range(2)])
        for (scorer, model), grad in ((scorers[0], True), (scorers[0], False), (scorers[1], False)):
            (batch,) = scorer.micro_batches(buffer, [(0, 1), (1, 1)], 2)
            with scorer.attention(batch), torch.set_grad_enabled(grad):
                loss = sum(score.logps.sum() for score in scorer.score(model, batch)[0].values())
                if grad:
                    loss.backward()
