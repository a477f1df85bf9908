"""
The training state: parameters, gradients, optimizer state, and what moves them between processes.

Sizes are counted from what accelerate 1.15 and DeepSpeed 0.19 allocate (measured with two processes, see
`tests/plan/test_plan.py`), not from a rule of thumb:

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

from dataclasses import dataclass, field

from .run import EIGHT_BIT_OPTIMIZERS, OPTIMIZER_STATES, ModelShape, PlannedRun, Strategy


FLOAT32 = 4
# DeepSpeed's default
SUB_GROUP_SIZE = 1_000_000_000


@dataclass
class TrainingState:
    """
    Bytes of the training state by what they are for, where they are and when.

    Args:
        kept (`dict[str, float]`):
            What is in a GPU's memory all the time.
        update (`dict[str, float]`):
            What the forward and backward pass of a micro-batch takes beside that.
        step (`dict[str, float]`):
            What an optimizer step takes beside what is kept.
        host (`dict[str, float]`, *optional*, defaults to `{}`):
            What is in a host's memory.
    """

    kept: dict[str, float]
    update: dict[str, float]
    step: dict[str, float]
    host: dict[str, float] = field(default_factory=dict)


def training_state(run: PlannedRun, strategy: Strategy, shape: ModelShape) -> TrainingState:
    """
    Training state of a run under a strategy, with the reference model.

    Args:
        run ([`~seeupo_trl.plan.run.PlannedRun`]):
            What is trained, on what.
        strategy ([`~seeupo_trl.plan.run.Strategy`]):
            How it is distributed.
        shape ([`~seeupo_trl.plan.run.ModelShape`]):
            Of the model with the strategy's adapters.

    Returns:
        [`TrainingState`]
    """
    if strategy.is_ddp:
        state = _ddp_state(run, strategy, shape)
    elif strategy.fsdp:
        state = _fsdp_state(run, strategy, shape)
    else:
        state = _zero_3_state(run, strategy, shape) if strategy.zero_stage == 3 else _zero_state(run, strategy, shape)
        if strategy.offload_optimizer:
            _offload_optimizer(state, run, strategy, shape)
        if strategy.offload_param:
            size = run.compute_dtype(strategy).itemsize
            state.host["parameters"] = state.kept["parameters"] * run.gpus_per_node
            state.kept["parameters"] = size * shape.persistent
    if run.reference and strategy.lora_rank is None:
        reference = _reference_model(run, strategy, shape)
        if strategy.offload_param:
            state.host["reference model"] = reference * run.gpus_per_node
        else:
            state.kept["reference model"] = reference
    return state


def _ddp_state(run: PlannedRun, strategy: Strategy, shape: ModelShape) -> TrainingState:
    size = run.dtype.itemsize
    trained_size = size if strategy.lora_rank is None else FLOAT32  # PEFT casts adapters to float32
    kept = {
        "parameters": size * (shape.total - shape.trained) + trained_size * shape.trained,
        "optimizer": _optimizer_bytes(run.optimizer, trained_size) * shape.trained,
    }
    if run.gpus > 1:
        kept["buckets"] = trained_size * shape.trained
    # they are there from the first micro-batch to the step
    gradients = {"gradients": trained_size * shape.trained}
    return TrainingState(kept, update=gradients, step=gradients)


def _zero_state(run: PlannedRun, strategy: Strategy, shape: ModelShape) -> TrainingState:
    """ZeRO's stages 1 and 2, which partition the optimizer's state; stage 2 frees the gradients of others."""
    size = run.compute_dtype(strategy).itemsize
    share = shape.trained / run.gpus
    gradients = size * (share if strategy.zero_stage == 2 else shape.trained)
    bucket = _bucket_elements(run, strategy)
    return TrainingState(
        kept={"parameters": size * shape.total, "optimizer": _zero_optimizer_bytes(run) * share},
        update={"reduction": size * min(bucket, shape.trained), "buckets": size * bucket, "gradients": gradients},
        step={"gradients": gradients, "gradients in float32": (size + FLOAT32) * share},
    )


def _zero_3_state(run: PlannedRun, strategy: Strategy, shape: ModelShape) -> TrainingState:
    """ZeRO's stage 3, which partitions everything and gathers parameters when they are needed."""
    size = run.compute_dtype(strategy).itemsize
    share = shape.trained / run.gpus
    bucket = _bucket_elements(run, strategy)
    live = min(shape.total, strategy.max_live_parameters)
    # the fused head gathers its own weight where it is not among the live parameters
    head = shape.head if shape.total > strategy.max_live_parameters else 0
    return TrainingState(
        kept={
            "parameters": size * (shape.total / run.gpus + shape.persistent),
            "gradients": size * share,
            "buckets": size * bucket,
            "optimizer": _zero_optimizer_bytes(run) * share,
        },
        update={"reduction": size * min(bucket, shape.trained), "gathered parameters": size * (live + head)},
        step={"gradients in float32": (size + FLOAT32) * min(share, SUB_GROUP_SIZE)},
    )


