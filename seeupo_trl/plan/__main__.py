"""
What a run needs in memory before it is started: `python -m seeupo_trl.plan`.

The plan of a recipe, from its own files:

    python -m seeupo_trl.plan --config examples/configs/qwen3_14b_bfcl.yaml \\
        --accelerate-config examples/accelerate_configs/zero3.yaml --gpu-memory 80GiB --host-memory 1TiB

or by hand, for all strategies:

    python -m seeupo_trl.plan --model Qwen/Qwen3-14B --gpus 8 --gpu-memory 80GiB

No weights are loaded and no GPU is needed. `--model` is a name on the Hub, or a directory or `config.json` (which
works offline); `--shape` describes a Qwen3-like model by hand. Estimates are for GPUs; `memory_model.py` says what
they rest on.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.commands.estimate import estimate_training_usage
from transformers import AutoConfig, PreTrainedConfig, Qwen3Config

from .memory import Estimate, estimate, largest_micro_batch
from .run import GIB, ModelShape, Run, Strategy, model_shape


_UNITS = {"": 1, "B": 1, **{f"{prefix}iB": 2**power for prefix, power in zip("KMGT", (10, 20, 30, 40), strict=True)}}
_UNITS |= {f"{prefix}B": 10**power for prefix, power in zip("KMGT", (3, 6, 9, 12), strict=True)}

_SHAPE_FIELDS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocabulary": "vocab_size",
}

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parse_bytes(text: str) -> int:
    """
    Number of bytes of a size such as `"80GiB"`, `"80GB"` or `"24.5 GiB"`.

    Raises:
        `ValueError`:
            When it is not one.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?i?B?)\s*", text)
    if match is None or match[2] not in _UNITS or match[1].count(".") > 1:
        raise ValueError(f"{text!r} is not a size; write it as 80GiB, 80GB or a number of bytes.")
    return int(float(match[1]) * _UNITS[match[2]])


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def load_config(model: str | None, shape: str | None) -> PreTrainedConfig:
    """
    Config of a model on the Hub, of a local directory or `config.json`, or of a shape that is described by hand.

    Args:
        model (`str`, *optional*):
            Name or path.
        shape (`str`, *optional*):
            Sizes by name, for example `"layers=40,hidden=5120,intermediate=17408,heads=40,kv_heads=8,head_dim=128,
            vocabulary=151936"`, without blanks.

    Raises:
        `ValueError`:
            When there is no such model, or the shape is incomplete.
    """
    if shape is not None:
        values = dict(part.split("=", 1) for part in shape.split(",") if "=" in part)
        if set(values) != set(_SHAPE_FIELDS) or not all(value.isdigit() for value in values.values()):
            raise ValueError(f"`--shape {shape}`: give {', '.join(f'{name}=<number>' for name in _SHAPE_FIELDS)}.")
        sizes = {_SHAPE_FIELDS[name]: int(value) for name, value in values.items()}
        return Qwen3Config(**sizes, tie_word_embeddings=False)
    if model is None:
        raise ValueError("Which model? Give `--model`, `--shape`, or a `--config` with `model_name_or_path`.")
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No config of {model!r} was found on the Hub or on this machine. Offline, pass a directory with the "
            f"model's `config.json`, or describe its shape with `--shape`. ({str(error).splitlines()[0]})"
        ) from error


def from_training_config(path: str) -> dict[str, Any]:
    """Fields of a run that a training yaml (arguments of [`SeeUPOConfig`] and of a model) fixes."""
    values = yaml.safe_load(Path(path).read_text())
    fields: dict[str, Any] = {"model": values.get("model_name_or_path")}
    batch_size = values.get("per_device_train_batch_size", 8)
    steps = values.get("steps_per_generation") or values.get("gradient_accumulation_steps", 1)
    fields["completions"] = batch_size * steps
    if values.get("max_context_length"):
        fields["max_context"] = values["max_context_length"]
        fields["tokens"] = batch_size * values["max_context_length"]
    if values.get("max_tokens_per_microbatch"):
        fields["tokens"] = values["max_tokens_per_microbatch"]
    if values.get("packing") == "rows":
        fields["rows"] = batch_size
    # TRL loads models in float32 unless told otherwise
    fields["dtype"] = values.get("dtype") or (values.get("model_init_kwargs") or {}).get("dtype") or "float32"
    fields["bf16"] = bool(values.get("bf16", not values.get("fp16", False)))
    fields["gradient_checkpointing"] = values.get("gradient_checkpointing", True)
    fields["optimizer"] = values.get("optim", "adamw_torch_fused")
    fields["reference"] = bool(values.get("beta", 0.0))
    fields["lora_rank"] = values.get("lora_r", 16) if values.get("use_peft") else None
    fields["gather_for_generation"] = values.get("ds3_gather_for_generation", True)
    if values.get("use_vllm"):
        fields["generation"] = f"vllm-{values.get('vllm_mode', 'colocate')}"
        fields["vllm_utilization"] = values.get("vllm_gpu_memory_utilization", 0.3)
        fields["vllm_tensor_parallel"] = values.get("vllm_tensor_parallel_size", 1)
        fields["vllm_sleep"] = values.get("vllm_enable_sleep_mode", False)
        fields["max_context"] = values.get("vllm_max_model_length") or fields.get("max_context", Run.max_context)
    return fields


