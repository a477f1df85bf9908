"""Runs `seeupo-trl` as a user does, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[2]
DATA_OF_TASKS = {
    "tools": "brief",
    "tool_list": "needed",
    "max_user_turns": 1,
    "max_task_tokens": 800,
    "held_out_tasks": 1,
    "num_generations": 2,
    "num_generations_eval": 1,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 1,
    "max_completion_length": 8,
    "max_steps": 1,
    "logging_steps": 1,
    "bf16": False,
    "save_strategy": "no",
    "report_to": "none",
}


def environment(**variables: str) -> dict[str, str]:
    """The process's environment with this checkout's package first."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables}


def seeupo_trl(*arguments: str, timeout: float = 300, **variables: str) -> subprocess.CompletedProcess[str]:
    """`python -m seeupo_trl ARGUMENTS`, with further environment variables."""
    command = [sys.executable, "-m", "seeupo_trl", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=environment(**variables), check=False
    )
