"""Forward passes without anything random, in the mode that a model is in."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


# what models name the strengths of what is random in training
_NAMES = ("drop", "jitter", "noise")


@contextmanager
def without_noise(model: nn.Module) -> Iterator[None]:
    """
    Set every dropout and noise of a model to 0 for a while.

    `model.eval()` would do more than that: quantized layers may repack their weights for inference when they run
    outside training (bitsandbytes on CPUs does, for good), and then have no gradient any more.

    Args:
        model (`torch.nn.Module`):
            The model. Rates are numbers that a module or its config keeps under a name with `drop`, `jitter` or
            `noise` in it, and the `p` of PyTorch's own dropout.
    """
    owners = {id(owner): owner for module in model.modules() for owner in (module, getattr(module, "config", None))}
    changed: list[tuple[dict, str, float]] = []
    for owner in owners.values():
        attributes = getattr(owner, "__dict__", {})
        for name, value in attributes.items():
            named = f"{type(owner).__name__.lower()}.p" if name == "p" else name
            if any(part in named for part in _NAMES) and isinstance(value, float) and value != 0.0:
                changed.append((attributes, name, value))
    for attributes, name, _ in changed:
        attributes[name] = 0.0
    try:
        yield
    finally:
        for attributes, name, value in changed:
            attributes[name] = value
