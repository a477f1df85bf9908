"""Which tasks a run of the BFCL script trains on, and which it evaluates."""

import pytest


pytest.importorskip("bfcl_eval")

from byte_tokenizer import byte_tokenizer

from seeupo_trl.envs.bfcl import BfclEnvironment, load_bfcl
from seeupo_trl.recipes.arguments import BfclArguments
from seeupo_trl.recipes.bfcl import choose_tasks
from seeupo_trl.recipes.mistakes import UsageError
from seeupo_trl.recipes.training import Config, check_evaluation


def chosen(**arguments):
    train, evaluated = choose_tasks(BfclArguments(**arguments), byte_tokenizer("qwen2_5"), BfclEnvironment())
    return train["id"], {name: tasks["id"] for name, tasks in evaluated.items()}


def test_nothing_is_evaluated_by_default():
    train, evaluated = chosen()
    assert (len(train), evaluated) == (100, {})


def test_held_out_tasks_are_not_trained_on_in_any_category():
    train, evaluated = chosen(held_out_tasks=10, category="base,miss_func")
    assert {name: len(ids) for name, ids in evaluated.items()} == {"held-out training-domain": 10, "test-split": 10}
    held_out = {id.rpartition("_")[2] for id in evaluated["held-out training-domain"]}
    assert len(train) == 200 - 2 * len(held_out)
    assert held_out.isdisjoint(id.rpartition("_")[2] for id in train)


@pytest.mark.parametrize("held_out_tasks", [0, 4])
@pytest.mark.parametrize("test_tasks", [0, 7])
def test_tasks_of_the_test_split_have_a_number_of_their_own(held_out_tasks, test_tasks):
    train, evaluated = chosen(held_out_tasks=held_out_tasks, test_tasks=test_tasks, split_scheme="stratified")
    counts = {"held-out training-domain": held_out_tasks, "test-split": test_tasks}
    assert {name: len(ids) for name, ids in evaluated.items()} == {n: count for n, count in counts.items() if count}
    test_split = set(load_bfcl("base", "test", split_scheme="stratified")["id"])
    assert set(evaluated.get("test-split", [])) <= test_split
    assert test_split.isdisjoint(train)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_task_tokens": 1}, "--max_task_tokens 1 leaves no training task"),
        ({"held_out_tasks": 1000}, "--held_out_tasks 1000 leaves none of 100 tasks to train on"),
    ],
    ids=str,
)
def test_an_option_that_leaves_no_task_is_named(arguments, message):
    with pytest.raises(UsageError, match=message):
        chosen(**arguments)


def test_an_evaluation_that_cannot_be_made_is_refused_before_the_warm_up(tmp_path):
    tasks = load_bfcl("base", "test")
    options = {"output_dir": str(tmp_path), "num_generations": 8, "num_generations_eval": 4, "report_to": "none"}
    check_evaluation(Config(**options, per_device_eval_batch_size=60), {"tasks": tasks})
    config = Config(**options, per_device_eval_batch_size=90)
    with pytest.raises(ValueError, match="90 episodes .* whole groups of 4"):
        check_evaluation(config, {"tasks": tasks})
    check_evaluation(config, {})
    config = Config(**options, per_device_eval_batch_size=None)
    with pytest.raises(ValueError, match="--per_device_eval_batch_size is null"):
        check_evaluation(config, {"tasks": tasks})
    check_evaluation(config, {})
    # as many attempts as a group has where the number is not given
    check_evaluation(Config(**options | {"num_generations_eval": None}, per_device_eval_batch_size=80), {"x": tasks})
