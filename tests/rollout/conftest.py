"""What the tests of rollouts share."""

from functools import partial

import pytest
from scripted_trainer import make_scripted_trainer


@pytest.fixture
def make_trainer(tmp_path):
    return partial(make_scripted_trainer, tmp_path)
