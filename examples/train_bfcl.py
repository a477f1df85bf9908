"""
Train an agent with SeeUPO on the multi-turn tasks of the Berkeley Function-Calling Leaderboard (BFCL v4).

Without arguments it runs a small demonstration on a CPU: SmolLM2-135M from PyPI, a short supervised warm-up, real
tasks with a reduced tool list (`configs/smollm2_bfcl.yaml` has every setting):

    accelerate launch examples/train_bfcl.py

The published setup, on 8 GPUs:

    accelerate launch --config_file examples/accelerate_configs/zero3.yaml \\
        examples/train_bfcl.py --config examples/configs/qwen3_14b_bfcl.yaml

`seeupo-trl train bfcl` runs this script, too. To train on tasks of your own, start from `main` below: the tasks, the
environment that plays them, the model, the trainer. All else is a report of what happens.
"""

import os


# threads that wait for one another in a loop for long are slow where other programs run, and those that never do are
# slow where none does; read when torch is imported
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

from functools import partial
from pathlib import Path

from accelerate import PartialState
from transformers import AutoTokenizer
from trl import ModelConfig, get_peft_config, get_quantization_config

from seeupo_trl import SeeUPOTrainer, environment_reward
from seeupo_trl.envs.bfcl import BfclEnvironment
from seeupo_trl.recipes.arguments import BfclArguments
from seeupo_trl.recipes.bfcl import choose_tasks, warmed_up
from seeupo_trl.recipes.cache import default_cache_dir
from seeupo_trl.recipes.parsing import run
from seeupo_trl.recipes.smollm2 import smollm2
from seeupo_trl.recipes.training import (
    Config,
    ReportingRollout,
    check_evaluation,
    model_init_kwargs,
    prepare_cpu,
    report_success,
    success,
    train_and_report,
)
from seeupo_trl.recipes.warm_up import train_last_layers


CONFIGS = Path(__file__).with_name("configs")


def main(script_args: BfclArguments, training_args: Config, model_args: ModelConfig) -> None:
    prepare_cpu(training_args)
    report_success(training_args)

    # the environment: it opens a task's conversation, and answers the policy's calls
    make_environment = partial(
        BfclEnvironment,
        protocol=script_args.protocol,
        reward=script_args.reward,
        success_reward=script_args.success_reward,
        tools=script_args.tools,
        tool_list=script_args.tool_list,
        distractors=script_args.distractors,
        max_user_turns=script_args.max_user_turns,
    )

    # the model and the tasks: one process prepares them, the others find them in the cache
    cache_dir = Path(script_args.cache_dir or default_cache_dir())
    with PartialState().local_main_process_first():
        base_model = model_args.model_name_or_path or str(smollm2(cache_dir))
        loading = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
        tokenizer = AutoTokenizer.from_pretrained(base_model, **loading)
        train, held_out = choose_tasks(script_args, tokenizer, make_environment())
        check_evaluation(training_args, held_out)
        model = warmed_up(base_model, cache_dir, train, make_environment(), script_args, **loading)

    # the trainer: rewards are the environment's, and the official score is reported beside them
    training_args.model_init_kwargs = model_init_kwargs(training_args, model_args)
    rollout = ReportingRollout(make_environment)
    trainer = SeeUPOTrainer(
        model=model,
        reward_funcs=[success, environment_reward],
        args=training_args,
        train_dataset=train,
        rollout_func=rollout,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    if script_args.trained_layers is not None:
        train_last_layers(trainer.model, script_args.trained_layers)
    train_and_report(trainer, rollout, held_out, dataset_name="BFCL v4")


if __name__ == "__main__":
    run(main, (BfclArguments, Config, ModelConfig), CONFIGS, demonstration="smollm2_bfcl")
