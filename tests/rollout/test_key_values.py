"""Keys and values are handed to a model under the name that it has for them."""

import warnings

import numpy as np
import torch
from byte_tokenizer import byte_tokenizer, tiny_model
from torch import nn

from seeupo_trl.rollout.key_values import CachedSequence, cache_argument, compute


class Renamed(nn.Module):
    def forward(self, input_ids, cache=None):
        return input_ids


class Old(nn.Module):
    def forward(self, input_ids, past_key_values=None):
        return input_ids


def test_argument_is_the_models_own():
    assert cache_argument(Renamed()) == "cache"
    assert cache_argument(Old()) == "past_key_values"


def test_installed_transformers_warns_of_no_old_name():
    model = tiny_model(byte_tokenizer("qwen2_5"))
    sequence = CachedSequence(np.array([1, 2, 3]))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", FutureWarning)
        compute(model, [sequence], torch.device("cpu"))
    assert sequence.layers[0][0].shape[-2] == 3
