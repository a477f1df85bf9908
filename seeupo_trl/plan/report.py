"""How a plan is told: a table of strategies, what each of them consists of, or everything as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from accelerate.commands.estimate import estimate_training_usage

from .memory import Estimate
from .run import GIB, ModelShape, PlannedRun, Strategy, model_shape


def as_text(run: PlannedRun, estimates: Sequence[Estimate]) -> str:
    """What is planned, the table, and the details of every estimate."""
    sections = [headline(run), table(estimates), *(details(run, estimate) for estimate in estimates)]
    return "\n\n".join(sections) + "\n"


def headline(run: PlannedRun) -> str:
    """What is planned, in a sentence."""
    shape = model_shape(run.config)
    return (
        f"{shape.total / 1e9:.2f}B parameters on {run.gpus} GPUs of {run.gpu_memory / GIB:.0f} GiB "
        f"({run.reserve / GIB:.0f} GiB of them not for tensors) in {run.nodes} node(s); micro-batches of at most "
        f"{run.tokens:,} tokens, {run.scored(run.tokens):,} of them scored. GiB per GPU; host: per node."
    )


def verdict(estimate: Estimate) -> str:
    """`"fits"`, or what is missing, in a few words."""
    if estimate.fits:
        return "fits"
    if estimate.problems:
        return "cannot start (see below)"
    if estimate.peak > estimate.limit:
        phase = max(estimate.peaks, key=estimate.peaks.get)
        return f"{phase}: {(estimate.peak - estimate.limit) / GIB:.1f} GiB too much"
    return f"host: {(estimate.host_peak - estimate.host_memory) / GIB:.0f} GiB too much"


def _states(estimate: Estimate) -> dict[str, float]:
    """Bytes of the training state; gradients may be there in the update only."""
    kept = {**estimate.update, **estimate.kept}
    return {name: kept.get(name, 0) for name in ("parameters", "gradients", "optimizer")}


def table(estimates: Sequence[Estimate]) -> str:
    """One line a strategy, in GiB per GPU (per host in the last columns)."""
    header = ["strategy", "parameters", "gradients", "optimizer", "other", "update", "step", "rollout", "peak"]
    header += ["host", "verdict", "largest micro-batch"]
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * 9 + "---|---:|"]
    for estimate in estimates:
        named = _states(estimate)
        other = sum(value for name, value in estimate.kept.items() if name not in named)
        phases = [sum(parts.values()) for parts in (estimate.update, estimate.step, estimate.rollout)]
        sizes = [f"{value / GIB:.1f}" for value in (*named.values(), other, *phases, estimate.peak)]
        tokens = "none" if not estimate.max_tokens else f"{estimate.max_tokens:,} tokens"
        cells = [estimate.strategy.name, *sizes, f"{estimate.host_peak / GIB:.0f}", verdict(estimate), tokens]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def details(run: PlannedRun, estimate: Estimate) -> str:
    """What one estimate consists of, and how the libraries' own estimators differ from it."""
    sections = {
        "kept, per GPU": estimate.kept,
        "update, per GPU": estimate.update,
        "optimizer step, per GPU": estimate.step,
        "rollout, per GPU": estimate.rollout,
        "kept, per host": estimate.host,
    }
    lines = [estimate.strategy.name]
    for section, parts in sections.items():
        if parts:
            sizes = ", ".join(f"{name} {value / GIB:.2f}" for name, value in parts.items() if value)
            lines.append(f"  {section}: {sizes}")
    lines.append(f"  loading the model, per host: {estimate.loading / GIB:.1f}")
    if estimate.strategy.lora_rank is None:
        here = f"{sum(_states(estimate).values()) / GIB:.1f} ({_difference(estimate.strategy)})"
        for name, value in library_estimates(model_shape(run.config), run, estimate.strategy).items():
            lines.append(f"  {name}: {value / GIB:.1f} where this plan has {here}")
    lines += [f"  problem: {problem}" for problem in estimate.problems]
    lines += [f"  note: {note}" for note in estimate.notes]
    return "\n".join(lines)


def _difference(strategy: Strategy) -> str:
    """Why a library's estimator says something else."""
    if strategy.zero_stage == 0:
        return "it assumes float32 parameters and adds bfloat16 gradients; it does not know DDP's buckets"
    if strategy.offload_optimizer:
        return "it counts no buckets and no gathered parameters; here they are listed apart"
    if strategy.zero_stage == 3:
        return (
            "it counts float32 gradients all the time, which exist during the step only, and the largest layer; "
            "buckets and gathered parameters, which it leaves out, are listed apart here"
        )
    return "it counts float32 gradients all the time, which exist during the step only, and no buckets"


def library_estimates(shape: ModelShape, run: PlannedRun, strategy: Strategy) -> dict[str, float]:
    """
    What DeepSpeed's and accelerate's own estimators say a GPU needs for parameters, gradients and optimizer. The
    former is left out where DeepSpeed is not installed; neither knows FSDP2.
    """
    if strategy.fsdp:
        return {}
    if strategy.is_ddp:
        usage = estimate_training_usage(4 * shape.total, "bfloat16" if run.bf16 else "float32")
        return {"accelerate estimate-memory": usage["model"] + usage["gradients"] + usage["optimizer"]}
    try:
        from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
        from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
    except ImportError:
        return {}
    options = {"num_gpus_per_node": run.gpus_per_node, "num_nodes": run.nodes}
    options["cpu_offload"] = strategy.offload_optimizer
    if strategy.zero_stage == 3:
        options["cpu_offload_params"] = strategy.offload_param
        _, gpu, _ = estimate_zero3_model_states_mem_needs(shape.total, shape.largest_layer, **options)
    else:
        _, gpu = estimate_zero2_model_states_mem_needs(shape.total, **options)
    return {"DeepSpeed's estimator": gpu}


def as_json(run: PlannedRun, estimates: Sequence[Estimate]) -> str:
    """Everything, in bytes."""
    rows = []
    for estimate in estimates:
        phases = {"peaks": estimate.peaks, "peak": estimate.peak, "fits": estimate.fits, "verdict": verdict(estimate)}
        rows.append(
            {**asdict(estimate), "strategy": estimate.strategy.name, **phases, "host_peak": estimate.host_peak}
        )
    shape = asdict(model_shape(run.config))
    return json.dumps({"model": shape, "tokens": run.tokens, "strategies": rows}, indent=2)
