"""
What a run needs in memory, per GPU and per host: pure estimates, from the shape of a model and the way it is trained.

Sizes of what is kept are counted from what accelerate 1.15 and DeepSpeed 0.19 allocate (measured with two processes,
see `tests/test_plan.py`), not from a rule of thumb:

- Without DeepSpeed, parameters, gradients and Adam's two moments have the dtype the model was loaded in; `bf16=True`
  only adds autocast. A model loaded in bfloat16 therefore has no float32 master weights. DDP keeps a second copy of
  all gradients in its buckets.
- DeepSpeed with `bf16=True` casts the model to bfloat16 whatever it was loaded in, and keeps float32 master weights
  and moments, partitioned. Gradients stay in bfloat16. Its buckets hold `reduce_bucket_size` elements.
- In an optimizer step DeepSpeed flattens a partition's gradients and copies them to float32.
- ZeRO-3 gathers up to `max_live_parameters` at a time, and TRL's fused head gathers its weight beside them.
"""

from dataclasses import dataclass, replace

import torch
from accelerate.utils import is_peft_model
from transformers import PreTrainedConfig

from .activation_memory import HEAD_TILE_TOKENS, HEAD_TILE_VOCABULARY, Pass, PassMemory, build_model, trace_pass


GIB = 2**30

# bytes of optimizer state per trained parameter, in units of the parameter's size
_OPTIMIZER_STATES = {
    "adamw_torch": 2.0,
    "adamw_torch_fused": 2.0,
    "sgd": 0.0,
}
# 8-bit moments are one byte each, whatever the parameter's size
_EIGHT_BIT_OPTIMIZERS = ("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit")

# defaults of DeepSpeed's json
SUB_GROUP_SIZE = 1_000_000_000
PERSISTENCE_THRESHOLD = 100_000


@dataclass(frozen=True)
class ModelShape:
    """
    Sizes of a model, in parameters.

    Args:
        total (`int`):
            All parameters, tied ones once.
        trained (`int`):
            Parameters that are trained: all, or those of the adapters.
        head (`int`):
            Of the language-model head.
        embedding (`int`):
            Of the input embeddings; the same parameters as the head's where they are tied.
        tied (`bool`):
            Whether head and embeddings are the same parameters.
        largest_layer (`int`):
            Parameters of the largest single module, as DeepSpeed's estimator asks for them.
        persistent (`int`):
            Parameters in tensors too small for ZeRO-3 to partition.
        kv_elements (`int`):
            Elements of the key-value cache per token.
    """

    total: int
    trained: int
    head: int
    embedding: int
    tied: bool
    largest_layer: int
    persistent: int
    kv_elements: int


# both take seconds for a large model, and a table asks for the same ones again and again
_shapes: dict[tuple[str, int | None], ModelShape] = {}
_traced: dict[tuple[str, Pass], PassMemory] = {}


def model_shape(config: PreTrainedConfig, lora_rank: int | None = None) -> ModelShape:
    """Sizes of the model of a config, with LoRA adapters of a rank where one is given. No weight is loaded."""
    key = config.to_json_string(), lora_rank
    if key not in _shapes:
        _shapes[key] = _model_shape(config, lora_rank)
    return _shapes[key]


def _model_shape(config: PreTrainedConfig, lora_rank: int | None) -> ModelShape:
    model = build_model(config, torch.bfloat16, lora_rank)
    causal_lm = model.get_base_model() if is_peft_model(model) else model
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head, embedding = causal_lm.get_output_embeddings().weight, causal_lm.get_input_embeddings().weight
    parameters = list(model.parameters())
    return ModelShape(
        total=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        head=head.numel(),
        embedding=embedding.numel(),
        tied=head is embedding,
        largest_layer=max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules()),
        persistent=sum(p.numel() for p in parameters if p.numel() < PERSISTENCE_THRESHOLD),
        kv_elements=2 * text.num_hidden_layers * kv_heads * head_dim,
    )