def from_accelerate_config(path: str) -> tuple[dict[str, Any], Strategy]:
    """
    Number of GPUs and nodes, and the strategy, of a yaml of `accelerate config`.

    Raises:
        `ValueError`:
            When it asks for something that is not planned here.
    """
    values = yaml.safe_load(Path(path).read_text())
    fields = {"gpus": values.get("num_processes", 1), "nodes": values.get("num_machines", 1)}
    kind = values.get("distributed_type", "NO")
    if kind in ("NO", "MULTI_GPU"):
        return fields, Strategy()
    if kind == "FSDP":
        return fields, _fsdp_strategy(path, values.get("fsdp_config") or {})
    if kind != "DEEPSPEED":
        raise ValueError(
            f"{path}: `distributed_type: {kind}` is not planned here; NO, MULTI_GPU, DEEPSPEED and FSDP are."
        )
    options = values.get("deepspeed_config") or {}
    if "deepspeed_config_file" in options:
        zero = json.loads(Path(options["deepspeed_config_file"]).read_text()).get("zero_optimization", {})
        sizes = {"reduce_bucket_size": "reduce_bucket_size", "max_live_parameters": "stage3_max_live_parameters"}
        sizes = {name: zero[key] for name, key in sizes.items() if key in zero}
        return fields, Strategy(
            zero_stage=zero.get("stage", 0),
            offload_optimizer=_is_offloaded(path, (zero.get("offload_optimizer") or {}).get("device")),
            offload_param=_is_offloaded(path, (zero.get("offload_param") or {}).get("device")),
            **{name: None if value == "auto" else int(value) for name, value in sizes.items()},
        )
    return fields, Strategy(
        zero_stage=options.get("zero_stage", 2),
        offload_optimizer=_is_offloaded(path, options.get("offload_optimizer_device")),
        offload_param=_is_offloaded(path, options.get("offload_param_device")),
    )


def _is_offloaded(path: str, device: str | None) -> bool:
    if device not in (None, "none", "cpu"):
        raise ValueError(f"{path}: offloading to {device!r} is not planned here; 'cpu' and 'none' are.")
    return device == "cpu"


def _fsdp_strategy(path: str, options: dict[str, Any]) -> Strategy:
    if options.get("fsdp_version", 1) != 2:
        raise ValueError(f"{path}: FSDP 1 is not supported; set `fsdp_version: 2`.")
    if not options.get("fsdp_reshard_after_forward", True):
        raise ValueError(f"{path}: `fsdp_reshard_after_forward: false` is not planned here; true is.")
    return Strategy(fsdp=True, offload_param=options.get("fsdp_offload_params", False))


def all_strategies(lora_rank: int) -> list[Strategy]:
    """What a table compares."""
    return [
        Strategy(0),
        Strategy(1),
        Strategy(2),
        Strategy(2, offload_optimizer=True),
        Strategy(3),
        Strategy(3, offload_optimizer=True),
        Strategy(3, offload_optimizer=True, offload_param=True),
        Strategy(fsdp=True),
        Strategy(0, lora_rank=lora_rank),
        Strategy(3, lora_rank=lora_rank),
    ]


def plan(run: Run, strategies: Sequence[Strategy]) -> list[Estimate]:
    """Estimates of a run under several strategies, each with the largest micro-batch that fits."""
    return [replace(estimate(run, strategy), max_tokens=largest_micro_batch(run, strategy)) for strategy in strategies]


