"""
Train an agent with SeeUPO on AppWorld: everyday tasks, solved by writing code against the APIs of nine apps.

AppWorld needs a virtual environment of its own and 750 tasks that are downloaded separately (without them, this
script prints the commands below and stops):

    python3.11 -m venv ~/appworld/venv
    ~/appworld/venv/bin/pip install appworld==0.1.3.post1
    ~/appworld/venv/bin/appworld install
    ~/appworld/venv/bin/appworld download data --root ~/appworld
    export SEEUPO_APPWORLD_PYTHON=~/appworld/venv/bin/python APPWORLD_ROOT=~/appworld

The published setup, on 8 GPUs:

    accelerate launch --config_file examples/accelerate_configs/zero3.yaml \\
        examples/train_appworld.py --config examples/configs/qwen3_14b_appworld.yaml

Code that the model writes is executed, with your rights: see
`seeupo_trl/envs/appworld/environment.py`. `seeupo-trl train appworld` runs this script, too.
"""

import os


# threads that wait for one another in a loop for long are slow where other programs run, and those that never do are
# slow where none does; read when torch is imported
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

from functools import partial
from pathlib import Path

from trl import ModelConfig, get_peft_config, get_quantization_config

from seeupo_trl import SeeUPOTrainer, environment_reward
from seeupo_trl.envs.appworld import AppWorldEnvironment, load_appworld
from seeupo_trl.envs.appworld.server import AppWorldServers
from seeupo_trl.recipes.arguments import AppWorldArguments
from seeupo_trl.recipes.parsing import run
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


CONFIGS = Path(__file__).with_name("configs")


def main(script_args: AppWorldArguments, training_args: Config, model_args: ModelConfig) -> None:
    if model_args.model_name_or_path is None:
        raise ValueError("Name a model by --model_name_or_path, or a configuration that does by --config.")
    if (training_args.max_concurrent_envs or script_args.num_servers) > script_args.num_servers:
        raise ValueError(
            f"max_concurrent_envs is {training_args.max_concurrent_envs}, num_servers {script_args.num_servers}; "
            "every environment needs a server of its own."
        )
    training_args.max_concurrent_envs = training_args.max_concurrent_envs or script_args.num_servers
    prepare_cpu(training_args)
    report_success(training_args)
    servers = AppWorldServers(
        script_args.num_servers,
        python=script_args.appworld_python,
        root=script_args.appworld_root,
        execution_timeout=script_args.execution_timeout,
        request_timeout=script_args.execution_timeout + 30.0,
        keep_outputs=script_args.keep_outputs,
    )
    train = load_appworld(script_args.split, root=servers.root)
    held_out = {}
    if script_args.held_out_tasks:
        tasks = load_appworld(script_args.held_out_split, root=servers.root)
        held_out[script_args.held_out_split] = tasks.select(range(min(script_args.held_out_tasks, len(tasks))))
    check_evaluation(training_args, held_out)
    make_environment = partial(
        AppWorldEnvironment,
        servers,
        success_reward=script_args.success_reward,
        partial_reward=script_args.partial_reward,
        max_observation_chars=script_args.max_observation_chars,
    )
    # rewards are the environment's, and AppWorld's score is reported beside them
    training_args.model_init_kwargs = model_init_kwargs(training_args, model_args)
    rollout = ReportingRollout(make_environment)
    servers.start()
    try:
        trainer = SeeUPOTrainer(
            model=model_args.model_name_or_path,
            reward_funcs=[success, environment_reward],
            args=training_args,
            train_dataset=train,
            rollout_func=rollout,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
        )
        train_and_report(trainer, rollout, held_out, dataset_name="AppWorld")
    finally:
        servers.close()


if __name__ == "__main__":
    run(main, (AppWorldArguments, Config, ModelConfig), CONFIGS)
