"""An OpenEnv client as the environment, with its server in a process of its own; runs where OpenEnv is installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ON_CPU
from tool_calls import only, save_calling_model

from seeupo_trl import SeeUPOConfig


pytest.importorskip("openenv", reason="pip install openenv-core")

EXAMPLES = Path(__file__).parents[2] / "examples"
CALLS = ['<tool_call> {"name": "guess", "arguments": {"number": ' + f"{n}}}}} </tool_call>" for n in range(1, 9)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model whose vocabulary has each guess as one token, as a number and as a call."""
    return save_calling_model(tmp_path_factory.mktemp("guesser"), CALLS)


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLES))
    try:
        import train_openenv
    finally:
        sys.path.remove(str(EXAMPLES))
    return train_openenv


@pytest.fixture(scope="module")
def url(example):
    with example.server() as url:
        yield url


@pytest.fixture
def args(model, tmp_path):
    def args(words, **overrides):
        settings = {
            **ON_CPU,
            "output_dir": str(tmp_path),
            "max_steps": 2,
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 100,
            "generation_kwargs": only(*words, calls=CALLS),
        }
        return SeeUPOConfig(**{**settings, **overrides})

    return args


@pytest.mark.parametrize("interface", ["messages", "tools"])
def test_episodes_are_played_by_the_server(example, url, model, args, interface):
    words = CALLS if interface == "tools" else [str(number) for number in range(1, 9)]
    trainer = example.train(url, interface, model, args(words))
    logs = trainer.state.log_history[:2]
    assert all(entry["stop_reason/env_error"] == entry["stop_reason/env_timeout"] == 0 for entry in logs)
    assert max(entry["turns/max"] for entry in logs) > 1
    assert max(entry["reward"] for entry in logs) > 0


@pytest.mark.slow
def test_the_example_runs_from_the_command_line(model, tmp_path):
    command = [sys.executable, str(EXAMPLES / "train_openenv.py"), "--max_steps", "1", "--output_dir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, "--model_name_or_path", model], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "train_runtime" in done.stdout + done.stderr
