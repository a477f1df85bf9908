"""The language model in what a trainer holds."""

from accelerate.utils import is_peft_model
from torch import nn


def causal_lm_of(model: nn.Module) -> nn.Module:
    """The causal language model itself: the one in a model with adapters, else the model."""
    return model.get_base_model() if is_peft_model(model) else model
