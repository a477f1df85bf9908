"""An OpenEnv client as the environment, with its server in a process of its own; runs where OpenEnv is installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_config, tiny_tokenizer
from tokenizers import AddedToken
from transformers import Qwen3ForCausalLM

from seeupo_trl import SeeUPOConfig


pytest.importorskip("openenv", reason="pip install openenv-core")

EXAMPLES = Path(__file__).parents[2] / "examples"
CALLS = ['<tool_call> {"name": "guess", "arguments": {"number": ' + f"{n}}}}} </tool_call>" for n in range(1, 9)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model whose vocabulary has each guess as one token, as a number and as a call."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in CALLS])
    tokenizer.response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor": "<|im_start|> assistant",
        "fields": {
            "tool_calls": {
                "open": "<tool_call>",
                "close_pattern": r"</tool_call>\s*",
                "repeats": True,
                "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
        },
    }
    directory = str(tmp_path_factory.mktemp("guesser"))
    Qwen3ForCausalLM(tiny_config(vocab_size=len(tokenizer), initializer_range=0.02)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


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
        vocabulary = tiny_tokenizer().get_vocab() | {text: len(tiny_tokenizer()) + i for i, text in enumerate(CALLS)}
        banned = [index for text, index in vocabulary.items() if text not in {*words, "<|im_end|>"}]
        settings = {
            "output_dir": str(tmp_path),
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            "max_steps": 2,
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 100,
            "generation_kwargs": {"suppress_tokens": banned},
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
