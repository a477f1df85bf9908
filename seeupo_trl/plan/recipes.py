"""What a recipe says of a run: its training config, its launcher's file, its model, and sizes written as text."""

import json
import re
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, PreTrainedConfig, Qwen3Config

from .run import Strategy


_UNITS = {"": 1, "B": 1, **{f"{prefix}iB": 2**power for prefix, power in zip("KMGT", (10, 20, 30, 40), strict=True)}}
_UNITS |= {f"{prefix}B": 10**power for prefix, power in zip("KMGT", (3, 6, 9, 12), strict=True)}

SHAPE_FIELDS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocabulary": "vocab_size",
}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
        if set(values) != set(SHAPE_FIELDS) or not all(value.isdigit() for value in values.values()):
            raise ValueError(f"`--shape {shape}`: give {', '.join(f'{name}=<number>' for name in SHAPE_FIELDS)}.")
        sizes = {SHAPE_FIELDS[name]: int(value) for name, value in values.items()}
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


def dtype_of(name: str, config: PreTrainedConfig) -> torch.dtype:
    """
    The dtype in which a model is loaded.

    Args:
        name (`str`):
            `"float32"`, `"bfloat16"`, or `"auto"` for the one that the model's config names.
        config ([`~transformers.PreTrainedConfig`]):
            Config of the model.

    Raises:
        `ValueError`:
            When it is another one.
    """
    if name == "auto":
        name = str(config.dtype or torch.float32).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"`dtype: {name}` is not planned here; {', '.join(DTYPES)} and auto are.")
    return DTYPES[name]


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
        if values.get("vllm_max_model_length"):
            fields["max_context"] = values["vllm_max_model_length"]
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
