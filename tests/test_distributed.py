"""Two real processes end with the parameters of one, whatever the data on each of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import save_tiny_model


pytest.importorskip("deepspeed")

SCRIPT = Path(__file__).with_name("distributed_run.py")
TOLERANCE = 1e-3  # float32, relative to the distance moved

LAUNCHER = {
    "compute_environment": "LOCAL_MACHINE",
    "machine_rank": 0,
    "main_training_function": "main",
    "mixed_precision": "no",
    "num_machines": 1,
    "num_processes": 2,
    "rdzv_backend": "static",
    "same_network": True,
    "use_cpu": False,
}


def deepspeed(stage: int, offload: str = "none") -> dict:
    zero3 = {"zero3_init_flag": True, "zero3_save_16bit_model": True} if stage == 3 else {}
    return {
        **LAUNCHER,
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {
            "zero_stage": stage,
            "offload_optimizer_device": offload,
            "offload_param_device": "none",
            "deepspeed_multinode_launcher": "standard",
            **zero3,
        },
    }


LAUNCHERS = {"ddp": {**LAUNCHER, "distributed_type": "MULTI_GPU"}, "zero2": deepspeed(2), "zero3": deepspeed(3)}


def train(
    model: str, output: Path, launcher: dict | None, options: dict
) -> tuple[dict[str, torch.Tensor], list[dict]]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    if launcher is None:
        command = [sys.executable]
    else:
        config = output / "launcher.yaml"
        config.write_text(yaml.safe_dump(launcher))
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
        command += ["--main_process_port", "0"]
    options = {**options, "num_processes": 1 if launcher is None else 2}
    command += [str(SCRIPT), model, str(output), json.dumps(options)]
    process = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-4000:]
    weights = next((output / "final").glob("*.safetensors"))
    return load_file(weights), json.loads((output / "logs.json").read_text())


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def relative_error(actual, expected, start) -> float:
    difference = max((actual[name] - expected[name]).abs().max().item() for name in expected)
    return difference / max((expected[name] - start[name]).abs().max().item() for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize(
    "options",
    [{}, {"beta": 0.1, "old_policy": "turn", "gradient_checkpointing": True}],
    ids=["defaults", "kl-old-turn-checkpointing"],
)
def test_two_processes_end_where_one_ends(launcher, options, model, tmp_path):
    directories = {name: tmp_path / name for name in ("one", "two")}
    for directory in directories.values():
        directory.mkdir()
    expected, logs = train(model, directories["one"], None, options)
    actual, distributed_logs = train(model, directories["two"], LAUNCHERS[launcher], options)
    start = load_file(Path(model) / "model.safetensors")
    assert relative_error(actual, expected, start) < TOLERANCE
    for one, two in zip(logs[:-1], distributed_logs[:-1], strict=True):
        for name in ("loss", "ratio/max", "turn_weight/mean", "turn_1/pool", "turn_2/loss", "entropy"):
            if name in one:
                assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name
