"""
Train an agent with SeeUPO on the multi-turn tasks of the Berkeley Function-Calling Leaderboard (BFCL v4).

Without arguments it runs a small demonstration on a CPU: SmolLM2-135M from PyPI, a short supervised warm-up, real
tasks with a reduced tool list (`configs/smollm2_bfcl.yaml` has every setting):

    accelerate launch examples/train_bfcl.py

The published setup, on 8 GPUs:

    accelerate launch --config_file examples/accelerate_configs/zero3.yaml \\
        examples/train_bfcl.py --config examples/configs/qwen3_14b_bfcl.yaml
"""

import hashlib
import os
import sys


# threads that wait for one another in a loop are slow where other programs run; read when torch is imported
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from reporting import Config, train_and_report, use_all_cores
from sft_warmup import warm_up
from smollm2 import default_cache_dir, smollm2, written_at_once
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import ModelConfig, TrlParser

from seeupo_trl.envs.bfcl import BfclEnvironment, ground_truth_messages, load_bfcl


DEMONSTRATION = Path(__file__).with_name("configs") / "smollm2_bfcl.yaml"


@dataclass
class BfclArguments:
    """
    Arguments of the task.

    Args:
        category (`str`, *optional*, defaults to `"multi_turn_base"`):
            Category of BFCL v4 multi-turn (`"base"`, `"miss_func"`, `"miss_param"`, `"long_context"`), several of them
            with commas between, or `"all"`.
        split_scheme (`str`, *optional*, defaults to `"paper"`):
            How tasks are split into training and test: `"paper"`, the first and the second half, or `"stratified"` by
            the services involved.
        split_seed (`int`, *optional*, defaults to `0`):
            Seed of the stratified split.
        protocol (`str`, *optional*, defaults to `"official"`):
            Limits of an episode: `"official"`, 20 steps a user turn, or `"paper"`, 10 assistant messages.
        tools (`str`, *optional*, defaults to `"full"`):
            How much of the functions' documents the policy sees: `"raw"`, `"full"`, `"trimmed"` or `"brief"`.
        tool_list (`str`, *optional*, defaults to `"classes"`):
            `"classes"`: all functions of the services involved. `"needed"`: those of the ground truth and
            `distractors` others.
        distractors (`int`, *optional*, defaults to `0`):
            See `tool_list`.
        max_user_turns (`int`, *optional*):
            Play only the first user turns of a task.
        reward (`str`, *optional*, defaults to `"success"`):
            `"success"`, the official score, or `"fraction"` of the user turns that pass.
        success_reward (`float`, *optional*, defaults to `1.0`):
            Reward of a solved task.
        max_task_tokens (`int`, *optional*):
            Leave out tasks whose ground-truth conversation is longer.
        held_out_tasks (`int`, *optional*, defaults to `0`):
            Tasks of the training split that are kept for evaluation, and number of tasks of the test split that are
            evaluated beside them, before and after training. 0 evaluates nothing.
        warmup_steps_sft (`int`, *optional*, defaults to `0`):
            Supervised steps on ground-truth conversations of training tasks before reinforcement learning. The
            result is kept in `cache_dir`.
        warmup_learning_rate (`float`, *optional*, defaults to `3e-4`):
            Learning rate of the warm-up.
        cache_dir (`str`, *optional*):
            Where converted and warmed-up models are kept. Defaults to `$SEEUPO_TRL_CACHE`, else
            `~/.cache/seeupo_trl`.
    """

    category: str = field(default="multi_turn_base", metadata={"help": "Categories, or 'all'."})
    split_scheme: str = field(default="paper", metadata={"help": "Training and test: 'paper' or 'stratified'."})
    split_seed: int = field(default=0, metadata={"help": "Seed of the stratified split."})
    protocol: str = field(default="official", metadata={"help": "Limits of an episode: 'official' or 'paper'."})
    tools: str = field(default="full", metadata={"help": "Documents shown: 'raw', 'full', 'trimmed' or 'brief'."})
    tool_list: str = field(default="classes", metadata={"help": "Functions shown: 'classes' or 'needed'."})
    distractors: int = field(default=0, metadata={"help": "With tool_list 'needed', how many others to add."})
    max_user_turns: int | None = field(default=None, metadata={"help": "Play only the first user turns."})
    reward: str = field(default="success", metadata={"help": "'success' or 'fraction' of user turns that pass."})
    success_reward: float = field(default=1.0, metadata={"help": "Reward of a solved task."})
    max_task_tokens: int | None = field(default=None, metadata={"help": "Leave out tasks with longer ground truth."})
    held_out_tasks: int = field(default=0, metadata={"help": "Tasks of each split evaluated before and after."})
    warmup_steps_sft: int = field(default=0, metadata={"help": "Supervised steps before reinforcement learning."})
    warmup_learning_rate: float = field(default=3e-4, metadata={"help": "Learning rate of the warm-up."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where converted and warmed-up models are kept."})


def main(script_args: BfclArguments, training_args: Config, model_args: ModelConfig) -> None:
    state = PartialState()
    use_all_cores(training_args)
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
    cache_dir = Path(script_args.cache_dir or default_cache_dir())
    model_name = model_args.model_name_or_path
    with state.main_process_first():
        base_model = str(smollm2(cache_dir)) if model_name is None else model_name
        tokenizer = AutoTokenizer.from_pretrained(base_model, trust_remote_code=training_args.trust_remote_code)
        train, held_out = choose_tasks(script_args, tokenizer, make_environment())
        model = warmed_up(base_model, cache_dir, train, make_environment(), script_args)

    train_and_report(model, make_environment, train, held_out, training_args, model_args, dataset_name="BFCL v4")


def choose_tasks(
    script_args: BfclArguments, tokenizer: PreTrainedTokenizerBase, environment: BfclEnvironment
) -> tuple[Dataset, dict[str, Dataset]]:
    """
    Training tasks, and the tasks to evaluate: some of the training split that are not trained on, and some of the test
    split, which is another domain in the paper's scheme (trading and travel instead of files and vehicles).
    """

    def is_short(row):
        tools = environment.reset(**row).tools
        messages = ground_truth_messages(row["id"], environment, one_call_a_message=True)
        tokens = tokenizer.apply_chat_template(messages, tools=tools, return_dict=False)
        return len(tokens) <= script_args.max_task_tokens

    categories = script_args.category.split(",")
    scheme = {"split_scheme": script_args.split_scheme, "seed": script_args.split_seed}
    splits = {split: load_bfcl(categories, split, **scheme) for split in ("train", "test")}
    if script_args.max_task_tokens is not None:
        splits = {
            name: split.select([i for i, row in enumerate(split) if is_short(row)]) for name, split in splits.items()
        }
    train, test, count = splits["train"], splits["test"], script_args.held_out_tasks
    if not count:
        return train, {}
    # every few tasks, because neighbours resemble one another
    chosen = list(range(0, len(train), max(len(train) // count, 1)))[:count]
    held_out = train.select(chosen)
    # a task has the same number in all categories
    numbers = [id.rpartition("_")[2] for id in train["id"]]
    not_trained_on = {numbers[i] for i in chosen}
    train = train.select([i for i, number in enumerate(numbers) if number not in not_trained_on])
    return train, {"held-out training-domain": held_out, "test-split": test.select(range(min(count, len(test))))}


def warmed_up(
    model: str, cache_dir: Path, train: Dataset, environment: BfclEnvironment, script_args: BfclArguments
) -> str:
    """Path of the model after the supervised warm-up, which runs only where its result is not in the cache."""
    steps = script_args.warmup_steps_sft
    if steps == 0:
        return model
    shown = script_args.tools, script_args.tool_list, script_args.distractors, script_args.max_user_turns
    settings = repr((model, train["id"], steps, script_args.warmup_learning_rate, shown))
    directory = cache_dir / f"{Path(model).name}-warmed-up-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"
    if not directory.is_dir():
        conversations = [
            (
                ground_truth_messages(id, environment, one_call_a_message=True),
                environment.reset(id=id).tools,
            )
            for id in train["id"]
        ]
        with written_at_once(directory) as temporary:
            warm_up(model, temporary, conversations, steps, script_args.warmup_learning_rate)
    return str(directory)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not any(argument.split("=")[0] in ("--config", "--model_name_or_path") for argument in arguments):
        arguments = ["--config", str(DEMONSTRATION), *arguments]
    main(*TrlParser((BfclArguments, Config, ModelConfig)).parse_args_and_config(arguments))
