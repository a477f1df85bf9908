"""What the code of the documentation finds when tests run it."""

import pytest
import transformers
import trl
from documentation import fill_hub_cache
from huggingface_hub import constants


@pytest.fixture(scope="session")
def hub_cache(tiny_dir, tmp_path_factory):
    cache = tmp_path_factory.mktemp("hub")
    fill_hub_cache(cache, tiny_dir)
    return cache


@pytest.fixture
def reader(hub_cache, tmp_path, monkeypatch):
    """
    A reader's machine: an empty directory, a Hub of tiny models, no GPU, and the patience for one iteration of short
    responses.
    """
    train, post_init = transformers.Trainer.train, trl.GRPOConfig.__post_init__

    def post_init_on_cpu(self):
        self.use_cpu = True
        self.max_completion_length = min(self.max_completion_length, 8)
        post_init(self)

    def train_shortly(self, *args, **kwargs):
        self.args.max_steps = 1
        return train(self, *args, **kwargs)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub_cache))
    monkeypatch.setattr(transformers.Trainer, "train", train_shortly)
    monkeypatch.setattr(trl.GRPOConfig, "__post_init__", post_init_on_cpu)
