"""Starting several processes: the launcher's configurations, and what a launch leaves behind."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import warm_python
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


HELPERS = Path(__file__).parent
TIMEOUT = 600  # seconds; a launch takes about 30

LAUNCHER = {
    "compute_environment": "LOCAL_MACHINE",
    "machine_rank": 0,
    "main_training_function": "main",
    "mixed_precision": "no",
    "num_machines": 1,
    "rdzv_backend": "static",
    "same_network": True,
    "use_cpu": False,
}
FSDP2 = {
    "distributed_type": "FSDP",
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_cpu_ram_efficient_loading": True,
        "fsdp_offload_params": False,
        "fsdp_reshard_after_forward": True,
        "fsdp_state_dict_type": "FULL_STATE_DICT",
    },
}


def deepspeed_json(stage: int, offload_optimizer: bool, offload_param: bool) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage}
    if offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if offload_param:
        zero["offload_param"] = {"device": "cpu"}
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
        # every tensor of the tiny models is below the default, and would not be partitioned
        zero["stage3_param_persistence_threshold"] = 0
    return {
        "zero_optimization": zero,
        # DeepSpeed's own optimizer for offloading takes two minutes to compile; PyTorch's runs on CPUs as well
        "zero_force_ds_cpu_optimizer": False,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
    }


DEEPSPEED = {
    "zero1": deepspeed_json(1, False, False),
    "zero2": deepspeed_json(2, False, False),
    "zero3": deepspeed_json(3, False, False),
    "zero3_offload_optimizer": deepspeed_json(3, True, False),
    "zero3_offload": deepspeed_json(3, True, True),
}


@dataclass
class Finished:
    """A launch that ended."""

    output: Path
    returncode: int
    end: float  # time.time()
    stderr: str

    def parameters(self, run: str) -> dict[str, torch.Tensor]:
        """The model that `save_model` wrote, or its adapter, in float64."""
        final = self.output / run / "final"
        if (final / "adapter_model.safetensors").exists():
            parameters = load_file(final / "adapter_model.safetensors")
        else:
            parameters = dict(AutoModelForCausalLM.from_pretrained(final).named_parameters())
        return {name: tensor.detach().double() for name, tensor in parameters.items()}

    def logs(self, run: str) -> list[dict[str, float]]:
        return json.loads((self.output / run / "logs.json").read_text())

    def notes(self, run: str) -> list[dict[str, Any]]:
        """What each process noted."""
        return [json.loads(path.read_text()) for path in sorted((self.output / run).glob("process_*.json"))]


def accelerate_launch(output: Path, backend: str, num_processes: int) -> list[str]:
    """The command that starts a script on several processes; its configuration is written to `output`."""
    config: dict[str, Any] = {**LAUNCHER, "num_processes": num_processes}
    if backend == "ddp":
        config["distributed_type"] = "MULTI_GPU"
    elif backend == "fsdp2":
        config |= FSDP2
    else:
        path = output / "deepspeed.json"
        path.write_text(json.dumps(DEEPSPEED[backend]))
        config["distributed_type"] = "DEEPSPEED"
        config["deepspeed_config"] = {
            "deepspeed_config_file": str(path),
            "zero3_init_flag": backend.startswith("zero3"),
            "deepspeed_multinode_launcher": "standard",
        }
        del config["mixed_precision"]  # the launcher wants it in one place only
    path = output / "launcher.yaml"
    path.write_text(yaml.safe_dump(config))
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    return [*launcher, "--config_file", str(path), "--main_process_port", "0"]


def run_command(command: list[str], timeout: int = TIMEOUT, num_processes: int = 1) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    if num_processes > 1:
        env |= warm_python.environment(num_processes)
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)


def launch(output: Path, backend: str | None, num_processes: int, runs: list[dict[str, Any]]) -> Finished:
    """Start the processes, train the runs one after the other, and wait for the end, whatever it is."""
    output.mkdir(parents=True, exist_ok=True)
    extra: dict[str, Any] = {"output": str(output), "fsdp": backend == "fsdp2"}
    command = [sys.executable]
    if backend == "torchrun_zero3":
        # DeepSpeed's configuration comes with the training arguments
        (output / "deepspeed.json").write_text(json.dumps(DEEPSPEED["zero3"]))
        extra["deepspeed"] = str(output / "deepspeed.json")
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    elif backend is not None:
        command = accelerate_launch(output, backend, num_processes)
    job = output / "job.json"
    settings = {"num_processes": num_processes, "init_deepspeed": backend == "torchrun_zero3"}
    job.write_text(json.dumps({**settings, "runs": [{**run, **extra} for run in runs]}))
    process = run_command([*command, str(HELPERS / "distributed_run.py"), str(job)], num_processes=num_processes)
    return Finished(output, process.returncode, time.time(), process.stderr)


def run_on_two_processes(
    script: str, output: Path, *arguments: str, backend: str = "ddp", timeout: int = 300
) -> list[dict[str, Any]]:
    """
    Run a script of this folder with `output` and further arguments, and return what each process wrote to
    `rank0.json` and `rank1.json` there.
    """
    command = [*accelerate_launch(output, backend, 2), str(HELPERS / script), str(output), *arguments]
    process = run_command(command, timeout, num_processes=2)
    files = [output / f"rank{rank}.json" for rank in range(2)]
    assert all(file.exists() for file in files), process.stderr[-4000:]
    return [json.loads(file.read_text()) for file in files]
