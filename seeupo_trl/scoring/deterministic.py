"""What is random in a model's forward passes, and passes without it, in the mode that the model is in."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


# what models name the strengths of what is random in training
_NAMES = ("drop", "jitter", "noise")


def noise_rates(owner: Any) -> dict[str, float]:
    """
    How strong what is random in training is, above 0.

    Args:
        owner (`torch.nn.Module` or `PreTrainedConfig`):
            What has numbers under a name with `drop`, `jitter` or `noise` in it, or is PyTorch's own dropout with its
            `p`. What a module contains is not looked at.

    Returns:
        `dict[str, float]`:
            By the names of the attributes.
    """
    rates = {}
    for name, value in getattr(owner, "__dict__", {}).items():
        named = f"{type(owner).__name__.lower()}.p" if name == "p" else name
        if any(part in named for part in _NAMES) and isinstance(value, float) and value != 0.0:
            rates[name] = value
    return rates


@contextmanager
def without_noise(model: nn.Module) -> Iterator[None]:
    """
    Set every dropout and noise of a model to 0 for a while.

    `model.eval()` would do more than that: quantized layers may repack their weights for inference when they run
    outside training (bitsandbytes on CPUs does, for good), and then have no gradient any more.

    Args:
        model (`torch.nn.Module`):
            The model. Its rates are those that [`noise_rates`] finds in its modules and their configs.
    """
    owners = {id(owner): owner for module in model.modules() for owner in (module, getattr(module, "config", None))}
    changed = [(owner.__dict__, name, rate) for owner in owners.values() for name, rate in noise_rates(owner).items()]
    for attributes, name, _ in changed:
        attributes[name] = 0.0
    try:
        yield
    finally:
        for attributes, name, value in changed:
            attributes[name] = value
