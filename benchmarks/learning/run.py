"""
One run of the study: a task, an arm, a learning rate, a seed. `study.py` runs many of them.

    python benchmarks/learning/run.py search seeupo-reverse 2e-3 0
"""

import json
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from arms import ARMS, Arm
from policy import Rollout, flops_per_token, save_policy
from ppo import PPOTrainer
from tasks import TASKS, Task
from transformers import AutoTokenizer, PrinterCallback
from transformers.utils.logging import disable_progress_bar
from trl import GRPOConfig, GRPOTrainer

from seeupo_trl import SeeUPOConfig, SeeUPOTrainer, environment_reward


ROOT = Path(__file__).parents[2]
TRAINERS = {"SeeUPOTrainer": SeeUPOTrainer, "GRPOTrainer": GRPOTrainer, "PPOTrainer": PPOTrainer}
BATCH, GROUP = 64, 8
LIBRARIES = ("torch", "transformers", "trl", "accelerate", "textarena")
CURVE_POINTS = 40  # success is written as so many means over the run


class UpdateTokens:
    """Positions (padding included) that the update's forward passes compute, with a gradient and without."""

    def __init__(self, models: list[torch.nn.Module], rollout: Rollout):
        self.with_gradient = self.without = 0
        self._rollout = rollout
        for model in models:
            model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        if self._rollout.is_playing:
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        if torch.is_grad_enabled():
            self.with_gradient += ids.numel()
        else:
            self.without += ids.numel()


def configuration(task: Task, arm: Arm, lr: float, seed: int, folder: str, steps: int) -> GRPOConfig:
    shared = {
        "output_dir": folder,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": 1,
        "num_generations": GROUP,
        "num_iterations": steps,
        "learning_rate": lr,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "beta": 0.0,
        "temperature": 1.0,
        "max_completion_length": 256,  # of the loss_type "dr_grpo" only; the rollout ends turns itself
        "seed": seed,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    if arm.trainer == "SeeUPOTrainer":
        # one global step is one batch, whatever the number of its optimizer steps
        return SeeUPOConfig(**shared, **arm.settings, max_steps=task.batches)
    return GRPOConfig(**shared, **arm.settings, max_steps=task.batches * steps)


def play(task_name: str, arm_name: str, lr: float, seed: int) -> dict:
    """Train once and say what came of it, as one JSON line of the study."""
    task, arm = TASKS[task_name], ARMS[arm_name]
    steps = task.max_turns if arm.steps == "turns" else arm.steps
    with tempfile.TemporaryDirectory() as folder:
        path = save_policy(f"{folder}/policy", task.words, seed)
        tokenizer = AutoTokenizer.from_pretrained(path)
        config = configuration(task, arm, lr, seed, folder, steps)
        rollout = Rollout(task)
        trainer = TRAINERS[arm.trainer](
            model=path,
            reward_funcs=environment_reward,
            args=config,
            train_dataset=task.dataset(),
            processing_class=tokenizer,
            rollout_func=rollout,
        )
        trainer.remove_callback(PrinterCallback)
        models = [trainer.model, trainer.critic] if isinstance(trainer, PPOTrainer) else [trainer.model]
        tokens = UpdateTokens(models, rollout)
        optimizer_steps = 0

        def count(*_):
            nonlocal optimizer_steps
            optimizer_steps += 1

        trainer.create_optimizer()
        trainer.optimizer.register_step_post_hook(count)
        start, cpu = time.perf_counter(), time.process_time()
        trainer.train()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    flops = flops_per_token(trainer.model)
    return {
        "task": task_name,
        "arm": arm_name,
        "lr": lr,
        "seed": seed,
        "batches": len(rollout.rewards),
        "episodes": BATCH * len(rollout.rewards),
        "optimizer_steps": optimizer_steps,
        "update_tokens": tokens.with_gradient,
        "update_tokens_without_gradient": tokens.without,
        "update_flops": flops * (3 * tokens.with_gradient + tokens.without),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "rollout_seconds": round(rollout.seconds, 2),
        "reward": _curve(rollout.rewards),
        "success": _curve(rollout.successes),
        "turns": _curve(rollout.turns, 2),
        "action_tokens": _curve(rollout.action_tokens, 2),
        "settings": {"trainer": arm.trainer, "steps": steps, **arm.settings},
        "commit": COMMIT,
        "versions": {name: version(name) for name in LIBRARIES},
    }


def _curve(values: list[float], digits: int = 4) -> list[float]:
    """Means over forty stretches of a run."""
    size = max(1, len(values) // CURVE_POINTS)
    stretches = [values[i : i + size] for i in range(0, len(values), size)]
    return [round(sum(one) / len(one), digits) for one in stretches]


def _commit() -> str:
    """The last commit that changed what trains."""
    command = ["git", "log", "-1", "--format=%H", "--", "seeupo_trl", ":!seeupo_trl/envs"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


COMMIT = _commit()


def be_quiet() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    disable_progress_bar()


if __name__ == "__main__":
    be_quiet()
    task_name, arm_name, lr, seed = sys.argv[1:]
    print(json.dumps(play(task_name, arm_name, float(lr), int(seed))))
