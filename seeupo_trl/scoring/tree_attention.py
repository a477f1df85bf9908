"""
Attention over token trees, and which models can have it.

On CUDA it is PyTorch's `flex_attention` with a block mask, compiled here and not by transformers (5.23): there one
compiled function serves the whole process, and after eight variants it falls back, without a word, to an eager form
that holds all (tokens x tokens) scores. Elsewhere every branch of a tree attends to its path with PyTorch's scaled dot
product attention: a dense (tokens x tokens) mask would cost memory and computation for all the pairs of different
branches, which this never touches.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import is_torch_flex_attn_available

from .token_tree import TokenTree


BRANCHES = "seeupo_tree_branches"
FLEX = "seeupo_tree_flex"
FLEX_BLOCK = 128
# two blocks: one block alone would be compiled as a case of its own
SHORTEST_FLEX_LENGTH = 2 * FLEX_BLOCK
# Of the compiled function: with and without gradient, with and without autocast, dtypes, the policy's heads and the
# reference's. A process with more of them stops with an error.
MOST_COMPILED_VARIANTS = 64


class TreeBranches:
    """
    The branches of a tree as [`attend_along_paths`] needs them.

    Args:
        tree ([`~seeupo_trl.scoring.token_tree.TokenTree`]):
            The tree.
        device (`torch.device`):
            Where the model is.
    """

    def __init__(self, tree: TokenTree, device: torch.device):
        self.paths = on_device(np.concatenate([branch.path for branch in tree.branches]), device)
        self.path_lengths = [len(branch.path) for branch in tree.branches]
        self.lengths = [branch.end - branch.start for branch in tree.branches]
        self.masks = [
            # a branch from the root is plainly causal, and a single token sees its whole path
            None if length in (1, path_length) else _see_path(length, path_length, device)
            for length, path_length in zip(self.lengths, self.path_lengths, strict=True)
        ]


def _see_path(length: int, path_length: int, device: torch.device) -> torch.Tensor:
    """Mask of shape `(1, 1, length, path_length)` for the last `length` tokens of a path."""
    mask = torch.ones(length, path_length, dtype=torch.bool, device=device)
    return mask.tril_(path_length - length)[None, None]


def attend_along_paths(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    tree_branches: TreeBranches | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention function of transformers for one tree, with tensors of shape `(1, heads, S, head_dim)`."""
    if tree_branches is None:
        # the model does not hand its keyword arguments on; the scorer's check sees it in the log-probabilities
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    queries = query.split(tree_branches.lengths, dim=2)
    keys = key.index_select(2, tree_branches.paths).split(tree_branches.path_lengths, dim=2)
    values = value.index_select(2, tree_branches.paths).split(tree_branches.path_lengths, dim=2)
    outputs = [
        sdpa_attention_forward(module, q, k, v, attention_mask=mask, **kwargs)[0]  # (1, length, heads, head_dim)
        for q, k, v, mask in zip(queries, keys, values, tree_branches.masks, strict=True)
    ]
    return torch.cat(outputs, dim=1), None


def _attend_in_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockMask, scale: float | None
) -> torch.Tensor:
    # without repeated keys and values, whatever the number of heads: repeated ones take 1.9 GB at 58k tokens
    return flex_attention(query, key, value, block_mask=mask, scale=scale, enable_gqa=True)


@functools.cache
def compiled_attention(backend: str = "inductor") -> Callable[..., torch.Tensor]:
    """
    `flex_attention`, compiled for this package alone. What cannot be compiled, or would be compiled more than
    [`MOST_COMPILED_VARIANTS`] times, is an error: the eager form would hold all (tokens x tokens) scores.
    """
    compiled = torch.compile(_attend_in_blocks, fullgraph=True, backend=backend)

    def attend(*args) -> torch.Tensor:
        # an argument of `torch.compile` only since a version after 2.11
        with torch._dynamo.config.patch(recompile_limit=MOST_COMPILED_VARIANTS):
            return compiled(*args)

    return attend


