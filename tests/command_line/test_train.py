"""`seeupo-trl train` and `evaluate` run the scripts of `examples/`, in one process or in several."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command import DATA_OF_TASKS, ROOT, environment, seeupo_trl
from launching import LAUNCHER
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM

from seeupo_trl.command_line.scripts import SCRIPTS, _launcher_arguments, examples_directory, first_gpu


pytest.importorskip("bfcl_eval", reason="bfcl-eval is installed without its dependencies, see the README")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A YAML file of a short training of a tiny model."""
    directory = tmp_path_factory.mktemp("command")
    model = save_tiny_model(directory / "model", max_position_embeddings=4096)
    path = directory / "tiny.yaml"
    path.write_text(yaml.safe_dump({**DATA_OF_TASKS, "model_name_or_path": model}))
    return path


@pytest.fixture
def launcher(tmp_path) -> Path:
    """A YAML file of `accelerate config` for two processes."""
    path = tmp_path / "launcher.yaml"
    path.write_text(yaml.safe_dump({**LAUNCHER, "num_processes": 2, "distributed_type": "MULTI_GPU"}))
    return path


def assert_trained(done: subprocess.CompletedProcess[str], output: Path) -> None:
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("success on 1 test-split tasks: 0.000 before, 0.000 after") == 1
    assert "iteration 1/1  reward 0.000" in done.stdout + done.stderr
    AutoModelForCausalLM.from_pretrained(output)


@pytest.mark.slow
def test_a_file_trains_in_one_process(config, tmp_path):
    output = tmp_path / "out"
    assert_trained(seeupo_trl("train", "bfcl", "--config", config, "--output_dir", output), output)


@pytest.mark.slow
def test_the_command_starts_its_own_processes(config, launcher, tmp_path):
    output = tmp_path / "out"
    options = ["--accelerate_config", launcher, "--main_process_port", "0", "--use_cpu", "true"]
    done = seeupo_trl("train", "bfcl", "--config", config, "--output_dir", output, *options)
    assert_trained(done, output)


@pytest.mark.slow
def test_the_number_of_processes_is_enough(config, tmp_path):
    output = tmp_path / "out"
    options = ["--num_processes", "2", "--main_process_port", "0", "--use_cpu", "true"]
    done = seeupo_trl("train", "bfcl", "--config", config, "--output_dir", output, *options)
    assert_trained(done, output)
    assert "had defaults used instead" not in done.stderr


@pytest.mark.slow
def test_the_launcher_starts_the_command(config, launcher, tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(launcher)]
    command += ["--main_process_port", "0", "-m", "seeupo_trl", "train", "bfcl"]
    command += ["--config", str(config), "--output_dir", str(output), "--use_cpu", "true"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment())
    assert_trained(done, output)


@pytest.mark.slow
def test_a_mistake_in_several_processes_is_said_without_a_traceback(config, tmp_path):
    options = ["--num_processes", "2", "--main_process_port", "0", "--output_dir", tmp_path, "--max_turns", "-1"]
    done = seeupo_trl("train", "bfcl", "--config", config, *options)
    assert done.returncode == 2
    assert done.stderr.count("[process 0] seeupo-trl train bfcl: error: `max_turns` must be at least 1") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_evaluate_prints_the_table(config, tmp_path):
    model = yaml.safe_load(config.read_text())["model_name_or_path"]
    options = {"model_name_or_path": model, "num_tasks": 2, "num_generations_eval": 2, "bf16": "false"}
    options |= {"max_completion_length": 8, "output_dir": tmp_path, "per_device_eval_batch_size": 4}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    done = seeupo_trl("evaluate", "bfcl", "--config", "smollm2_evaluate", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "on the test split, 2 attempts at each task" in done.stdout
    assert json.loads((tmp_path / "eval_results.json").read_text())["eval_success/pass@2"] == 0


@pytest.mark.slow
def test_all_options_are_listed_when_asked_for():
    done = seeupo_trl("train", "bfcl", "--help_all")
    assert done.returncode == 0, done.stderr
    for option in ("--category", "--turn_weight_clip", "--learning_rate", "--lora_r"):
        assert option in done.stdout


def test_the_scripts_are_there():
    for scripts in SCRIPTS.values():
        for script in scripts.values():
            assert (examples_directory() / script.file).is_file()


def test_arguments_of_the_launcher_are_told_from_the_scripts():
    words, rest = _launcher_arguments(["--config", "a.yaml", "--accelerate_config", "zero3", "--max_steps", "3"])
    assert words == ["--config_file", str(ROOT / "examples" / "accelerate_configs" / "zero3.yaml")]
    assert rest == ["--config", "a.yaml", "--max_steps", "3"]
    assert _launcher_arguments(["--num_processes", "1", "--max_steps", "3"]) == ([], ["--max_steps", "3"])
    words, rest = _launcher_arguments(["--num_processes=4", "--num_machines=2", "--accelerate_config=zero3"])
    assert (words[2:], rest) == (["--num_processes", "4", "--num_machines", "2"], [])


@pytest.mark.parametrize(
    ("visible", "first"), [(None, "0"), ("2,3", "2"), ("GPU-1a2b", "GPU-1a2b"), ("", "")], ids=str
)
def test_one_process_sees_one_gpu(visible, first):
    assert first_gpu(visible) == first
