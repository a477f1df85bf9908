"""What the tests of rollouts share."""

import signal
from functools import partial

import pytest
from one_by_one import play_one_by_one
from scripted_trainer import make_scripted_trainer


@pytest.fixture
def make_trainer(tmp_path):
    return partial(make_scripted_trainer, tmp_path)


@pytest.fixture(params=["lock step", "free"])
def both_schedules(request, monkeypatch):
    """Tests that use it run twice: with episodes in lock step, and with episodes that go on by themselves."""
    if request.param == "free":
        play_one_by_one(monkeypatch)
    return request.param


@pytest.fixture
def interruptible():
    """Ctrl-C raises `KeyboardInterrupt`, which it does not in a background job."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
