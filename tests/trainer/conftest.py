"""What the tests of the trainer share."""

from functools import partial

import pytest
from grpo_script import config, small_tokens, text_dataset
from trl import GRPOConfig

from seeupo_trl import SeeUPOTrainer


@pytest.fixture
def make_of(tiny_dir, tmp_path):
    """
    Build a trainer of a given class with settings like those of a short GRPO script; keywords of the config are given
    in `args`.
    """

    def build(trainer_class, args=None, **kwargs):
        given = {"model": tiny_dir, "reward_funcs": small_tokens, "train_dataset": text_dataset(), **kwargs}
        return trainer_class(args=args if isinstance(args, GRPOConfig) else config(tmp_path, **(args or {})), **given)

    return build


@pytest.fixture
def make(make_of):
    """The same for [`SeeUPOTrainer`]."""
    return partial(make_of, SeeUPOTrainer)