def library_estimates(shape: ModelShape, run: Run, strategy: Strategy) -> dict[str, float]:
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
    options = {"num_gpus_per_node": run.gpus // run.nodes, "num_nodes": run.nodes}
    options["cpu_offload"] = strategy.offload_optimizer
    if strategy.zero_stage == 3:
        options["cpu_offload_params"] = strategy.offload_param
        _, gpu, _ = estimate_zero3_model_states_mem_needs(shape.total, shape.largest_layer, **options)
    else:
        _, gpu = estimate_zero2_model_states_mem_needs(shape.total, **options)
    return {"DeepSpeed's estimator": gpu}


# --- Output ----------------------------------------------------------------------------------------------------------


def verdict(one: Estimate) -> str:
    """`"fits"`, or what is missing, in a few words."""
    if one.fits:
        return "fits"
    if one.problems:
        return "cannot start (see below)"
    if one.peak > one.limit:
        phase = max(one.peaks, key=one.peaks.get)
        return f"{phase}: {(one.peak - one.limit) / GIB:.1f} GiB too much"
    return f"host: {(one.host_peak - one.host_memory) / GIB:.0f} GiB too much"


def _states(one: Estimate) -> dict[str, float]:
    """Bytes of the training state; gradients may be there in the update only."""
    kept = {**one.update, **one.kept}
    return {name: kept.get(name, 0) for name in ("parameters", "gradients", "optimizer")}


def table(run: Run, estimates: Sequence[Estimate]) -> str:
    """One line a strategy, in GiB per GPU (per host in the last columns)."""
    header = ["strategy", "parameters", "gradients", "optimizer", "other", "update", "step", "rollout", "peak"]
    header += ["host", "verdict", "largest micro-batch"]
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * 9 + "---|---:|"]
    for one in estimates:
        named = _states(one)
        other = sum(value for name, value in one.kept.items() if name not in named)
        phases = [sum(parts.values()) for parts in (one.update, one.step, one.rollout)]
        sizes = [f"{value / GIB:.1f}" for value in (*named.values(), other, *phases, one.peak)]
        tokens = "none" if not one.max_tokens else f"{one.max_tokens:,} tokens"
        cells = [one.strategy.name, *sizes, f"{one.host_peak / GIB:.0f}", verdict(one), tokens]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def details(run: Run, one: Estimate) -> str:
    """What one estimate consists of, and how the libraries' own estimators differ from it."""
    sections = {
        "kept, per GPU": one.kept,
        "update, per GPU": one.update,
        "optimizer step, per GPU": one.step,
        "rollout, per GPU": one.rollout,
        "kept, per host": one.host,
    }
    lines = [one.strategy.name]
    for section, parts in sections.items():
        if parts:
            sizes = ", ".join(f"{name} {value / GIB:.2f}" for name, value in parts.items() if value)
            lines.append(f"  {section}: {sizes}")
    lines.append(f"  loading the model, per host: {one.loading / GIB:.1f}")
    if one.strategy.lora_rank is None:
        states = sum(_states(one).values())
        shape = model_shape(run.config)
        for name, value in library_estimates(shape, run, one.strategy).items():
            lines.append(f"  {name}: {value / GIB:.1f} where this plan has {states / GIB:.1f} ({_difference(one)})")
    lines += [f"  problem: {problem}" for problem in one.problems] + [f"  note: {note}" for note in one.notes]
    return "\n".join(lines)


def _difference(one: Estimate) -> str:
    stage = one.strategy.zero_stage
    if stage == 0:
        return "it assumes float32 parameters and adds bfloat16 gradients; it does not know DDP's buckets"
    if one.strategy.offload_optimizer:
        return "it counts no buckets and no gathered parameters; here they are listed apart"
    if stage == 3:
        return (
            "it counts float32 gradients all the time, which exist during the step only, and the largest layer; "
            "buckets and gathered parameters, which it leaves out, are listed apart here"
        )
    return "it counts float32 gradients all the time, which exist during the step only, and no buckets"


def as_json(run: Run, estimates: Sequence[Estimate]) -> str:
    rows = []
    for one in estimates:
        phases = {"peaks": one.peaks, "peak": one.peak, "fits": one.fits, "verdict": verdict(one)}
        rows.append({**asdict(one), "strategy": one.strategy.name, **phases, "host_peak": one.host_peak})
    shape = asdict(model_shape(run.config))
    return json.dumps({"model": shape, "tokens": run.tokens, "strategies": rows}, indent=2)