@dataclass(frozen=True)
class Strategy:
    """
    How the training state is distributed.

    Args:
        zero_stage (`int`, *optional*, defaults to `0`):
            DeepSpeed's ZeRO stage; 0 is DDP without DeepSpeed.
        offload_optimizer (`bool`, *optional*, defaults to `False`):
            Whether gradients' partitions and optimizer state are in the host's memory.
        offload_param (`bool`, *optional*, defaults to `False`):
            Whether parameters' partitions are in the host's memory (stage 3).
        lora_rank (`int`, *optional*):
            Rank of LoRA adapters. `None` trains all parameters.
        reduce_bucket_size, max_live_parameters (`int`, *optional*):
            As in DeepSpeed's json, with its defaults.
    """

    zero_stage: int = 0
    offload_optimizer: bool = False
    offload_param: bool = False
    lora_rank: int | None = None
    reduce_bucket_size: int = 500_000_000
    max_live_parameters: int = 1_000_000_000

    def __post_init__(self):
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"`zero_stage` must be 0 (DDP), 1, 2 or 3; got {self.zero_stage}.")
        if self.offload_param and self.zero_stage != 3:
            raise ValueError(f"Parameters can be offloaded under ZeRO-3 only, not under stage {self.zero_stage}.")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("The optimizer can be offloaded under ZeRO only; `zero_stage` is 0.")

    @property
    def name(self) -> str:
        name = f"ZeRO-{self.zero_stage}" if self.zero_stage else "DDP"
        name += " + optimizer offload" * self.offload_optimizer + " + parameter offload" * self.offload_param
        return name + (f", LoRA r={self.lora_rank}" if self.lora_rank else "")


