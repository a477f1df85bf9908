"""Settings every test runs under, and the tiny model directory they share."""

import os
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
