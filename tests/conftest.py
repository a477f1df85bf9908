"""Settings every test runs under, and the tiny model directory they share."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# for the scripts that tests start
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).with_name("helpers")), os.environ.get("PYTHONPATH", "")]
)

import pytest
import torch
from tiny import save_tiny_model


torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory) -> str:
    """Directory of a tiny Qwen3 model and its tokenizer, for `from_pretrained`."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def oracle_on_ragged(tiny_dir) -> Callable[..., dict[str, torch.Tensor]]:
    """Final parameters of the oracle on the ragged rollouts, for given settings."""
    from against_oracle import oracle_on_ragged

    return partial(oracle_on_ragged, tiny_dir)


@pytest.fixture(scope="session")
def tool_dir(tmp_path_factory) -> str:
    """Directory of a tiny model that makes tool calls at random."""
    from tool_calls import CALLS, save_calling_model

    return save_calling_model(tmp_path_factory.mktemp("tools"), CALLS)
