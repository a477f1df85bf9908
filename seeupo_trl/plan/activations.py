"""
Memory of a forward and backward pass of the update, found by making the pass with tensors that have no data.

The model's own code runs under `FakeTensorMode`: modules, gradient checkpointing, autocast and adapters are what they
are in training, and every tensor's bytes are counted (see [`~seeupo_trl.plan.live_bytes.LiveBytes`]). No weight is
loaded and nothing is computed, so a 14B model takes seconds. Two things are stood in for, because they need a GPU:
attention (a fused kernel that keeps its inputs, its output and one float32 number per query and head, without repeated
key-value heads on trees) and TRL's fused head (tiles of at most 4096 positions x 32768 tokens of the vocabulary, in
float32).
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from trl.trainer.utils import add_fused_lm_head

from ..scoring.causal_lm import causal_lm_of
from ..scoring.interface import MicroBatch
from ..scoring.rows import RowBatch
from ..scoring.tree_attention import BRANCHES, use_attention
from ..scoring.trees import TreeScorer
from .live_bytes import LiveBytes


# tiles of trl's fused head (trl 1.15 and 1.16)
HEAD_TILE_TOKENS = 4096
HEAD_TILE_VOCABULARY = 32768

_FUSED = "seeupo_plan_fused"
_MASKED = "seeupo_plan_masked"
_CAUSAL = "seeupo_plan_causal"


@dataclass(frozen=True)
class PassMemory:
    """
    Largest memory in use in the parts of a pass, in bytes, beyond parameters and the gradients that are kept.

    Args:
        forward (`float`):
            The layers' forward pass.
        head_forward (`float`):
            The language-model head's forward pass.
        head_backward (`float`):
            The language-model head's backward pass.
        layers (`float`):
            The layers' backward pass.
        embedding (`float`):
            Backward pass of the input embeddings.
    """

    forward: float
    head_forward: float
    head_backward: float
    layers: float
    embedding: float

    @property
    def peak(self) -> float:
        return max(self.parts.values())

    @property
    def parts(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def extrapolated(self, other: "PassMemory", steps: float) -> "PassMemory":
        """Continue on the line from this to `other`, part by part, for `steps` times their distance."""
        pairs = {name: (value, other.parts[name]) for name, value in self.parts.items()}
        return PassMemory(**{name: one + steps * (two - one) for name, (one, two) in pairs.items()})


@dataclass(frozen=True)
class Pass:
    """
    One forward and backward pass.

    Args:
        tokens (`int`):
            Tokens of the micro-batch, padding included.
        scored (`int`):
            Positions that are scored.
        rows (`int`, *optional*):
            Number of rows of equal length. `None` is a token tree.
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`):
            Of the parameters.
        autocast (`bool`, *optional*, defaults to `False`):
            Whether the pass runs under bfloat16 autocast.
        gradient_checkpointing (`bool`, *optional*, defaults to `True`):
            Whether layers are recomputed in the backward pass.
        keeps_gradients (`bool`, *optional*, defaults to `False`):
            Whether gradients stay with the parameters, or are reduced and freed as soon as they are there (ZeRO).
        lora_rank (`int`, *optional*):
            Rank of LoRA adapters on all linear layers but the head. `None` trains all parameters.
        float32_head (`bool`, *optional*, defaults to `False`):
            Whether logits are computed in float32, whatever the dtype of the pass.
    """

    tokens: int
    scored: int
    rows: int | None = None
    dtype: torch.dtype = torch.bfloat16
    autocast: bool = False
    gradient_checkpointing: bool = True
    keeps_gradients: bool = False
    lora_rank: int | None = None
    float32_head: bool = False


class _FusedAttention(torch.autograd.Function):
    """Allocates what a fused attention kernel does."""

    @staticmethod
    def forward(ctx, query, key, value, mask):
        ctx.dtypes = query.dtype, key.dtype, value.dtype
        if torch.is_autocast_enabled("cpu"):
            query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
        output = torch.empty_like(query)  # (B, heads, S, head_dim)
        log_sum_exp = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, log_sum_exp, mask)
        return output

    @staticmethod
    def backward(ctx, grad):
        query, key, value, output, log_sum_exp, _ = ctx.saved_tensors
        delta = torch.empty_like(log_sum_exp)
        gradients = [torch.empty_like(tensor) for tensor in (query, key, value)]
        del delta
        return *(gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)), None


def _fused_attention(module, query, key, value, attention_mask, **kwargs):
    return _FusedAttention.apply(query, key, value, None).transpose(1, 2).contiguous(), None


def _masked_attention(module, query, key, value, attention_mask, **kwargs):
    """Scaled dot product attention with a mask, as padded rows have it: key-value heads are repeated."""
    groups = module.num_key_value_groups
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    mask = query.new_empty(query.size(0), 1, query.size(2), query.size(2))
    return _FusedAttention.apply(query, key, value, mask).transpose(1, 2).contiguous(), None


def _causal_attention(module, query, key, value, attention_mask, **kwargs):
    """Scaled dot product attention without a look at the mask, which has no data."""
    return sdpa_attention_forward(module, query, key, value, None, **kwargs)


AttentionInterface.register(_CAUSAL, _causal_attention)
AttentionInterface.register(_FUSED, _fused_attention)
AttentionInterface.register(_MASKED, _masked_attention)


class _FusedHead(torch.autograd.Function):
    """Allocates what TRL's fused head does on a GPU."""

    @staticmethod
    def forward(ctx, hidden, weight, dtype):
        num_tokens = len(hidden)
        statistics = [hidden.new_empty(num_tokens, dtype=torch.float32) for _ in range(7)]
        tile = hidden.new_empty(min(num_tokens, HEAD_TILE_TOKENS), HEAD_TILE_VOCABULARY, dtype=dtype)
        chunk = weight[:HEAD_TILE_VOCABULARY].to(dtype)
        del tile, chunk
        ctx.dtype = dtype
        ctx.save_for_backward(hidden, weight, *statistics[:2])
        return statistics[2]

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, *_ = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden, dtype=torch.float32)
        grad_weight = torch.empty_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        tile = hidden.new_empty(min(len(hidden), HEAD_TILE_TOKENS), HEAD_TILE_VOCABULARY, dtype=ctx.dtype)
        chunk = weight[:HEAD_TILE_VOCABULARY].to(ctx.dtype)
        del tile, chunk
        return grad_hidden.to(hidden.dtype), None if grad_weight is None else grad_weight.to(weight.dtype), None


def measure_pass(model: nn.Module, forward: Callable[[], torch.Tensor], keeps_gradients: bool) -> PassMemory:
    """
    Make a forward and backward pass and count its memory.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model.
        forward (`Callable`):
            Makes the forward pass and returns a loss.
        keeps_gradients (`bool`):
            See [`Pass`].

    Returns:
        [`PassMemory`]
    """
    causal_lm = causal_lm_of(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = []
    peaks: dict[str, int] = {}
    part = "forward"

    def enter(name: str) -> None:
        nonlocal part
        peaks[part] = memory.peak
        memory.reset_peak()
        part = name

    def enter_with_gradient(name: str, tensor: torch.Tensor) -> None:
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: enter(name))

    def after_backbone(module: nn.Module, args: Any, output: Any) -> None:
        enter("head_forward")
        enter_with_gradient("layers", output.last_hidden_state)

    def after_embedding(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        enter_with_gradient("embedding", output)

    def free(parameter: torch.Tensor) -> None:
        parameter.grad = None

    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter) if keeps_gradients else None
        if not keeps_gradients:
            handles.append(parameter.register_post_accumulate_grad_hook(free))
    # the first hook of the backbone, before one that selects the scored positions
    handles.append(causal_lm.base_model.register_forward_hook(after_backbone, prepend=True))
    handles.append(causal_lm.get_input_embeddings().register_forward_hook(after_embedding))
    with LiveBytes() as memory:
        for parameter in model.parameters():
            memory.count(parameter)
            if parameter.grad is not None:
                memory.count(parameter.grad)
        before = memory.live
        memory.reset_peak()
        loss = forward()
        enter("head_backward")
        loss.backward()
        enter("end")
    for handle in handles:
        handle.remove()
    # without gradients of the embedding, the layers' backward pass is the last part
    return PassMemory(**{field.name: max(peaks.get(field.name, before) - before, 0) for field in fields(PassMemory)})


def build_model(config: PreTrainedConfig, dtype: torch.dtype, lora_rank: int | None = None) -> nn.Module:
    """Causal language model on the `meta` device, with adapters if a rank is given."""
    with init_empty_weights(include_buffers=True):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model if lora_rank is None else add_lora(model, lora_rank)


def _on_fake_cpu(model: nn.Module) -> None:
    """Replace tensors of the `meta` device by ones that claim to be on a CPU, which autocast knows."""
    moved: dict[int, torch.Tensor] = {}  # tied parameters stay tied
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in moved:
                data = torch.empty(parameter.shape, dtype=parameter.dtype)
                moved[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
            module._parameters[name] = None if parameter is None else moved[id(parameter)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)


def lora_config(rank: int) -> Any:
    """The [`~peft.LoraConfig`] that is planned for: adapters on all linear layers but the head."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("Planning for LoRA needs `peft`: pip install 'seeupo-trl[peft]'.") from error
    return LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")


def add_lora(model: nn.Module, rank: int) -> nn.Module:
    """The model with the adapters of [`lora_config`]."""
    config = lora_config(rank)
    from peft import get_peft_model

    return get_peft_model(model, config, low_cpu_mem_usage=True)


def trace_pass(config: PreTrainedConfig, one: Pass, batch: MicroBatch | None = None) -> PassMemory:
    """
    Memory of a pass of a model, without the model.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Shape of the model.
        one ([`Pass`]):
            The pass.
        batch ([`~seeupo_trl.scoring.rows.MicroBatch`], *optional*):
            A micro-batch that is computed on a CPU, exactly as [`~seeupo_trl.scoring.trees.TreeScorer`] does it; rows
            must have the same length. `None`: a micro-batch of the pass's size on a GPU.

    Returns:
        [`PassMemory`]

    Raises:
        `ValueError`:
            When the model's code cannot run without data, as with experts that are chosen by looking at the tokens.
    """
    layers = config.get_text_config().num_hidden_layers
    types = set(getattr(config.get_text_config(), "layer_types", None) or ["all"])  # not a field of every architecture
    try:
        if layers <= 3 or len(types) > 1:
            return _trace(config, one, batch)
        # layers are alike, and every part of the pass is a linear function of their number
        two, three = (_trace(_with_layers(config, number), one, batch) for number in (2, 3))
        return two.extrapolated(three, layers - 2)
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"The code of {config.model_type} models does not run without data, so their activations cannot be "
            f"planned ({type(error).__name__}: {error})."
        ) from error


def _trace(config: PreTrainedConfig, one: Pass, batch: MicroBatch | None) -> PassMemory:
    model = build_model(config, one.dtype, one.lora_rank).train()
    causal_lm = causal_lm_of(model)
    if one.gradient_checkpointing:
        causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        if one.lora_rank is not None:
            causal_lm.enable_input_require_grads()
    if batch is None:
        attention = _FUSED if (one.rows or 1) == 1 else _MASKED
    else:
        attention = _CAUSAL if isinstance(batch, RowBatch) else BRANCHES
        add_fused_lm_head(causal_lm, cast_lm_head_to_fp32=one.float32_head, outputs=("log_probs", "entropy"))
    with FakeTensorMode(allow_non_fake_inputs=True), use_attention(causal_lm.config, attention):
        _on_fake_cpu(model)
        forward = _forward_on_gpu(causal_lm, one) if batch is None else _forward_on_cpu(model, batch)

        def with_autocast() -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=one.autocast):
                return forward()

        return measure_pass(model, with_autocast, one.keeps_gradients)


def _forward_on_gpu(causal_lm: nn.Module, one: Pass) -> Callable[[], torch.Tensor]:
    rows = one.rows or 1
    input_ids = torch.zeros(rows, -(-one.tokens // rows), dtype=torch.long)
    positions = torch.zeros(one.scored, dtype=torch.long)

    def forward() -> torch.Tensor:
        output = causal_lm.base_model(input_ids=input_ids, position_ids=input_ids, use_cache=False)
        hidden = output.last_hidden_state[positions, positions]  # (n, H)
        del output
        dtype = torch.bfloat16 if one.autocast else hidden.dtype
        if one.float32_head:
            hidden, dtype = hidden.float(), torch.float32
        return _FusedHead.apply(hidden, causal_lm.get_output_embeddings().weight, dtype).sum()

    return forward


def _forward_on_cpu(model: nn.Module, batch: MicroBatch) -> Callable[[], torch.Tensor]:
    scorer = TreeScorer(model, pad_token_id=0, temperature=1.0)

    def forward() -> torch.Tensor:
        scores, _ = scorer.score(model, batch)
        return sum(score.logps.sum() for score in scores.values())

    return forward


def _with_layers(config: PreTrainedConfig, num_layers: int) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    text_config = config.get_text_config()
    text_config.num_hidden_layers = num_layers
    if getattr(text_config, "layer_types", None) is not None:
        text_config.layer_types = text_config.layer_types[:num_layers]
    return config
