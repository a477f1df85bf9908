"""
What a run needs in memory, per GPU and per host: pure estimates, from the shape of a model and the way it is trained.

What is kept is counted from what the libraries allocate, see `training_state.py`; what a pass takes is found by making
it with tensors that have no data, see `activations.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from ..distributed.precision import LOW_PRECISION
from .activations import HEAD_TILE_TOKENS, HEAD_TILE_VOCABULARY, Pass, PassMemory, trace_pass
from .run import GIB, ModelShape, PlannedRun, Strategy, model_shape
from .training_state import FLOAT32, TrainingState, training_state


# what vLLM keeps for its own activations and graphs, about
VLLM_WORKSPACE = 1.5 * GIB

# a trace takes seconds for a large model, and strategies share them
_traced: dict[tuple[str, Pass], PassMemory] = {}


@dataclass(frozen=True)
class Estimate:
    """
    Bytes that a strategy needs.

    Args:
        strategy ([`Strategy`]):
            The strategy.
        kept (`dict[str, float]`):
            What is in a GPU's memory all the time, by what it is.
        update, step, rollout (`dict[str, float]`):
            What the forward and backward pass of the largest micro-batch, an optimizer step and the rollout take
            beside that.
        host (`dict[str, float]`):
            What is in a host's memory while training runs.
        loading (`float`):
            Bytes of a host's memory while the model is loaded.
        limit (`float`):
            Bytes of a GPU's memory that tensors may take.
        host_memory (`float`, *optional*):
            Bytes of memory of a host.
        problems (`tuple[str, ...]`):
            Why the run cannot work even where its memory suffices.
        notes (`tuple[str, ...]`):
            What the user should know.
        max_tokens (`int`, *optional*):
            Tokens of the largest micro-batch that fits, 0 where none does.
    """

    strategy: Strategy
    kept: dict[str, float]
    update: dict[str, float]
    step: dict[str, float]
    rollout: dict[str, float]
    host: dict[str, float]
    loading: float
    limit: float
    host_memory: float | None = None
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    max_tokens: int | None = None

    @property
    def peaks(self) -> dict[str, float]:
        """Bytes of a GPU's memory by phase."""
        kept = sum(self.kept.values())
        phases = {"update": self.update, "optimizer step": self.step, "rollout": self.rollout}
        return {name: kept + sum(parts.values()) for name, parts in phases.items()}

    @property
    def peak(self) -> float:
        return max(self.peaks.values())

    @property
    def host_peak(self) -> float:
        return max(sum(self.host.values()), self.loading)

    @property
    def fits(self) -> bool:
        fits_host = self.host_memory is None or self.host_peak <= self.host_memory
        return self.peak <= self.limit and fits_host and not self.problems


def estimate(
    run: PlannedRun, strategy: Strategy, pass_memory: PassMemory | None = None, shape: ModelShape | None = None
) -> Estimate:
    """
    Memory of a run under a strategy.

    Args:
        run ([`~seeupo_trl.plan.run.PlannedRun`]):
            What is trained, on what.
        strategy ([`~seeupo_trl.plan.run.Strategy`]):
            How it is distributed.
        pass_memory ([`~seeupo_trl.plan.activations.PassMemory`], *optional*):
            Of the largest micro-batch, where it is known. `None` finds it out.
        shape ([`~seeupo_trl.plan.run.ModelShape`], *optional*):
            Of the model with the strategy's adapters, where it is known. `None` finds it out.

    Returns:
        [`Estimate`]
    """
    shape = shape or model_shape(run.config, strategy.lora_rank)
    state = training_state(run, strategy, shape)
    generation = _generation(run, strategy, shape, state)
    loaded = _loaded(run, strategy, shape)
    host = state.host
    if strategy.is_sharded:
        # FSDP2's is as its parameters are
        gathered = loaded if strategy.fsdp else run.compute_dtype(strategy).itemsize * shape.total
        host = {**host, "checkpoint being gathered": gathered}
    return Estimate(
        strategy=strategy,
        kept={**state.kept, **generation.kept},
        update={**_pass_bytes(run, strategy, pass_memory or _trace(run, strategy)), **state.update},
        step=state.step,
        rollout=generation.rollout,
        host={name: value for name, value in host.items() if value},
        # ZeRO-3 partitions parameters as they are loaded; otherwise every process of a host holds the model once
        loading=loaded if strategy.zero_stage == 3 else loaded * run.gpus / run.nodes,
        limit=run.gpu_memory - run.reserve,
        host_memory=run.host_memory,
        problems=generation.problems,
        notes=(*generation.notes, *_precision_notes(run, strategy)),
    )


def estimate_all(run: PlannedRun, strategies: Sequence[Strategy]) -> list[Estimate]:
    """Estimates of a run under several strategies, each with the largest micro-batch that fits."""
    return [replace(estimate(run, strategy), max_tokens=largest_micro_batch(run, strategy)) for strategy in strategies]


# --- The update ------------------------------------------------------------------------------------------------------


def update_pass(run: PlannedRun, strategy: Strategy) -> Pass:
    """The forward and backward pass of the largest micro-batch."""
    return Pass(
        tokens=run.tokens,
        scored=run.scored(run.tokens),
        rows=run.rows,
        dtype=run.compute_dtype(strategy),
        autocast=run.bf16 and strategy.zero_stage == 0,
        gradient_checkpointing=run.gradient_checkpointing,
        keeps_gradients=strategy.zero_stage < 2 and not strategy.fsdp,
        lora_rank=strategy.lora_rank,
        float32_head=run.bf16 or run.dtype in LOW_PRECISION,
    )


