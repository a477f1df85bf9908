"""
Evaluate a model on the multi-turn tasks of the Berkeley Function-Calling Leaderboard (BFCL v4).

Each task is played k times. The table has, for each category, the chance that one attempt succeeds (avg@k), that at
least one of k does (pass@k) and that all do (pass^k), each with a 95% interval over tasks, and why episodes ended.

Without arguments it evaluates SmolLM2-135M from PyPI on a few short tasks, on a CPU (`configs/smollm2_evaluate.yaml`
has every setting); `--model_name_or_path outputs/smollm2-bfcl` evaluates what `train_bfcl.py` made of it:

    python examples/evaluate_bfcl.py

A model of the Hub by the official protocol, on the paper's test split:

    accelerate launch examples/evaluate_bfcl.py --model_name_or_path Qwen/Qwen3-14B --bf16 true --max_turns 140 \\
        --num_generations_eval 4 --per_device_eval_batch_size 16 --max_completion_length 4096 --output_dir qwen3-14b

What `train_bfcl.py` made of it, as it was trained, on 8 GPUs:

    accelerate launch --config_file examples/accelerate_configs/ddp.yaml \\
        examples/evaluate_bfcl.py --config examples/configs/qwen3_14b_evaluate.yaml
"""

import os
import re
import sys


# threads that wait for one another in a loop are slow where other programs run; read when torch is imported
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import train_bfcl
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from smollm2 import default_cache_dir, smollm2
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from seeupo_trl import SeeUPOTrainer, StopReason
from seeupo_trl.envs.bfcl import BfclEnvironment, load_bfcl


DEMONSTRATION = Path(__file__).with_name("configs") / "smollm2_evaluate.yaml"


