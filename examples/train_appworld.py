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

Code that the model writes is executed, with your rights: see `seeupo_trl/envs/appworld.py`.
"""

import os


# threads that wait for one another in a loop are slow where other programs run; read when torch is imported
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from dataclasses import dataclass, field
from functools import partial

from reporting import Config, train_and_report, use_all_cores
from trl import ModelConfig, TrlParser

from seeupo_trl.envs.appworld import AppWorldEnvironment, load_appworld
from seeupo_trl.envs.appworld.server import AppWorldServers


@dataclass
class AppWorldArguments:
    """
    Arguments of the task.

    Args:
        appworld_python (`str`, *optional*):
            Python interpreter of AppWorld's virtual environment. Defaults to `$SEEUPO_APPWORLD_PYTHON`.
        appworld_root (`str`, *optional*):
            Directory that AppWorld's data was downloaded to. Defaults to `$APPWORLD_ROOT`.
        num_servers (`int`, *optional*, defaults to `32`):
            Most AppWorld servers of each training process. Not less than `max_concurrent_envs`.
        split (`str`, *optional*, defaults to `"train"`):
            Tasks to train on.
        held_out_split (`str`, *optional*, defaults to `"dev"`):
            Tasks to evaluate on.
        held_out_tasks (`int`, *optional*, defaults to `0`):
            How many of those are evaluated, before and after training. 0 evaluates nothing.
        success_reward (`float`, *optional*, defaults to `1.5`):
            Reward of a solved task.
        partial_reward (`float`, *optional*, defaults to `0.5`):
            Factor of the fraction of passed tests in the reward of any other.
        max_observation_chars (`int`, *optional*, defaults to `20000`):
            Most characters of output shown to the model.
        execution_timeout (`int`, *optional*, defaults to `60`):
            Seconds after which the model's code is interrupted.
        keep_outputs (`str`, *optional*):
            Directory where what AppWorld writes about each episode is kept.
    """

    appworld_python: str | None = field(default=None, metadata={"help": "Python of AppWorld's environment."})
    appworld_root: str | None = field(default=None, metadata={"help": "Where AppWorld's data is."})
    num_servers: int = field(default=32, metadata={"help": "Most AppWorld servers of each process."})
    split: str = field(default="train", metadata={"help": "Tasks to train on."})
    held_out_split: str = field(default="dev", metadata={"help": "Tasks to evaluate on."})
    held_out_tasks: int = field(default=0, metadata={"help": "How many of those, before and after training."})
    success_reward: float = field(default=1.5, metadata={"help": "Reward of a solved task."})
    partial_reward: float = field(default=0.5, metadata={"help": "Factor of the passed tests in any other reward."})
    max_observation_chars: int = field(default=20_000, metadata={"help": "Most characters of output shown."})
    execution_timeout: int = field(default=60, metadata={"help": "Seconds until the model's code is interrupted."})
    keep_outputs: str | None = field(default=None, metadata={"help": "Where AppWorld's files of episodes are kept."})


def main(script_args: AppWorldArguments, training_args: Config, model_args: ModelConfig) -> None:
    if model_args.model_name_or_path is None:
        raise ValueError("Name a model by --model_name_or_path, or a configuration that does by --config.")
    if (training_args.max_concurrent_envs or script_args.num_servers) > script_args.num_servers:
        raise ValueError(
            f"max_concurrent_envs is {training_args.max_concurrent_envs}, num_servers {script_args.num_servers}; "
            "every environment needs a server of its own."
        )
    training_args.max_concurrent_envs = training_args.max_concurrent_envs or script_args.num_servers
    use_all_cores(training_args)
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
    make_environment = partial(
        AppWorldEnvironment,
        servers,
        success_reward=script_args.success_reward,
        partial_reward=script_args.partial_reward,
        max_observation_chars=script_args.max_observation_chars,
    )
    servers.start()
    try:
        train_and_report(
            model_args.model_name_or_path,
            make_environment,
            train,
            held_out,
            training_args,
            model_args,
            dataset_name="AppWorld",
        )
    finally:
        servers.close()


if __name__ == "__main__":
    main(*TrlParser((AppWorldArguments, Config, ModelConfig)).parse_args_and_config())
