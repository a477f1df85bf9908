"""The recipes for one GPU fit it, and the script for TextArena's games runs from end to end."""

import json
import os
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from tiny import save_tiny_model
from trl import ModelConfig, TrlParser

from seeupo_trl.plan.__main__ import main as plan
from seeupo_trl.recipes.arguments import TextArenaArguments
from seeupo_trl.recipes.training import Config
from seeupo_trl.scoring.tree_attention import flex_length


EXAMPLES = Path(__file__).parents[2] / "examples"
QWEN2_5 = {
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("configs/*_textarena.yaml")), ids=lambda path: path.stem)
def test_configuration_is_understood(path, tmp_path):
    settings = yaml.safe_load(path.read_text())
    parser = TrlParser((TextArenaArguments, Config, ModelConfig))
    script_args, args, model_args = parser.parse_args_and_config(
        ["--config", str(path), "--output_dir", str(tmp_path)]
    )
    assert json.loads(script_args.game_options) == json.loads(settings.get("game_options", "{}"))
    assert args.max_turns == settings["max_turns"]
    assert args.generation_batch_size % args.num_generations == 0
    assert script_args.train_games >= args.generation_batch_size // args.num_generations
    assert model_args.model_name_or_path == settings.get("model_name_or_path")


@pytest.mark.parametrize(
    ("recipe", "memory"),
    [
        ("qwen2.5_1.5b_bfcl", "80GiB"),
        ("qwen2.5_1.5b_bfcl_lora", "24GiB"),
        ("qwen2.5_1.5b_textarena", "80GiB"),
        ("qwen2.5_0.5b_textarena", "24GiB"),
    ],
)
def test_a_recipe_fits_its_gpu(recipe, memory, tmp_path, capsys):
    path = EXAMPLES / "configs" / f"{recipe}.yaml"
    settings = yaml.safe_load(path.read_text())
    assert settings["max_tokens_per_microbatch"] >= flex_length(settings["max_context_length"])
    shape = {"model_type": "qwen2", "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps({**shape, **QWEN2_5[recipe.split("_")[1]]}))
    arguments = ["--config", str(path), "--model", str(tmp_path), "--gpus", "1", "--zero-stage", "0", "--json"]
    plan([*arguments, "--gpu-memory", memory])
    (row,) = json.loads(capsys.readouterr().out)["strategies"]
    assert row["verdict"] == "fits"
    assert row["max_tokens"] >= settings["max_tokens_per_microbatch"]


@pytest.mark.slow
def test_the_script_trains_and_evaluates(tmp_path):
    pytest.importorskip("textarena", reason="pip install textarena")
    model = save_tiny_model(tmp_path / "model", max_position_embeddings=2048)
    template = files("trl").joinpath("chat_templates/qwen3_instruct_2507.jinja").read_text()
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    options = {
        "config": EXAMPLES / "configs" / "smollm2_textarena.yaml",
        "model_name_or_path": model,
        "output_dir": tmp_path / "out",
        "max_steps": 2,
        "held_out_tasks": 4,
        "per_device_eval_batch_size": 4,
        "max_completion_length": 4,
        "bf16": "false",
        "use_cpu": "true",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / "train_textarena.py"), *words],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "64 training tasks; evaluated: {'held-out': 4}" in result.stdout
    assert "user: FrozenLake-v0/" in result.stdout
    nothing = r"0\.000( \[0\.000, 0\.000\])?"
    assert re.search(rf"success on 4 held-out tasks: {nothing} before, {nothing} after; difference \+0", result.stdout)
    assert (tmp_path / "out" / "model.safetensors").is_file()
