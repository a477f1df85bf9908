"""Tasks of BFCL to train on and to evaluate, and a model that has seen the ground truth of some."""

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from ..envs.bfcl import BfclEnvironment, ground_truth_messages, load_bfcl
from .arguments import BfclArguments, EvaluationArguments
from .cache import made_once
from .mistakes import UsageError
from .warm_up import warm_up


def choose_tasks(
    script_args: BfclArguments, tokenizer: PreTrainedTokenizerBase, environment: BfclEnvironment
) -> tuple[Dataset, dict[str, Dataset]]:
    """
    Training tasks, and the tasks to evaluate: some of the training split that are not trained on, and some of the test
    split. In the paper's scheme that is another domain (trading and travel instead of files and vehicles), in the
    stratified one the same.

    Raises:
        [`UsageError`]:
            When no task is left to train on.
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
    num_tests = count if script_args.test_tasks is None else script_args.test_tasks
    for name, tasks in {"training": train, "test": test}.items():
        if not len(tasks) and (name == "training" or num_tests):
            raise UsageError(f"--max_task_tokens {script_args.max_task_tokens} leaves no {name} task; raise it.")
    evaluated = {}
    if count:
        # every few tasks, because neighbours resemble one another
        chosen = list(range(0, len(train), max(len(train) // count, 1)))[:count]
        evaluated["held-out training-domain"] = train.select(chosen)
        # a task has the same number in all categories
        numbers = [id.rpartition("_")[2] for id in train["id"]]
        not_trained_on = {numbers[i] for i in chosen}
        num_tasks = len(train)
        train = train.select([i for i, number in enumerate(numbers) if number not in not_trained_on])
        if not len(train):
            raise UsageError(f"--held_out_tasks {count} leaves none of {num_tasks} tasks to train on; give fewer.")
    if num_tests:
        evaluated["test-split"] = test.select(range(min(num_tests, len(test))))
    return train, evaluated


def warmed_up(
    model: str,
    cache_dir: Path,
    train: Dataset,
    environment: BfclEnvironment,
    script_args: BfclArguments,
    **loading: Any,
) -> str:
    """
    Path of the model after the supervised warm-up, which runs only where its result is not in the cache.

    Args:
        model (`str`):
            Directory or name of the model to start from.
        cache_dir (`Path`):
            Where warmed-up models are kept.
        train (`Dataset`):
            Tasks whose ground truth is learned.
        environment ([`~seeupo_trl.envs.bfcl.BfclEnvironment`]):
            Shows the tasks as the policy will see them.
        script_args ([`BfclArguments`]):
            Number of steps, learning rate, and how many layers are trained.
        **loading:
            Given to `from_pretrained`, as `revision`.
    """
    steps, learning_rate = script_args.warmup_steps_sft, script_args.warmup_learning_rate
    if steps == 0:
        return model
    conversations = [
        (
            ground_truth_messages(id, environment, one_call_a_message=True),
            environment.reset(id=id).tools,
        )
        for id in train["id"]
    ]
    training = {"steps": steps, "learning_rate": learning_rate, "trained_layers": script_args.trained_layers}
    made_of = [model, _files_of(model), loading, conversations, training]
    digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
    return str(
        made_once(
            cache_dir / f"{Path(model).name}-warmed-up-{digest}",
            partial(warm_up, model, conversations=conversations, **training, **loading),
        )
    )


def _files_of(model: str) -> list[tuple[str, int, int]]:
    """Name, size and time of the files of a model in a directory, which may be another one the next time."""
    files = sorted(path for path in Path(model).glob("*") if path.is_file())
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def evaluation_tasks(script_args: EvaluationArguments) -> Dataset:
    """The tasks of all categories, as one dataset."""
    chosen = []
    for category in script_args.categories:
        tasks = load_bfcl(category, script_args.split)
        if script_args.num_tasks is not None:
            count = min(script_args.num_tasks, len(tasks))
            tasks = tasks.select([position * len(tasks) // count for position in range(count)])
        chosen.append(tasks)
    return concatenate_datasets(chosen)