def _trace(run: PlannedRun, strategy: Strategy) -> PassMemory:
    """Memory of the largest micro-batch; strategies that make the same pass share it."""
    one = update_pass(run, strategy)
    key = run.config.to_json_string(), one
    if key not in _traced:
        _traced[key] = trace_pass(run.config, one)
    return _traced[key]


def _pass_bytes(run: PlannedRun, strategy: Strategy, memory: PassMemory) -> dict[str, float]:
    """What the pass itself takes, without what its gradients and parameters do."""
    one = update_pass(run, strategy)
    size = FLOAT32 if one.float32_head else one.dtype.itemsize
    tile = min(one.scored, HEAD_TILE_TOKENS) * HEAD_TILE_VOCABULARY * size
    return {"LM-head tiles": tile, "activations": max(memory.peak - tile, 0)}


# --- The rollout -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Generation:
    """What sampling takes of a GPU, all the time or in the rollout, and what is to be said about it."""

    kept: dict[str, float] = field(default_factory=dict)
    rollout: dict[str, float] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def _generation(run: PlannedRun, strategy: Strategy, shape: ModelShape, state: TrainingState) -> _Generation:
    if run.generation == "vllm-colocate":
        return _colocated_vllm(run, shape)
    if run.generation == "vllm-server":
        return _Generation()
    size = run.compute_dtype(strategy).itemsize
    rollout = {"KV cache": run.completions * run.max_context * size * shape.kv_elements}
    if strategy.zero_stage == 3:
        gathered = shape.total if run.gather_for_generation else min(shape.total, strategy.max_live_parameters)
        rollout["gathered parameters"] = size * gathered
    elif strategy.fsdp:
        rollout["gathered parameters"] = state.update["gathered parameters"]
    return _Generation(rollout=rollout)


def _colocated_vllm(run: PlannedRun, shape: ModelShape) -> _Generation:
    """vLLM's share of a GPU, with weights and cache in bfloat16, and how many contexts the cache holds."""
    size = torch.bfloat16.itemsize
    weights = size * shape.total / run.vllm_tensor_parallel
    per_token = size * shape.kv_elements / run.vllm_tensor_parallel
    share = run.vllm_utilization * run.gpu_memory
    capacity = int((share - weights - VLLM_WORKSPACE) // per_token)
    problems, notes = [], []
    if capacity < run.max_context:
        needed = weights + run.max_context * per_token + VLLM_WORKSPACE
        problems.append(
            f"vLLM's share of {share / GIB:.1f} GiB has no room for its weights and one context of "
            f"{run.max_context} tokens ({needed / GIB:.1f} GiB): raise `vllm_gpu_memory_utilization`, or "
            "`vllm_tensor_parallel_size`."
        )
    else:
        notes.append(
            f"vLLM's cache holds {capacity:,} tokens for every {run.vllm_tensor_parallel} GPU(s): "
            f"{capacity // run.max_context} contexts of {run.max_context:,} at the same time."
        )
    vllm = {"vLLM": share}
    kept, rollout = ({}, vllm) if run.vllm_sleep else (vllm, {})
    return _Generation(kept, rollout, tuple(problems), tuple(notes))


# --- The host, and what the user should know -------------------------------------------------------------------------


def _loaded(run: PlannedRun, strategy: Strategy, shape: ModelShape) -> float:
    """Bytes of the model as it is loaded, under FSDP2 with trained parameters in float32 already."""
    size = run.dtype.itemsize
    return size * shape.total + ((FLOAT32 - size) * shape.trained if strategy.fsdp and run.bf16 else 0)


def _precision_notes(run: PlannedRun, strategy: Strategy) -> tuple[str, ...]:
    if strategy.is_ddp and run.dtype == torch.bfloat16 and strategy.lora_rank is None:
        return (
            "Weights are bfloat16 without a float32 copy: updates smaller than 1/256 of a weight are lost. Load in "
            "float32 (`dtype: float32`), or use ZeRO or FSDP2.",
        )
    return ()


# --- The largest micro-batch -----------------------------------------------------------------------------------------


def largest_micro_batch(run: PlannedRun, strategy: Strategy, step: int = 128) -> int:
    """
    Largest number of tokens of a micro-batch with which a run fits its GPUs, 0 where none does.

    Every part of a pass is a linear function of the tokens, but for the tiles of the head, which are bounded. So the
    line through two lengths leads to the next one to trace.
    """
    shape = model_shape(run.config, strategy.lora_rank)
    limit = run.gpu_memory - run.reserve

    def traced(tokens: int) -> PassMemory:
        return _trace(replace(run, tokens=tokens), strategy)

    def fits(tokens: int, memory: PassMemory) -> bool:
        return estimate(replace(run, tokens=tokens), strategy, memory, shape).peak <= limit

    def on_line(one: int, two: int) -> int:
        """Largest number of tokens that fits according to the line through two lengths."""
        low, high = 0, 1 << 22
        while high - low > step:
            middle = (low + high) // 2 // step * step
            memory = traced(one).extrapolated(traced(two), (middle - one) / (two - one))
            low, high = (middle, high) if fits(middle, memory) else (low, middle)
        return low

    previous, tokens = 4096, 16384
    for _ in range(3):
        following = on_line(previous, tokens)
        if following in (0, previous, tokens):
            tokens = following
            break
        previous, tokens = tokens, following
    while tokens and not fits(tokens, traced(tokens)):
        tokens = tokens * 97 // 100 // step * step
    return tokens
