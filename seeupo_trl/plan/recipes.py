"""What a recipe says of a run: its training config, its launcher's file, its model, and sizes written as text."""

import json
import re
from argparse import ArgumentTypeError
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, Qwen3Config
from transformers.hf_argparser import string_to_bool

from .run import Strategy
from .settings_file import read_settings


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
        if set(values) != set(SHAPE_FIELDS) or not all(
            re.fullmatch("0*[1-9][0-9]*", value) for value in values.values()
        ):
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


def from_training_config(path: str, gpus: int) -> dict[str, Any]:
    """
    Fields of a run that a training yaml (arguments of [`SeeUPOConfig`] and of a model) fixes.

    Args:
        path (`str`):
            The yaml file.
        gpus (`int`):
            Number of GPUs that share a generation batch.

    Raises:
        `ValueError`:
            When the file cannot be read, or a value cannot be.
    """
    # what is set to nothing is not set
    values = {name: value for name, value in read_settings(path).items() if value is not None}

    def number(name: str, default: float, kind: type = int) -> Any:
        try:
            return kind(values.get(name, default))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: `{name}: {values[name]}` is no number.") from error

    def flag(name: str, default: bool) -> bool:
        try:
            return string_to_bool(values.get(name, default))
        except (ArgumentTypeError, AttributeError) as error:
            raise ValueError(f"{path}: `{name}: {values[name]}` is neither true nor false.") from error

    fields: dict[str, Any] = {"model": values.get("model_name_or_path")}
    batch_size = number("per_device_train_batch_size", 8)
    if "generation_batch_size" in values:
        fields["completions"] = -(-number("generation_batch_size", 0) // gpus)
    else:
        steps = number("steps_per_generation", number("gradient_accumulation_steps", 1))
        fields["completions"] = batch_size * steps
    if "max_context_length" in values:
        fields["max_context"] = number("max_context_length", 0)
        fields["tokens"] = batch_size * fields["max_context"]
    if "max_tokens_per_microbatch" in values:
        fields["tokens"] = number("max_tokens_per_microbatch", 0)
    if values.get("packing") == "rows":
        fields["rows"] = batch_size
    # TRL loads models in float32 unless told otherwise
    fields["dtype"] = values.get("dtype") or _mapping(path, values, "model_init_kwargs").get("dtype") or "float32"
    fields["bf16"] = flag("bf16", not flag("fp16", False))
    fields["gradient_checkpointing"] = flag("gradient_checkpointing", True)
    fields["optimizer"] = values.get("optim", "adamw_torch_fused")
    fields["reference"] = bool(number("beta", 0.0, float))
    fields["lora_rank"] = number("lora_r", 16) if flag("use_peft", False) else None
    fields["gather_for_generation"] = flag("ds3_gather_for_generation", True)
    if flag("use_vllm", False):
        fields["generation"] = f"vllm-{values.get('vllm_mode', 'colocate')}"
        fields["vllm_utilization"] = number("vllm_gpu_memory_utilization", 0.3, float)
        fields["vllm_tensor_parallel"] = number("vllm_tensor_parallel_size", 1)
        fields["vllm_sleep"] = flag("vllm_enable_sleep_mode", False)
        if "vllm_max_model_length" in values:
            fields["max_context"] = number("vllm_max_model_length", 0)
    return fields


def _mapping(path: str, values: dict[str, Any], name: str) -> dict[str, Any]:
    """A mapping inside a file, which may also be written as the text of a JSON object; empty where there is none."""
    value = values.get(name) or {}
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: `{name}` is a text that is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: `{name}` must be a mapping; got {value!r}.")
    return value


def from_accelerate_config(path: str) -> tuple[dict[str, Any], Strategy]:
    """
    Number of GPUs and nodes, and the strategy, of a yaml of `accelerate config`.

    Raises:
        `ValueError`:
            When it asks for something that is not planned here.
    """
    values = read_settings(path)
    fields = {"gpus": values.get("num_processes") or 1, "nodes": values.get("num_machines") or 1}
    for name, value in fields.items():
        if not isinstance(value, int):
            raise ValueError(f"{path}: the number of {name} must be a whole number; got {value!r}.")
    kind = values.get("distributed_type", "NO")
    if kind in ("NO", "MULTI_GPU"):
        return fields, Strategy()
    if kind == "FSDP":
        return fields, _fsdp_strategy(path, _mapping(path, values, "fsdp_config"))
    if kind != "DEEPSPEED":
        raise ValueError(
            f"{path}: `distributed_type: {kind}` is not planned here; NO, MULTI_GPU, DEEPSPEED and FSDP are."
        )
    options = _mapping(path, values, "deepspeed_config")
    if "deepspeed_config_file" in options:
        path = options["deepspeed_config_file"]
        zero = _mapping(path, read_settings(path, json.loads), "zero_optimization")
        sizes = {"reduce_bucket_size": "reduce_bucket_size", "max_live_parameters": "stage3_max_live_parameters"}
        sizes = {name: zero[key] for name, key in sizes.items() if key in zero}
        return fields, Strategy(
            zero_stage=zero.get("stage", 0),
            offload_optimizer=_is_offloaded(path, _mapping(path, zero, "offload_optimizer").get("device")),
            offload_param=_is_offloaded(path, _mapping(path, zero, "offload_param").get("device")),
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
