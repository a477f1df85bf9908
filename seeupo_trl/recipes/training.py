"""Training with a readable report of what happens, on a CPU as well."""

import ctypes
import gc
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import ProgressCallback, TrainerCallback, TrainingArguments
from trl import ModelConfig

from ..evaluation.comparison import compare_success, success_by_task
from ..evaluation.summary import Evaluation
from ..rollout import MultiTurnRollout
from ..seeupo_config import SeeUPOConfig
from ..seeupo_trainer import SeeUPOTrainer
from ..trajectory import Trajectory
from ..view.command import write_page
from .learning_curve import describe_change, print_learning_curve
from .mistakes import UsageError
from .results import interval


BEFORE_TRAINING = "before_training.json"


@dataclass
class Config(SeeUPOConfig):
    """
    [`SeeUPOConfig`] that runs on the CPU where there is no GPU, and takes `--resume_from_checkpoint true` and `false`.
    """

    def __post_init__(self):
        # a yaml file says `true` itself, but a word of the command line is taken for a path
        words = {"true": True, "false": False}
        self.resume_from_checkpoint = words.get(str(self.resume_from_checkpoint).lower(), self.resume_from_checkpoint)
        self.use_cpu = self.use_cpu or not torch.cuda.is_available()
        super().__post_init__()


class ReportingRollout(MultiTurnRollout):
    """
    Keeps the last batch of episodes for a look at one, and reports the official score of each. On a CPU it returns the
    memory that the update before it left, and its own.
    """

    last_episodes: Sequence[tuple[list[dict], Trajectory]] = ()

    def __call__(self, prompts, trainer):
        return_memory(trainer.accelerator.device)
        output = super().__call__(prompts, trainer)
        self.last_episodes = list(zip(prompts, output["trajectories"], strict=True))
        output["solved"] = [float(t.info.get("success", False)) for t in output["trajectories"]]
        return_memory(trainer.accelerator.device)
        return output


def success(solved: list[float], **kwargs) -> list[float]:
    """Reward function with weight 0: the official score, to see it beside a shaped reward."""
    return solved


def report_success(training_args: Config) -> None:
    """
    Have [`success`] reported beside the environment's rewards, with weight 0.

    Raises:
        [`UsageError`]:
            When the user gave `reward_weights`.
    """
    because = "its reward functions are success, which is reported with weight 0, and the environment's reward"
    set_by_script(training_args, "reward_weights", [0.0, 1.0], because)


