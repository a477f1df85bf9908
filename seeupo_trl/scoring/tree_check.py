"""Whether trees compute what rows compute, in the precision and on the device of a run."""

from types import SimpleNamespace

import numpy as np
import torch
from transformers import AttentionInterface, PreTrainedModel

from .token_tree import build_tree
from .tree_attention import FLEX, TreeBranches, flex_length, tree_block_mask


# Largest mean difference of log-probabilities that counts as rounding. TensorFloat-32 has as many digits as float16.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.0125, torch.bfloat16: 0.05}
# Largest error of attention's outputs and gradients that does, relative to the largest value.
_ATTENTION_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}
# Shared beginning and branches of the trees that attention is tried on. The second tree is one of another length,
# for which the kernel is compiled again.
_TRIED_TREES = ((200, (40, 40, 30)), (300, (120, 7)))


def rounds_float32(device: torch.device) -> bool:
    """Whether matrix products of float32 round their inputs on a device, as TensorFloat-32 does."""
    values = torch.full((128, 128), 1 + 2.0**-13, device=device)
    return not torch.equal(values @ torch.eye(128, device=device), values)


def rounding_of(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype whose rounding a computation in `dtype` has on a device."""
    return torch.float16 if dtype == torch.float32 and rounds_float32(device) else dtype


def logps_tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """Largest mean difference of two layouts' log-probabilities that rounding explains."""
    return _TOLERANCE[rounding_of(dtype, device)]


def reason_against_attention(
    causal_lm: PreTrainedModel, implementation: str, dtype: torch.dtype, device: torch.device
) -> str | None:
    """
    Try a tree's attention forward and backward on small trees, with the heads of a model but without the model, so
    that a kernel that cannot be compiled or is wrong is found where nothing else has begun.

    Args:
        causal_lm ([`~transformers.PreTrainedModel`]):
            The model.
        implementation (`str`):
            [`~seeupo_trl.scoring.tree_attention.FLEX`] or [`~seeupo_trl.scoring.tree_attention.BRANCHES`].
        dtype (`torch.dtype`):
            In which the model computes.
        device (`torch.device`):
            Where it computes.

    Returns:
        `str`, *optional*:
            What is wrong with it; `None` where outputs and gradients are those of plain attention, up to rounding.
    """
    tolerance = _ATTENTION_TOLERANCE[rounding_of(dtype, device)]
    try:
        errors = [_attention_error(causal_lm, implementation, dtype, device, *one) for one in _TRIED_TREES]
    except Exception as error:  # whatever a compiler raises
        return f"its attention on a tree fails ({_first_line(error)})"
    worst = float(np.max(errors))
    if worst <= tolerance:
        return None
    return f"its attention on a tree is off by {worst:.2g} of the largest value, more than {tolerance:.2g}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _attention_error(
    causal_lm: PreTrainedModel,
    implementation: str,
    dtype: torch.dtype,
    device: torch.device,
    shared: int,
    lengths: tuple[int, ...],
) -> float:
    """Largest error of the output and the gradients of attention on one tree, relative to the largest value."""
    sequences = [np.r_[np.zeros(shared, np.int32), np.full(n, i + 1, np.int32)] for i, n in enumerate(lengths)]
    tree = build_tree(sequences)
    size = flex_length(len(tree)) if implementation == FLEX else len(tree)
    config = causal_lm.config.get_text_config()
    heads = config.num_attention_heads
    # not fields of every architecture
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads

    generator = torch.Generator(device).manual_seed(0)
    shapes = [(1, number, size, head_dim) for number in (heads, kv_heads, kv_heads, heads)]
    query, key, value, gradient = (
        torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype) for shape in shapes
    )
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    module = SimpleNamespace(num_key_value_groups=heads // kv_heads, is_causal=True, training=True)
    options = {"scaling": head_dim**-0.5, "dropout": 0.0}
    mask = tree_block_mask(tree.subtree_ends, size, device) if implementation == FLEX else None
    if implementation != FLEX:
        options["tree_branches"] = TreeBranches(tree, device)
    attend = AttentionInterface()[implementation]
    with torch.enable_grad():
        output = attend(module, *inputs, mask, **options)[0].transpose(1, 2)  # (1, heads, S, head_dim)
        actual = [output, *torch.autograd.grad(output, inputs, gradient.to(output.dtype))]

        exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
        expected_output = _plain_attention(*exact, tree.subtree_ends, head_dim**-0.5)
        expected = [expected_output, *torch.autograd.grad(expected_output, exact, gradient.double())]
    errors = [(one.double() - two).abs().max() / two.abs().max() for one, two in zip(actual, expected, strict=True)]
    return torch.stack(errors).max().nan_to_num(nan=torch.inf).item()


def _plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, subtree_ends: np.ndarray, scale: float
) -> torch.Tensor:
    """Attention with a dense mask, in the dtype of its inputs."""
    size, groups = query.size(2), query.size(1) // key.size(1)
    ends = torch.arange(1, size + 1, device=query.device)  # a padding token sees itself
    ends[: len(subtree_ends)] = torch.from_numpy(subtree_ends).to(query.device)
    positions = torch.arange(size, device=query.device)
    visible = (positions[None] <= positions[:, None]) & (positions[:, None] < ends[None])
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scale
    return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value.repeat_interleave(groups, 1)