@dataclass
class EvaluationArguments:
    """
    Arguments of the evaluation.

    Args:
        categories (`list[str]`, *optional*, defaults to `["multi_turn_base"]`):
            Categories of BFCL v4, see [`~seeupo_trl.envs.bfcl.load_bfcl`].
        split (`str`, *optional*, defaults to `"test"`):
            `"train"`, `"test"` or `"all"`.
        num_tasks (`int`, *optional*):
            Play this many tasks of each category, evenly spread over the split. `None` plays all.
        protocol (`str`, *optional*, defaults to `"official"`):
            Limits of an episode: `"official"`, 20 steps a user turn, or `"paper"`, 10 assistant messages. `max_turns`
            ends an episode, too.
        tools, tool_list, distractors, max_user_turns:
            Departures from the official protocol for small models, see [`~seeupo_trl.envs.bfcl.BfclEnvironment`].
        cache_dir (`str`, *optional*):
            Where the converted model of the demonstration is kept. Defaults to `$SEEUPO_TRL_CACHE`, else
            `~/.cache/seeupo_trl`.
    """

    categories: list[str] = field(
        default_factory=lambda: ["multi_turn_base"], metadata={"help": "Categories of BFCL v4."}
    )
    split: str = field(default="test", metadata={"help": "'train', 'test' or 'all'."})
    num_tasks: int | None = field(default=None, metadata={"help": "Tasks of each category. Unset: all."})
    protocol: str = field(default="official", metadata={"help": "Limits of an episode: 'official' or 'paper'."})
    tools: str = field(default="full", metadata={"help": "Documents shown: 'full', 'trimmed' or 'brief'."})
    tool_list: str = field(default="classes", metadata={"help": "Functions shown: 'classes' or 'needed'."})
    distractors: int = field(default=0, metadata={"help": "With tool_list 'needed', how many others to add."})
    max_user_turns: int | None = field(default=None, metadata={"help": "Play only the first user turns."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where the demonstration's model is kept."})


@dataclass
class Config(train_bfcl.Config):
    """[`SeeUPOConfig`] with other defaults: four attempts at each task, and trajectories are saved."""

    output_dir: str = field(default="outputs/evaluate-bfcl", metadata={"help": "Where results are written."})
    num_generations_eval: int = field(default=4, metadata={"help": "k, the number of attempts at each task."})
    save_trajectories: bool = field(default=True, metadata={"help": "Whether to save the trajectories."})


def main(script_args: EvaluationArguments, args: Config, model_args: ModelConfig) -> dict[str, float]:
    """Evaluate, print the table, and return the metrics."""
    state = PartialState()
    model = model_args.model_name_or_path
    if model is None:
        with state.main_process_first():
            model = str(smollm2(Path(script_args.cache_dir or default_cache_dir())))
    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(args.model_init_kwargs or {}),
    }
    # an episode that ends before the environment can report success has reward 0
    args.success_threshold = 1.0
    # nothing is trained, and no training set is needed
    args.max_steps = 1
    trainer = SeeUPOTrainer(
        model=model,
        args=args,
        environment_factory=partial(
            BfclEnvironment,
            protocol=script_args.protocol,
            tools=script_args.tools,
            tool_list=script_args.tool_list,
            distractors=script_args.distractors,
            max_user_turns=script_args.max_user_turns,
        ),
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    metrics = trainer.evaluate(choose_tasks(script_args))
    trainer.save_metrics("eval", metrics, combined=False)
    k = trainer.num_generations_eval
    state.print(f"\n{model} on the {script_args.split} split, {k} attempts at each task\n")
    state.print(table(metrics, k))
    state.print(f"\nAll metrics are in {Path(args.output_dir) / 'eval_results.json'}.")
    if args.save_trajectories:
        state.print(f"Look at the episodes with\n    python -m seeupo_trl.view {args.output_dir} --open")
    trainer.accelerator.end_training()
    return metrics


def choose_tasks(script_args: EvaluationArguments) -> Dataset:
    """The tasks of all categories, as one dataset."""
    chosen = []
    for category in script_args.categories:
        tasks = load_bfcl(category, script_args.split)
        if script_args.num_tasks is not None:
            count = min(script_args.num_tasks, len(tasks))
            tasks = tasks.select([position * len(tasks) // count for position in range(count)])
        chosen.append(tasks)
    return concatenate_datasets(chosen)


def table(metrics: dict[str, float], k: int) -> str:
    """Success by category with its intervals, and why episodes ended, as lines of text."""
    measures = [f"avg@{k}", f"pass@{k}", f"pass^{k}"] if k > 1 else ["avg@1"]
    reasons = [reason for reason in StopReason if metrics[f"eval_stop_reason/{reason}"]]
    names = [re.fullmatch("eval_episodes/(.+)/tasks", name) for name in metrics]
    categories = [match[1] for match in names if match]
    success = [["", *measures, "tasks", "spoiled episodes"]]
    stops = [["", *(reason.replace("_", " ") for reason in reasons)]]
    together = [("all", "")] if len(categories) > 1 else []
    for name, infix in [*((category, f"{category}/") for category in categories), *together]:
        cells = [interval(metrics, f"eval_success/{infix}{measure}") for measure in measures]
        counts = [f"{metrics[f'eval_episodes/{infix}{count}']:.0f}" for count in ("tasks", "quarantined")]
        success.append([name, *cells, *counts])
        stops.append([name, *(f"{metrics[f'eval_stop_reason/{infix}{reason}']:.0%}" for reason in reasons)])
    return "\n\n".join(map(aligned, (success, stops)))


def aligned(rows: list[list[str]]) -> str:
    """Rows of text with the columns below one another."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("   ".join([name.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def interval(metrics: dict[str, float], name: str) -> str:
    """A value with its interval, where they are known."""
    if name not in metrics:
        return "-"
    ends = [metrics.get(f"{name}_{end}") for end in ("low", "high")]
    return f"{metrics[name]:.3f}" + ("" if None in ends else " [{:.3f}, {:.3f}]".format(*ends))


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not any(argument.split("=")[0] in ("--config", "--model_name_or_path") for argument in arguments):
        arguments = ["--config", str(DEMONSTRATION), *arguments]
    main(*TrlParser((EvaluationArguments, Config, ModelConfig)).parse_args_and_config(arguments))
