"""
What a run needs in memory, per GPU and per host: pure estimates, from the shape of a model and the way it is trained.

Sizes of what is kept are counted from what accelerate 1.15 and DeepSpeed 0.19 allocate (measured with two processes,
see `tests/plan/test_plan.py`), not from a rule of thumb:

- Without DeepSpeed, parameters, gradients and Adam's two moments have the dtype the model was loaded in; `bf16=True`
  only adds autocast. A model loaded in bfloat16 therefore has no float32 master weights. DDP keeps a second copy of
  all gradients in its buckets.
- DeepSpeed with `bf16=True` casts the model to bfloat16 whatever it was loaded in, and keeps float32 master weights
  and moments, partitioned. Gradients stay in bfloat16. Its buckets hold `reduce_bucket_size` elements.
- In an optimizer step DeepSpeed flattens a partition's gradients and copies them to float32.
- ZeRO-3 gathers up to `max_live_parameters` at a time, and TRL's fused head gathers its weight beside them.
- FSDP2 with `bf16=True` keeps parameters, gradients and moments in float32, partitioned, and gathers, computes and
  reduces in bfloat16, one layer at a time.
"""

from dataclasses import dataclass, replace

import torch

from .activations import HEAD_TILE_TOKENS, HEAD_TILE_VOCABULARY, Pass, PassMemory, trace_pass
from .run import EIGHT_BIT_OPTIMIZERS, GIB, OPTIMIZER_STATES, ModelShape, Run, Strategy, model_shape


# DeepSpeed's default
SUB_GROUP_SIZE = 1_000_000_000

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


def _trace(run: Run, strategy: Strategy) -> PassMemory:
    """Memory of the largest micro-batch; strategies that make the same pass share it."""
    one = update_pass(run, strategy)
    key = run.config.to_json_string(), one
    if key not in _traced:
        _traced[key] = trace_pass(run.config, one)
    return _traced[key]