def attend_on_tree(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: BlockMask | torch.Tensor | None,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    Attention function of transformers for one tree on CUDA, with tensors of shape `(1, heads, S, head_dim)`.

    Raises:
        `ValueError`:
            Where a model asks for more than scaled attention with the tree's mask.
    """
    if not isinstance(attention_mask, BlockMask):
        raise ValueError("the model does not hand the tree's mask on to its attention")
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"its attention uses `{name}`, which is not supported on trees")
    # with float32 weights under autocast queries and keys are float32 (norms, rotary embeddings) and values are not
    device_type = query.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else value.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    output = compiled_attention()(query, key, value, attention_mask, scaling)
    return output.transpose(1, 2).contiguous(), None  # (1, S, heads, head_dim)


AttentionInterface.register(BRANCHES, attend_along_paths)
AttentionInterface.register(FLEX, attend_on_tree)


def flex_length(num_tokens: int | np.ndarray) -> int | np.ndarray:
    """
    Length to which a tree is padded for `flex_attention`, or trees are: a multiple of the block size, two blocks at
    least, and one of at most 32 lengths from any power of two to the next, so that few shapes are compiled and about
    3% at most is padding.
    """
    num_tokens = np.maximum(num_tokens, SHORTEST_FLEX_LENGTH)
    bit_length = np.frexp(num_tokens)[1]
    step = np.maximum(FLEX_BLOCK, 1 << np.maximum(bit_length - 6, 0))
    lengths = -(-num_tokens // step) * step
    return lengths if np.ndim(lengths) else int(lengths)


def tree_block_mask(subtree_ends: np.ndarray, length: int, device: torch.device) -> BlockMask:
    """
    Mask `k <= q < subtree_ends[k]` for `flex_attention`, made without a (tokens x tokens) tensor.

    Args:
        subtree_ends (`np.ndarray` of shape `(S,)`):
            See [`~seeupo_trl.scoring.token_tree.TokenTree`].
        length (`int`):
            Length to pad to, a multiple of the block size. A padding token sees itself.
        device (`torch.device`):
            Where the model is.

    Returns:
        `BlockMask`
    """
    ends = np.concatenate([subtree_ends, np.arange(len(subtree_ends), length) + 1])
    blocks = ends.reshape(-1, FLEX_BLOCK)
    start = np.arange(len(blocks)) * FLEX_BLOCK
    earlier = start[:, None] > start  # (query block, key block)
    full = earlier & (blocks.min(axis=1) >= start[:, None] + FLEX_BLOCK)
    partial = (earlier & (blocks.max(axis=1) > start[:, None]) & ~full) | np.eye(len(blocks), dtype=bool)
    limits = on_device(ends, device)

    def is_ancestor(batch, head, query, key):
        return (key <= query) & (query < limits[key])

    return BlockMask.from_kv_blocks(
        *_compressed(partial, device), *_compressed(full, device), BLOCK_SIZE=FLEX_BLOCK, mask_mod=is_ancestor
    )


def on_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A tensor of some values on a device, without waiting for what the device is doing."""
    return torch.from_numpy(values).to(device, non_blocking=True)


def _compressed(blocks: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Number of key blocks of each query block, and their indices first, of shapes `(1, 1, Q)` and `(1, 1, Q, K)`."""
    counts = blocks.sum(axis=1).astype(np.int32)
    indices = np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)
    return on_device(counts, device)[None, None], on_device(indices, device)[None, None]


def tree_implementation(causal_lm: PreTrainedModel, device: torch.device) -> str:
    """Attention implementation that computes trees for a model on a device: [`FLEX`] or [`BRANCHES`]."""
    config = causal_lm.config
    dropout = getattr(config, "attention_dropout", 0.0)  # not a field of every architecture
    usable = causal_lm._supports_flex_attn and is_torch_flex_attn_available()
    if device.type == "cuda" and usable and causal_lm.dtype != torch.float64 and not dropout:
        return FLEX
    return BRANCHES


@contextmanager
def use_attention(config: PreTrainedConfig, implementation: str) -> Iterator[None]:
    """Attention implementation of a model inside the context; gradient checkpointing needs it in the backward pass."""
    before = config._attn_implementation
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = before


def reason_against_trees(model: nn.Module) -> str | None:
    """
    Why a model's log-probabilities cannot be computed on token trees, as far as its class and configuration tell.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model.

    Returns:
        `str`, *optional*:
            The reason; `None` for a model in which every layer attends to all earlier positions.
    """
    if is_peft_model(model):
        if any(adapter.is_prompt_learning for adapter in model.peft_config.values()):
            return "its adapter puts virtual tokens in front of every sequence"
        model = model.get_base_model()
    config: Any = model.config
    if config.get_text_config() is not config:
        return "it is a multimodal model"
    if model._is_stateful:
        return "it carries a state from token to token"
    if not model._supports_attention_backend or not model._supports_sdpa:
        return "its attention cannot be exchanged"

    # fields that only the architectures concerned have
    def option(name):
        return getattr(config, name, None)

    layer_types = option("layer_types")
    if layer_types is not None and set(layer_types) != {"full_attention"}:
        return f"it has layers other than full attention ({', '.join(sorted(set(layer_types)))})"
    # a configuration with layer types keeps a window's size even where no layer uses it
    if layer_types is None and option("sliding_window") is not None:
        return f"its attention has a sliding window of {config.sliding_window} tokens"
    if option("attention_chunk_size") is not None:
        return f"its attention works in chunks of {config.attention_chunk_size} tokens"
    if option("is_causal") is False:
        return "its attention is not causal"
    if option("alibi") or option("position_embedding_type") == "alibi":
        return "its attention bias depends on the distance in the sequence (ALiBi)"
    return None
