"""Tests that run on a card, and on a CPU as well where the same body means something there."""

import pytest
import torch


NUM_CARDS = torch.cuda.device_count() if torch.cuda.is_available() else 0
CARD = (
    pytest.mark.cuda,
    pytest.mark.skipif(NUM_CARDS == 0, reason="needs an NVIDIA GPU, and PyTorch sees none"),
)
TWO_CARDS = (
    pytest.mark.cuda,
    pytest.mark.skipif(NUM_CARDS < 2, reason=f"needs two NVIDIA GPUs, and PyTorch sees {NUM_CARDS}"),
)
# the first runs everywhere
EVERYWHERE = ["cpu", pytest.param("cuda", marks=CARD)]


def on_a_card(test):
    """Mark a test that needs a card."""
    for mark in CARD:
        test = mark(test)
    return test


def arguments_for(device: str) -> dict:
    """Arguments of a run on a device, over those of `tiny.ON_CPU`."""
    return {"use_cpu": device == "cpu"}