# --- Command line ----------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m seeupo_trl.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_argument_group("what is trained")
    source.add_argument("--config", help="training yaml, as for the examples; flags override it")
    source.add_argument("--accelerate-config", help="yaml of `accelerate config`: GPUs, nodes and strategy")
    source.add_argument("--model", help="name on the Hub, directory, or config.json")
    source.add_argument("--shape", help=f"shape by hand: {','.join(f'{name}=N' for name in _SHAPE_FIELDS)}")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--gpus", type=int, help="GPUs over all nodes (default: 8)")
    machine.add_argument("--gpu-memory", type=_size, default=80 * GIB, metavar="SIZE", help="default: 80GiB")
    machine.add_argument("--nodes", type=int)
    machine.add_argument("--host-memory", type=_size, metavar="SIZE", help="of one host; not checked by default")
    machine.add_argument("--reserve", type=_size, metavar="SIZE", help="of a GPU, for what is no tensor (2GiB)")
    strategy = parser.add_argument_group("strategy (default: a table of all)")
    strategy.add_argument("--zero-stage", type=int, choices=(0, 1, 2, 3), help="0 is DDP")
    strategy.add_argument("--fsdp2", action="store_true")
    strategy.add_argument("--offload-optimizer", action="store_true")
    strategy.add_argument("--offload-param", action="store_true")
    strategy.add_argument("--lora-rank", type=int)
    run = parser.add_argument_group("run")
    run.add_argument("--dtype", choices=_DTYPES, help="in which the model is loaded")
    run.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=None, help="mixed precision")
    run.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=None)
    run.add_argument("--optimizer", help="as `optim` of the training arguments")
    run.add_argument("--tokens", type=int, help="of the largest micro-batch (default: `max_tokens_per_microbatch`)")
    run.add_argument("--rows", type=int, help="rows that these are in, for `packing: rows`")
    run.add_argument("--prompt", type=int)
    run.add_argument("--action", type=int)
    run.add_argument("--observation", type=int)
    run.add_argument("--max-context", type=int)
    run.add_argument("--completions", type=int, help="episodes of a GPU, for transformers' key-value cache")
    run.add_argument("--reference", action=argparse.BooleanOptionalAction, default=None, help="`beta` is not 0")
    run.add_argument("--generation", choices=("transformers", "vllm-colocate", "vllm-server"))
    run.add_argument("--vllm-utilization", type=float)
    run.add_argument("--vllm-tensor-parallel", type=int)
    run.add_argument("--vllm-sleep", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--json", action="store_true", help="print everything as json, in bytes")
    return parser


def run_from_arguments(args: argparse.Namespace) -> tuple[Run, list[Strategy]]:
    """
    The run and the strategies that a command line asks for.

    Raises:
        `ValueError`:
            When something is missing or contradictory.
    """
    if (args.offload_optimizer or args.offload_param) and args.zero_stage is None and not args.fsdp2:
        raise ValueError("What can be offloaded depends on the strategy: give `--zero-stage` or `--fsdp2` with it.")
    fields: dict[str, Any] = {"gpus": 8, "dtype": "bfloat16"}
    strategies: list[Strategy] | None = None
    if args.accelerate_config:
        machine, strategy = from_accelerate_config(args.accelerate_config)
        fields |= machine
        strategies = [strategy]
    if args.config:
        fields |= from_training_config(args.config)
    names = set(Run.__dataclass_fields__) | {"model", "lora_rank"}
    fields |= {name: value for name, value in vars(args).items() if name in names - {"config"} and value is not None}
    lora_rank = fields.pop("lora_rank", None)
    config = load_config(fields.pop("model", None) if args.shape is None else None, args.shape)
    fields.pop("model", None)
    if fields["dtype"] == "auto":
        fields["dtype"] = str(config.dtype or torch.float32).removeprefix("torch.")
    if fields["dtype"] not in _DTYPES:
        raise ValueError(f"`dtype: {fields['dtype']}` is not planned here; {', '.join(_DTYPES)} and auto are.")
    fields["dtype"] = _DTYPES[fields["dtype"]]
    if args.zero_stage is not None or args.fsdp2:
        options = {"offload_optimizer": args.offload_optimizer, "offload_param": args.offload_param}
        strategies = [Strategy(args.zero_stage or 0, fsdp=args.fsdp2, **options, lora_rank=lora_rank)]
    elif strategies is not None:
        strategies = [replace(strategy, lora_rank=lora_rank) for strategy in strategies]
    else:
        strategies = all_strategies(lora_rank or 16)
    return Run(config=config, **fields), strategies


def main(arguments: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(arguments)
    try:
        # libraries greet on the standard output when they are imported
        with redirect_stdout(sys.stderr):
            run, strategies = run_from_arguments(args)
            estimates = plan(run, strategies)
    except (ValueError, ImportError, FileNotFoundError) as error:
        parser.error(str(error))
    if args.json:
        print(as_json(run, estimates))
        return
    shape = model_shape(run.config)
    print(
        f"{shape.total / 1e9:.2f}B parameters on {run.gpus} GPUs of {run.gpu_memory / GIB:.0f} GiB "
        f"({run.reserve / GIB:.0f} GiB of them not for tensors) in {run.nodes} node(s); micro-batches of at most "
        f"{run.tokens:,} tokens, {run.scored(run.tokens):,} of them scored. GiB per GPU; host: per node.\n"
    )
    print(table(run, estimates) + "\n")
    for one in estimates:
        print(details(run, one) + "\n")


if __name__ == "__main__":
    sys.exit(main())
