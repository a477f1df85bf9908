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

`seeupo-trl evaluate bfcl` runs this script, too.
"""

import os


# threads that wait for one another in a loop for long are slow where other programs run, and those that never do are
# slow where none does; read when torch is imported
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from accelerate import PartialState
from trl import ModelConfig, get_peft_config, get_quantization_config

from seeupo_trl import SeeUPOTrainer
from seeupo_trl.envs.bfcl import BfclEnvironment
from seeupo_trl.recipes import training
from seeupo_trl.recipes.arguments import EvaluationArguments
from seeupo_trl.recipes.bfcl import evaluation_tasks
from seeupo_trl.recipes.cache import default_cache_dir
from seeupo_trl.recipes.parsing import run
from seeupo_trl.recipes.results import table
from seeupo_trl.recipes.smollm2 import smollm2


CONFIGS = Path(__file__).with_name("configs")
DEMONSTRATION = CONFIGS / "smollm2_evaluate.yaml"


@dataclass
class Config(training.Config):
    """[`SeeUPOConfig`] with other defaults: four attempts at each task, and trajectories are saved."""

    output_dir: str = field(default="outputs/evaluate-bfcl", metadata={"help": "Where results are written."})
    num_generations_eval: int = field(default=4, metadata={"help": "k, the number of attempts at each task."})
    save_trajectories: bool = field(default=True, metadata={"help": "Whether to save the trajectories."})


def main(script_args: EvaluationArguments, args: Config, model_args: ModelConfig) -> dict[str, float]:
    """Evaluate, print the table, and return the metrics."""
    # an episode that ends before the environment can report success has reward 0
    training.set_by_script(args, "success_threshold", 1.0, "BFCL reports success itself")
    tasks = evaluation_tasks(script_args)
    training.check_evaluation(args, {script_args.split: tasks})
    state = PartialState()
    model = model_args.model_name_or_path
    if model is None:
        with state.local_main_process_first():
            model = str(smollm2(Path(script_args.cache_dir or default_cache_dir())))
    args.model_init_kwargs = training.model_init_kwargs(args, model_args)
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
    metrics = trainer.evaluate(tasks)
    trainer.save_metrics("eval", metrics, combined=False)
    k = trainer.num_generations_eval
    state.print(f"\n{model} on the {script_args.split} split, {k} attempts at each task\n")
    state.print(table(metrics, k))
    state.print(f"\nAll metrics are in {Path(args.output_dir) / 'eval_results.json'}.")
    if args.save_trajectories:
        state.print(f"Look at the episodes with\n    python -m seeupo_trl.view {args.output_dir} --open")
    trainer.accelerator.end_training()
    return metrics


if __name__ == "__main__":
    run(main, (EvaluationArguments, Config, ModelConfig), CONFIGS, demonstration=DEMONSTRATION.stem)
