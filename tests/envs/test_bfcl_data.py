"""BFCL: splits, categories and the conversations of the ground truth."""

import json
import subprocess
import sys
from collections import Counter

import pytest


pytest.importorskip("bfcl_eval", reason="BFCL's package is optional")

from bfcl_play import ANSWER, ids, play

from seeupo_trl.envs.bfcl import BfclEnvironment, ground_truth_messages, load_bfcl
from seeupo_trl.envs.bfcl.data import CATEGORIES, load_entries


TRAIN_OF_SEED_0 = [0, 1, 2, 3, 5, 7, 9, 13]  # the split is the same everywhere


def test_categories_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="'composite'; it must be one of 'multi_turn_base'.*, short 'base'"):
        load_bfcl("composite")
    with pytest.raises(ValueError, match="'multi_turn_composite'; it must be one of 'multi_turn_base'"):
        load_bfcl(["base", "multi_turn_composite"])
    with pytest.raises(ValueError, match="'multi_turn_composite_0' is 'multi_turn_composite'; it must be one of"):
        BfclEnvironment().reset(id="multi_turn_composite_0")
    with pytest.raises(ValueError, match="There is no task 'multi_turn_base_200'; .*multi_turn_base_0 to _199"):
        BfclEnvironment().reset(id="multi_turn_base_200")


def test_the_splits_are_those_of_the_paper():
    train, test, everything = (load_bfcl(split=split) for split in ("train", "test", "all"))
    assert train["id"][:2] == ["multi_turn_base_0", "multi_turn_base_1"] and train["id"][-1] == "multi_turn_base_99"
    assert test["id"][0] == "multi_turn_base_100" and len(test) == 100 and len(everything) == 200
    assert train.column_names == ["prompt", "id", "category"]
    assert train[0]["prompt"][0]["role"] == "user" and train[0]["prompt"][0]["content"].startswith("Move 'final")


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_category_has_the_same_splits(category):
    short = category.removeprefix("multi_turn_")
    for scheme in ("paper", "stratified"):
        train, test = (load_bfcl(short, split, split_scheme=scheme) for split in ("train", "test"))
        assert len(train) == len(test) == 100
        assert set(train["id"]) | set(test["id"]) == set(ids(category))
        assert set(train["category"]) == {category}
        base = load_bfcl("base", "train", split_scheme=scheme)
        assert [i.removeprefix(category) for i in train["id"]] == [
            i.removeprefix("multi_turn_base") for i in base["id"]
        ]


def test_several_categories_follow_one_another():
    both = load_bfcl(["long_context", "multi_turn_base"], "test")
    assert both["category"] == ["multi_turn_long_context"] * 100 + ["multi_turn_base"] * 100
    everything = load_bfcl("all", "all")
    assert len(everything) == len(set(everything["id"])) == 800
    assert list(dict.fromkeys(everything["category"])) == list(CATEGORIES)
    assert len({json.dumps(prompt) for prompt in everything["prompt"]}) == 800


def test_the_stratified_split_halves_every_combination_of_services():
    def services(split, seed):
        tasks = load_bfcl(split=split, split_scheme="stratified", seed=seed)["id"]
        entries = load_entries("multi_turn_base")
        return tasks, Counter(tuple(sorted(entries[task_id]["involved_classes"])) for task_id in tasks)

    (train, in_train), (_, in_test) = services("train", 0), services("test", 0)
    assert len(in_train | in_test) == 20
    assert all(abs(in_train[combination] - in_test[combination]) <= 1 for combination in in_train | in_test)
    assert train == services("train", 0)[0] and train != services("train", 1)[0]
    assert train[:8] == [f"multi_turn_base_{i}" for i in TRAIN_OF_SEED_0]


@pytest.mark.parametrize("options", [{"split": "dev"}, {"split_scheme": "random"}])
def test_splits_that_do_not_exist_are_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} is .*must be one of"):
        load_bfcl(**options)


def test_results_say_their_category():
    for category in CATEGORIES:
        assert play(BfclEnvironment(), f"{category}_7")[-1].info["category"] == category


def test_every_prompt_is_different():
    assert len({json.dumps(prompt) for prompt in load_bfcl(split="all")["prompt"]}) == 200


def test_ground_truth_messages_are_a_whole_conversation():
    messages = ground_truth_messages("multi_turn_base_0")
    roles = [message["role"] for message in messages]
    assert roles[:6] == ["user", "assistant", "tool", "tool", "tool", "assistant"]
    assert roles.count("user") == 4 and messages[-1] == ANSWER
    paper = ground_truth_messages("multi_turn_base_0", BfclEnvironment(protocol="paper"), one_call_a_message=True)
    assert len([message for message in paper if message["role"] == "assistant"]) > 10
    single = ground_truth_messages("multi_turn_base_0", one_call_a_message=True, closing="OK.")
    assert [m["role"] for m in single][:8] == ["user", *["assistant", "tool"] * 3, "assistant"]
    assert single[-1]["content"] == "OK."
    short = ground_truth_messages("multi_turn_base_0", BfclEnvironment(max_user_turns=1))
    assert [message["role"] for message in short].count("user") == 1


def test_without_the_package_the_error_says_what_to_install():
    code = "import sys; sys.modules['bfcl_eval'] = None; import seeupo_trl.envs.bfcl"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError" in done.stderr and "pip install --no-deps bfcl-eval==" in done.stderr