class IterationLine(ProgressCallback):
    """A progress bar with one readable line an iteration."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "turns/mean" not in logs:
            return
        line = (
            f"iteration {state.global_step}/{state.max_steps}  reward {logs['reward']:.3f}  "
            f"success {logs['rewards/success/mean']:.3f}  turns {logs['turns/mean']:.1f}  "
            f"updates {logs['turn_updates']:.0f}  "
        )
        if "ratio/max" in logs:
            line += (
                f"ratio {logs['ratio/min']:.3f}-{logs['ratio/max']:.3f}  "
                f"M/A {logs['turn_weight/min']:.3f}-{logs['turn_weight/max']:.3f}  "
                f"clipped {logs['clip_ratio/region_mean']:.2f}  entropy {logs['entropy']:.2f}  "
            )
        line += f"rollout {logs['time/rollout']:.0f} s  update {logs['time/old_pass'] + logs['time/update']:.0f} s"
        self.training_bar.write(line)


def return_memory(device: torch.device) -> None:
    """
    On a CPU, give memory that nobody uses back to the system: what only cycles of references hold, and what glibc has
    kept. (GPUs have `torch_empty_cache_steps`.)

    Args:
        device (`torch.device`):
            Where the model is.
    """
    if device.type != "cpu":
        return
    gc.collect()
    # of glibc, where there is one
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


class BeforeTraining(TrainerCallback):
    """
    Calls a function when the model is ready for training (what DeepSpeed evaluates before, it cannot train), unless
    the run is resumed: then it has been trained.
    """

    def __init__(self, function: Callable[[], None]):
        self.function = function

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.function()


def prepare_cpu(training_args: Config) -> None:
    """
    On a CPU, before anything is computed: share out the cores that may be used among the processes, to which launchers
    give one thread each, and bound what oneDNN keeps.
    """
    if training_args.use_cpu:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(cores // PartialState().num_processes, 1))
        # a kernel for each shape of a product that it has seen, by default up to 1,024 of them: a few hundred
        # megabytes, and scattered over the heap, so that more cannot be given back
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


def model_init_kwargs(training_args: Config, model_args: ModelConfig) -> dict[str, Any]:
    """How the model is loaded, from both kinds of arguments; those of the trainer come first."""
    return {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }


def set_by_script(args: TrainingArguments, name: str, value: Any, because: str) -> None:
    """
    Set a field that is the script's to decide.

    Args:
        args (`TrainingArguments`):
            The arguments.
        name (`str`), value (`Any`):
            The field, and what the script needs it to be.
        because (`str`):
            Why, for those who gave it another value.

    Raises:
        [`UsageError`]:
            When the user gave it another value.
    """
    if getattr(args, name) not in (None, value):
        raise UsageError(f"--{name} cannot be given to this script: {because}.")
    setattr(args, name, value)


def check_evaluation(training_args: Config, held_out: dict[str, Dataset]) -> None:
    """
    What an evaluation would refuse, refused before a model is loaded and a warm-up takes its minutes.

    Args:
        training_args ([`Config`]):
            The trainer's arguments.
        held_out (`dict[str, Dataset]`):
            Tasks to evaluate on, by the name of the set.

    Raises:
        `ValueError`:
            When batches would cut the groups of a task, or have no size.
    """
    args, processes = training_args, PartialState().num_processes
    if held_out and args.per_device_eval_batch_size is None:
        raise ValueError("--per_device_eval_batch_size is null, and there are tasks to evaluate on; give a number.")
    for tasks in held_out.values():
        k = args.num_generations_eval or args.num_generations
        Evaluation(tasks, k, args.eval_batch_size, processes, args.seed)


def train_and_report(
    trainer: SeeUPOTrainer, rollout: ReportingRollout, held_out: dict[str, Dataset], dataset_name: str
) -> None:
    """
    Train, save the model, evaluate before and after, and show an episode of each time. What was found before stays in
    `output_dir/before_training.json`, where a resumed run reads it.

    Args:
        trainer ([`SeeUPOTrainer`]):
            The trainer, with [`success`] as its reward function.
        rollout ([`ReportingRollout`]):
            The rollout that the trainer uses.
        held_out (`dict[str, Dataset]`):
            Tasks to evaluate on, by the name of the set.
        dataset_name (`str`):
            For the model card.
    """
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(IterationLine)
    args = trainer.config
    say = PartialState().print

    before: dict[str, Evaluated] = {}
    kept = Path(args.output_dir, BEFORE_TRAINING)

    def evaluate_before() -> None:
        for name, tasks in held_out.items():
            before[name] = evaluate(trainer, tasks)
            say(f"before training: success {before[name].text} on {len(tasks)} {name} tasks")
        if held_out:
            say("\nAn episode before training\n" + readable(*rollout.last_episodes[0]))
        if trainer.is_world_process_zero():
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps({name: asdict(evaluated) for name, evaluated in before.items()}))

    trainer.add_callback(BeforeTraining(evaluate_before))
    sizes = {name: len(tasks) for name, tasks in held_out.items()}
    say(f"\n{len(trainer.train_dataset)} training tasks; evaluated: {sizes}")
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    # before what may fail or take long: the evaluation and the report
    trainer.save_model(args.output_dir)
    if rollout.last_episodes:
        say("\nAn episode of the last iteration\n" + readable(*rollout.last_episodes[0]))
    if not before and kept.exists():
        before = {name: Evaluated(**evaluated) for name, evaluated in json.loads(kept.read_text()).items()}
    after = {name: evaluate(trainer, tasks) for name, tasks in held_out.items()}
    changes = {
        name: compare_success(before[name].success, after[name].success)
        for name in held_out
        if name in before and before[name].success.keys() & after[name].success.keys()
    }
    if trainer.is_world_process_zero():
        print_learning_curve(trainer.state.log_history, changes)
    for name, evaluated in after.items():
        if name in changes:
            say(describe_change(name, changes[name], before[name].text, evaluated.text))
        else:
            say(
                f"success on {len(held_out[name])} {name} tasks: {evaluated.text} after; what it was before training "
                f"is not known, {kept} does not say so"
            )
    say(f"Model saved to {args.output_dir}")
    if args.save_trajectories and trainer.is_world_process_zero():
        print("The page of this run, with every episode:", end=" ")
        write_page(args.output_dir)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
    trainer.accelerator.end_training()


@dataclass(frozen=True)
class Evaluated:
    """
    What an evaluation found.

    Args:
        text (`str`):
            Success with its interval; where no episode went far enough to report success, 0.
        success (`dict[str, float]`):
            The success of each task.
    """

    text: str
    success: dict[str, float]


def evaluate(trainer: SeeUPOTrainer, tasks: Dataset) -> Evaluated:
    """Success on tasks, sampled as in training."""
    metrics = trainer.evaluate(tasks)
    name = f"eval_success/avg@{trainer.num_generations_eval}"
    return Evaluated(interval({name: 0.0, **metrics}, name), success_by_task(trainer.last_evaluation))


def readable(prompt: list[dict], episode: Trajectory) -> str:
    """An episode as lines of text."""
    lines = []
    for message in [*prompt, *episode.messages]:
        text = " ".join((message.get("content") or "").split())
        calls = [call["function"] for call in message.get("tool_calls") or []]
        text += " ".join(f"{call['name']}({call['arguments']})" for call in calls)
        lines.append(f"  {message['role']:>9}: {text[:300]}")
    return "\n".join(
        [*lines, f"  reward {episode.reward}, {episode.stop_reason}, {episode.info.get('failure') or ''}"]
    )