@dataclass(frozen=True)
class Run:
    """
    What is trained, on what.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Shape of the model.
        gpus (`int`):
            Number of GPUs, over all nodes.
        gpu_memory (`int`):
            Bytes of memory of a GPU.
        nodes (`int`, *optional*, defaults to `1`):
            Number of hosts.
        host_memory (`int`, *optional*):
            Bytes of memory of a host, if it shall be checked.
        reserve (`int`, *optional*, defaults to 2 GiB):
            Bytes of a GPU that are not for tensors: CUDA context, NCCL, workspaces of kernels, fragmentation.
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`):
            In which the model is loaded.
        bf16 (`bool`, *optional*, defaults to `True`):
            Mixed precision of the run.
        optimizer (`str`, *optional*, defaults to `"adamw_torch_fused"`):
            As `optim` of the training arguments.
        gradient_checkpointing (`bool`, *optional*, defaults to `True`):
            As in the training arguments.
        tokens (`int`, *optional*, defaults to `24000`):
            Tokens of the largest micro-batch.
        rows (`int`, *optional*):
            Rows that these tokens are in; `None` is a token tree.
        prompt (`int`, *optional*, defaults to `5400`):
            Tokens of a prompt. They are not scored.
        action, observation (`int`, *optional*, default to `60` and `40`):
            Tokens of an action and of what comes between two actions: how many of a micro-batch's other tokens are
            scored.
        reference (`bool`, *optional*, defaults to `False`):
            Whether there is a reference model (`beta` other than 0). With LoRA it takes no memory.
        generation (`str`, *optional*, defaults to `"transformers"`):
            `"transformers"`, `"vllm-colocate"` or `"vllm-server"` (on other GPUs).
        completions (`int`, *optional*, defaults to `32`):
            Episodes of a GPU that transformers generates at the same time.
        max_context (`int`, *optional*, defaults to `24000`):
            Tokens of the longest context with its response.
        vllm_utilization (`float`, *optional*, defaults to `0.3`):
            Share of a GPU's memory that vLLM takes.
        vllm_tensor_parallel (`int`, *optional*, defaults to `1`):
            GPUs that share a copy of vLLM's weights.
        vllm_sleep (`bool`, *optional*, defaults to `False`):
            Whether vLLM gives its memory back during the update.
        gather_for_generation (`bool`, *optional*, defaults to `True`):
            TRL's `ds3_gather_for_generation`.
    """

    config: PreTrainedConfig
    gpus: int
    gpu_memory: int
    nodes: int = 1
    host_memory: int | None = None
    reserve: int = 2 * GIB
    dtype: torch.dtype = torch.bfloat16
    bf16: bool = True
    optimizer: str = "adamw_torch_fused"
    gradient_checkpointing: bool = True
    tokens: int = 24000
    rows: int | None = None
    prompt: int = 5400
    action: int = 60
    observation: int = 40
    reference: bool = False
    generation: str = "transformers"
    completions: int = 32
    max_context: int = 24000
    vllm_utilization: float = 0.3
    vllm_tensor_parallel: int = 1
    vllm_sleep: bool = False
    gather_for_generation: bool = True

    def __post_init__(self):
        allowed = (*_OPTIMIZER_STATES, *_EIGHT_BIT_OPTIMIZERS)
        if self.optimizer not in allowed:
            raise ValueError(
                f"The state of optimizer {self.optimizer!r} is not known; known are {', '.join(allowed)}."
            )
        if self.generation not in ("transformers", "vllm-colocate", "vllm-server"):
            raise ValueError(
                f"`generation={self.generation!r}` is not one of 'transformers', 'vllm-colocate', 'vllm-server'."
            )
        if self.gpus < 1 or self.nodes < 1 or self.gpus % self.nodes:
            raise ValueError(f"{self.gpus} GPUs cannot be spread evenly over {self.nodes} nodes.")

    def scored(self, tokens: int) -> int:
        """Positions of a micro-batch that are scored at most: the actions among what follows the prompt."""
        after_prompt = max(tokens - self.prompt, tokens // 10)
        return max(-(-after_prompt * self.action // (self.action + self.observation)), 1)


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
        pass_memory ([`~seeupo_trl.activation_memory.PassMemory`], *optional*):
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
        kept["reference model"] = size * shape.total / (processes if strategy.zero_stage == 3 else 1)
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
    if strategy.zero_stage == 0 and run.dtype == torch.bfloat16 and strategy.lora_rank is None:
        notes.append(
            "Weights are bfloat16 without a float32 copy: updates smaller than 1/256 of a weight are lost. Load in "
            "float32 (`dtype: float32`), or use ZeRO."
        )

    per_host = processes / run.nodes
    # ZeRO-3 partitions parameters as they are loaded; otherwise every process of a host holds the model once
    loading = run.dtype.itemsize * shape.total * (1 if strategy.zero_stage == 3 else per_host)
    host["checkpoint being gathered"] = size * shape.total if strategy.zero_stage == 3 else 0
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
        dtype=torch.bfloat16 if deepspeed and run.bf16 else run.dtype,
        autocast=run.bf16 and not deepspeed,
        gradient_checkpointing=run.gradient_checkpointing,
        keeps_gradients=strategy.zero_stage < 2,
        lora_rank=strategy.lora_rank,
    )


def _training_state(
    run: Run, strategy: Strategy, shape: ModelShape
) -> tuple[dict[str, float], dict[str, float], dict[str, float], dict[str, float]]:
    """What is kept, and what an optimizer step, a pass and a host take: bytes by what they are for."""
    processes, per_host = run.gpus, run.gpus / run.nodes
    trained, frozen = shape.trained, shape.total - shape.trained
    if strategy.zero_stage == 0:
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
    bucket = size * strategy.reduce_bucket_size
    # reducing a bucket copies it
    transient = {"reduction": size * min(strategy.reduce_bucket_size, trained)}
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


def _optimizer_bytes(optimizer: str, size: int) -> float:
    return 2.0 if optimizer in _EIGHT_BIT_OPTIMIZERS else _OPTIMIZER_STATES[optimizer] * size


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