def estimate(
    run: Run, strategy: Strategy, pass_memory: PassMemory | None = None, shape: ModelShape | None = None
) -> Estimate:
    """
    Memory of a run under a strategy.

    Args:
        run ([`Run`]):
            What is trained, on what.
        strategy ([`Strategy`]):
            How it is distributed.
        pass_memory ([`~seeupo_trl.plan.activations.PassMemory`], *optional*):
            Of the largest micro-batch, where it is known. `None` finds it out.
        shape ([`ModelShape`], *optional*):
            Of the model with the strategy's adapters, where it is known. `None` finds it out.

    Returns:
        [`Estimate`]
    """
    shape = shape or model_shape(run.config, strategy.lora_rank)
    one = update_pass(run, strategy)
    memory = pass_memory or _trace(run, strategy)
    kept, step, transient, host = _training_state(run, strategy, shape)
    problems: list[str] = []
    notes: list[str] = []

    size = one.dtype.itemsize
    processes = run.gpus
    if run.reference and strategy.lora_rank is None:
        # DeepSpeed casts it, FSDP2 does not
        reference_size = run.dtype.itemsize if strategy.fsdp else size
        kept["reference model"] = reference_size * shape.total / (processes if strategy.is_sharded else 1)
        if strategy.offload_param:
            host["reference model"] = kept.pop("reference model") * processes / run.nodes
    tile = min(one.scored, HEAD_TILE_TOKENS) * HEAD_TILE_VOCABULARY * (2 if one.autocast else size)
    update = {"LM-head tiles": tile, "activations": max(memory.peak - tile, 0), **transient}

    rollout: dict[str, float] = {}
    kv = size * shape.kv_elements
    if run.generation == "transformers":
        rollout["KV cache"] = run.completions * run.max_context * kv
        if strategy.zero_stage == 3:
            gathered = shape.total if run.gather_for_generation else min(shape.total, strategy.max_live_parameters)
            rollout["gathered parameters"] = size * gathered
        elif strategy.fsdp:
            rollout["gathered parameters"] = transient["gathered parameters"]
    elif run.generation == "vllm-colocate":
        share = run.vllm_utilization * run.gpu_memory
        (rollout if run.vllm_sleep else kept)["vLLM"] = share
        # vLLM keeps about 1.5 GiB for its own activations and graphs
        room = share - 2 * shape.total / run.vllm_tensor_parallel - 1.5 * GIB
        capacity = int(room // (2 * shape.kv_elements / run.vllm_tensor_parallel))
        if capacity < run.max_context:
            needed = 2 * (shape.total + run.max_context * shape.kv_elements) / run.vllm_tensor_parallel + 1.5 * GIB
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
    if strategy.is_ddp and run.dtype == torch.bfloat16 and strategy.lora_rank is None:
        notes.append(
            "Weights are bfloat16 without a float32 copy: updates smaller than 1/256 of a weight are lost. Load in "
            "float32 (`dtype: float32`), or use ZeRO or FSDP2."
        )

    per_host = processes / run.nodes
    # ZeRO-3 partitions parameters as they are loaded; otherwise every process of a host holds the model once, under
    # FSDP2 with trained parameters in float32 already
    loaded = run.dtype.itemsize * shape.total
    if strategy.fsdp and run.bf16:
        loaded += (4 - run.dtype.itemsize) * shape.trained
    loading = loaded * (1 if strategy.zero_stage == 3 else per_host)
    if strategy.is_sharded:
        # FSDP2's is as its parameters are
        host["checkpoint being gathered"] = loaded if strategy.fsdp else size * shape.total
    return Estimate(
        strategy=strategy,
        kept=kept,
        update=update,
        step=step,
        rollout=rollout,
        host={name: value for name, value in host.items() if value},
        loading=loading,
        limit=run.gpu_memory - run.reserve,
        host_memory=run.host_memory,
        problems=tuple(problems),
        notes=tuple(notes),
    )


def update_pass(run: Run, strategy: Strategy) -> Pass:
    """The forward and backward pass of the largest micro-batch."""
    deepspeed = strategy.zero_stage > 0
    return Pass(
        tokens=run.tokens,
        scored=run.scored(run.tokens),
        rows=run.rows,
        dtype=torch.bfloat16 if run.bf16 and not strategy.is_ddp else run.dtype,
        autocast=run.bf16 and not deepspeed,
        gradient_checkpointing=run.gradient_checkpointing,
        keeps_gradients=strategy.zero_stage < 2 and not strategy.fsdp,
        lora_rank=strategy.lora_rank,
    )


def _training_state(
    run: Run, strategy: Strategy, shape: ModelShape
) -> tuple[dict[str, float], dict[str, float], dict[str, float], dict[str, float]]:
    """What is kept, and what an optimizer step, a pass and a host take: bytes by what they are for."""
    processes, per_host = run.gpus, run.gpus / run.nodes
    trained, frozen = shape.trained, shape.total - shape.trained
    if strategy.fsdp:
        return _fsdp_state(run, strategy, shape)
    if strategy.is_ddp:
        size = run.dtype.itemsize
        adapter_size = 4 if strategy.lora_rank is not None else size  # PEFT casts adapters to float32
        kept = {
            "parameters": size * frozen + adapter_size * trained,
            "optimizer": _optimizer_bytes(run.optimizer, adapter_size) * trained,
        }
        if processes > 1:
            kept["buckets"] = adapter_size * trained
        # they are there from the first micro-batch to the step
        gradients = {"gradients": adapter_size * trained}
        return kept, gradients, gradients, {}

    size = 2 if run.bf16 else run.dtype.itemsize
    share = trained / processes
    optimizer = (4 + _optimizer_bytes(run.optimizer, 4)) * share  # with the float32 master weights
    gradients = size * share
    bucket_size = strategy.reduce_bucket_size
    if bucket_size is None:
        bucket_size = run.config.get_text_config().hidden_size ** 2
    bucket = size * bucket_size
    # reducing a bucket copies it
    transient = {"reduction": size * min(bucket_size, trained)}
    host: dict[str, float] = {}
    if strategy.zero_stage == 3:
        kept = {"parameters": size * (shape.total / processes + shape.persistent), "gradients": gradients}
        kept["buckets"] = bucket
        live = min(shape.total, strategy.max_live_parameters)
        # the fused head gathers its own weight where it is not among the live parameters
        head = shape.head if shape.total > strategy.max_live_parameters else 0
        transient["gathered parameters"] = size * (live + head)
        group = min(share, SUB_GROUP_SIZE)
        step = {"gradients in float32": (size + 4) * group}
    else:
        kept = {"parameters": size * shape.total}
        transient["buckets"] = bucket
        transient["gradients"] = gradients if strategy.zero_stage == 2 else size * trained
        step = {"gradients": transient["gradients"], "gradients in float32": (size + 4) * share}
    if strategy.offload_optimizer:
        # float32 gradients stay with the master weights there
        host["optimizer"] = (optimizer + 4 * share) * per_host
        host["gradients"] = gradients * per_host
        kept.pop("gradients", None)
        transient.pop("gradients", None)
        step = {}
    else:
        kept["optimizer"] = optimizer
    if strategy.offload_param:
        host["parameters"] = kept["parameters"] * per_host
        kept["parameters"] = size * shape.persistent
    return kept, step, transient, host


def _fsdp_state(
    run: Run, strategy: Strategy, shape: ModelShape
) -> tuple[dict[str, float], dict[str, float], dict[str, float], dict[str, float]]:
    """As `_training_state`, for FSDP2 as accelerate sets it up."""
    size = 2 if run.bf16 else run.dtype.itemsize
    trained_size = 4 if run.bf16 else run.dtype.itemsize
    share = shape.trained / run.gpus
    kept = {
        "parameters": trained_size * share + run.dtype.itemsize * (shape.total - shape.trained) / run.gpus,
        "optimizer": _optimizer_bytes(run.optimizer, trained_size) * share,
    }
    gradients = {"gradients": trained_size * share}
    # one block is gathered while another, or the head, computes and its gradients are reduced
    largest = max(shape.block, shape.head)
    transient = {
        "gathered parameters": size * (shape.block + largest),
        "reduction": size * min(shape.trained, largest),
    }
    if strategy.offload_param:
        per_host = run.gpus / run.nodes
        host = {name: value * per_host for name, value in {**kept, **gradients}.items()}
        return {}, {}, transient, host
    return kept, gradients, {**transient, **gradients}, {}


def _optimizer_bytes(optimizer: str, size: int) -> float:
    return 2.0 if optimizer in EIGHT_BIT_OPTIMIZERS else OPTIMIZER_STATES[optimizer] * size


def largest_micro_batch(run: Run, strategy: Strategy, step: int = 128) -> int:
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