def _offload_optimizer(state: TrainingState, run: PlannedRun, strategy: Strategy, shape: ModelShape) -> None:
    """Move what ZeRO steps with to the hosts, where gradients in float32 stay with the master weights."""
    share = shape.trained / run.gpus
    size = run.compute_dtype(strategy).itemsize
    state.host["optimizer"] = (state.kept.pop("optimizer") + FLOAT32 * share) * run.gpus_per_node
    state.host["gradients"] = size * share * run.gpus_per_node
    for parts in (state.kept, state.update):
        parts.pop("gradients", None)
    state.step = {}


def _fsdp_state(run: PlannedRun, strategy: Strategy, shape: ModelShape) -> TrainingState:
    """FSDP2 as accelerate sets it up."""
    size = run.compute_dtype(strategy).itemsize
    trained_size = FLOAT32 if run.bf16 else run.dtype.itemsize
    share = shape.trained / run.gpus
    kept = {
        "parameters": trained_size * share + run.dtype.itemsize * (shape.total - shape.trained) / run.gpus,
        "optimizer": _optimizer_bytes(run.optimizer, trained_size) * share,
    }
    gradients = {"gradients": trained_size * share}
    # one block is gathered while another, or the head, computes and its gradients are reduced
    largest = max(shape.block, shape.head)
    moved = {
        "gathered parameters": size * (shape.block + largest),
        "reduction": size * min(shape.trained, largest),
    }
    if strategy.offload_param:
        host = {name: value * run.gpus_per_node for name, value in {**kept, **gradients}.items()}
        return TrainingState(kept={}, update=moved, step={}, host=host)
    return TrainingState(kept, update={**moved, **gradients}, step=gradients)


def _reference_model(run: PlannedRun, strategy: Strategy, shape: ModelShape) -> float:
    """Bytes of a process for the reference model, which DeepSpeed casts and FSDP2 does not."""
    dtype = run.dtype if strategy.fsdp else run.compute_dtype(strategy)
    return dtype.itemsize * shape.total / (run.gpus if strategy.is_sharded else 1)


def _bucket_elements(run: PlannedRun, strategy: Strategy) -> int:
    """Elements of a bucket of ZeRO's. Reducing one copies it."""
    if strategy.reduce_bucket_size is not None:
        return strategy.reduce_bucket_size
    return run.config.get_text_config().hidden_size ** 2


def _optimizer_bytes(optimizer: str, size: int) -> float:
    """Bytes of optimizer state for one trained parameter of a size."""
    return 2.0 if optimizer in EIGHT_BIT_OPTIMIZERS else OPTIMIZER_STATES[optimizer] * size


def _zero_optimizer_bytes(run: PlannedRun) -> float:
    """Bytes for one trained parameter of the optimizer state that ZeRO partitions: master weight and moments."""
    return FLOAT32 + _optimizer_bytes(run.optimizer, FLOAT32)
