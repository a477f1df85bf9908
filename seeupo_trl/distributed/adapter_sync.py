"""
What vLLM is sent of a policy with adapters.

TRL (1.15 and 1.16) merges the adapters into the base weights in place and takes them out again, at every sync. In
bfloat16 neither is exact: the base drifts, and with it the reference of the KL term. Here a layer's weights are merged
in copies, one layer at a time, and the base is never written.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType, is_peft_model
from torch import nn
from torch.distributed.tensor import DTensor


if TYPE_CHECKING:
    from trl import GRPOTrainer


def sync_without_merging(trainer: "GRPOTrainer") -> None:
    """
    Have a trainer's vLLM backend read merged copies instead of merging the adapters in place. Nothing is changed
    without vLLM, without adapters, and under FSDP 1.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            A trainer that has been constructed.
    """
    accelerator = trainer.accelerator
    is_fsdp1 = accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2
    if trainer.use_vllm and is_peft_model(trainer.model) and not is_fsdp1:
        vllm = trainer.vllm_generation
        vllm._iter_named_params = partial(merged_parameters, vllm, vllm._iter_named_params)


def merged_parameters(vllm: Any, read: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """
    Parameters under vLLM's names, the adapters merged into those that they adapt.

    Args:
        vllm (`VLLMGeneration`):
            TRL's backend, whose model has adapters.
        read (`Callable`):
            Its own walk over the parameters (`_iter_named_params`), which gathers sharded ones.

    Raises:
        `RuntimeError`:
            Where the walk left out a weight that has an adapter, which vLLM would then have without it.
    """
    model = vllm.model
    adapted = _adapted_weights(vllm, model)
    current: nn.Module | None = None
    merged: dict[str, torch.Tensor] = {}
    with _left_unmerged(model):
        for name, tensor in read():
            if name not in adapted:
                yield name, tensor
                continue
            base, layers, own_name = adapted.pop(name)
            if base is not current:  # the parameters of a layer come one after another
                current, merged = base, _merged_copies(base, layers)
            copied = merged[own_name]
            yield name, (copied.full_tensor() if isinstance(copied, DTensor) else copied).to(tensor.device)
    if adapted:
        raise RuntimeError(
            f"TRL's walk over the parameters left out {sorted(adapted)[:3]}, which have adapters: vLLM would sample "
            "from another policy. Is this version of TRL supported?"
        )


def _adapted_weights(vllm: Any, model: nn.Module) -> dict[str, tuple[nn.Module, list[nn.Module], str]]:
    """vLLM's name of each weight of a layer with adapters: the layer underneath, its adapters, its own name there."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    names = {id(module): name for name, module in model.named_modules()}
    layers: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            layers.setdefault(id(module.get_base_layer()), []).append(module)
    adapted = {}
    for adapters in layers.values():
        base = adapters[0].get_base_layer()
        for own_name, _ in base.named_parameters(recurse=False):
            name = f"{names[id(base)]}.{own_name}".removeprefix("base_model.model.").replace(".base_layer", "")
            name = vllm._fix_param_name_to_vllm(name, extra_prefixes=["modules_to_save.default."])
            adapted[name] = base, adapters, own_name
    return adapted


@contextmanager
def _left_unmerged(model: nn.Module) -> Iterator[None]:
    """TRL's own merging does nothing inside the context."""
    with ExitStack() as stack:
        for name in ("merge_adapter", "unmerge_adapter"):
            setattr(model, name, lambda: None)
            stack.callback(delattr, model, name)
        yield


@torch.no_grad()
def _merged_copies(base: nn.Module, adapters: list[nn.Module]) -> dict[str, torch.Tensor]:
    """Parameters of a layer with its adapters merged by PEFT itself, in copies; the layer keeps its own ones."""
    kept = dict(base.named_parameters(recurse=False))

    def replace_by_copies(parameters: dict[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            if type(parameter) is nn.Parameter:  # quantized ones are replaced by PEFT, not written
                setattr(base, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))

    try:
        replace_by_copies(kept)
        for adapter in adapters:
            adapter.merge()
        merged = dict(base.named_parameters(recurse=False))
        replace_by_copies(merged)  # for PEFT to take the adapters out of
        for adapter in reversed(adapters):
            adapter.unmerge()
    finally:
        for name, parameter in kept.items():
            setattr(base, name, parameter)
    return {name: parameter.detach() for name, parameter in merged.items()}
