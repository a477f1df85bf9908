"""BFCL: scores and conversations equal those of the official implementation, on trajectories of all kinds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("bfcl_eval", reason="BFCL's package is optional")

from bfcl_trajectories import compare, official_verdicts, play, random_trajectories

from seeupo_trl.envs.bfcl.checks import check_trajectory
from seeupo_trl.envs.bfcl.data import CATEGORIES, load_entries
from seeupo_trl.envs.bfcl.services import ground_truth


def truth(task_id):
    """The ground truth as a trajectory: one message with all calls of a user turn."""
    return [[calls] if calls else [] for calls in ground_truth(task_id)]


def with_extra(task_id, turn, *calls):
    """The ground truth with a message of other calls before those of a user turn."""
    return [[list(calls), *steps] if i == turn else steps for i, steps in enumerate(truth(task_id))]


def verdicts(trajectories):
    """Official verdicts, after the others have been found to be the same."""
    official = official_verdicts(trajectories)
    for (task_id, turns), verdict in zip(trajectories, official, strict=True):
        assert (check_trajectory(task_id, turns) is None) is (verdict is True), task_id
        assert play(task_id, turns).info["success"] is (verdict is True), task_id
    return official


@pytest.mark.timeout(300)
@pytest.mark.parametrize("category", CATEGORIES)
def test_scores_equal_the_official_checkers_from_many_threads_at_once(category):
    """Correct, corrupted, padded, reordered, partial and empty trajectories; `bfcl_trajectories.py` compares more."""
    trajectories = random_trajectories(category, tasks=40, each=2)
    valid, different = compare(trajectories, threads=32)
    assert different == []
    assert 20 < valid < 60


@pytest.mark.timeout(300)
def test_conversations_equal_the_official_harness(tmp_path):
    """
    Tools, user messages (those of the functions held back), texts of results, and where a user turn and the episode
    end, the 20 steps exceeded included.
    """
    lines = []
    for category in CATEGORIES:
        for task_id, turns in random_trajectories(category, tasks=12, each=1, seed=3):
            turns = turns + [[]] * (len(ground_truth(task_id)) - len(turns))
            lines.append([task_id, _responses(turns)])
    task_id = "multi_turn_miss_func_5"
    turns, reading = truth(task_id), [("pwd", {})]
    for turn in (0, 2, len(turns) - 1):
        for steps in (19, 20, 21):
            padded = [[reading] * steps + calls if i == turn else calls for i, calls in enumerate(turns)]
            lines.append([task_id, _responses(padded)])
    done = subprocess.run(
        [sys.executable, Path(__file__).parents[1] / "helpers" / "bfcl_harness.py"],
        input="\n".join(map(json.dumps, lines)),
        capture_output=True,
        text=True,
        env={**os.environ, "BFCL_PROJECT_ROOT": str(tmp_path)},
    )
    assert done.stdout == "compared\n", done.stdout + done.stderr


def _responses(turns):
    """Assistant messages, each a list of calls, empty where a user turn ends; the last ones are never asked for."""
    named = [
        [[{"name": name, "arguments": arguments} for name, arguments in step] for step in steps] for steps in turns
    ]
    return [message for steps in named for message in [*steps, []]] + [[]] * 3


def test_trajectories_of_too_few_or_too_many_user_turns_fail():
    """`multi_turn_checker` raises or looks at the first ones only; the official evaluation fails them before."""
    task_id = "multi_turn_base_0"
    complete = truth(task_id)
    assert check_trajectory(task_id, complete) is None
    for turns in (complete[:-1], [], [*complete, []]):
        assert "user turns, the task 4" in check_trajectory(task_id, turns)
    assert official_verdicts([(task_id, complete[:-1])]) == [False]


def test_calls_where_nothing_should_be_called_show_in_the_next_user_turn():
    task_id = "multi_turn_miss_func_0"
    empty = ground_truth(task_id).index([])
    harmless = with_extra(task_id, empty, ("ls", {}))
    harmful = with_extra(task_id, empty, ("touch", {"file_name": "x"}))
    assert verdicts([(task_id, harmless), (task_id, harmful)]) == [True, False]


def test_functions_held_back_can_be_called_early_as_in_the_official_executor():
    task_id = "multi_turn_miss_func_0"
    assert load_entries("multi_turn_miss_func")[task_id]["missed_function"] == {"3": ["sort"]}
    turns = truth(task_id)
    turns[2], turns[3] = turns[3], [[("pwd", {})]]
    assert verdicts([(task_id, turns)]) == [True]


def test_what_two_sets_of_services_share_officially_is_shared():
    """
    A tweet without mentions holds the list that is the default argument of `post_tweet`, and cards of long contexts
    are dicts of a module: the official checker cannot see when a model changes them.
    """
    task_id = next(
        task_id
        for task_id, entry in load_entries("multi_turn_base").items()
        if any("post_tweet" in call and "mentions" not in call for call in sum(entry["ground_truth"][:-1], []))
    )
    last = len(ground_truth(task_id)) - 1
    tweet_id = load_entries("multi_turn_base")[task_id]["initial_config"]["TwitterAPI"]["tweet_counter"]
    mention = ("mention", {"tweet_id": tweet_id, "mentioned_usernames": ["@nobody"]})
    comment = ("comment", {"tweet_id": tweet_id, "comment_content": "!"})
    trajectories = [(task_id, with_extra(task_id, last, call)) for call in (mention, comment)]
    assert verdicts(trajectories) == [True, False]


def test_dicts_of_the_long_context_module_are_shared_within_an_episode_only():
    from bfcl_eval.eval_checker.multi_turn_eval.func_source_code import long_context

    card_id = next(iter(long_context.CREDIT_CARD_EXTENSION))
    booking_id = next(iter(long_context.BOOKING_RECORD_EXTENSION))
    before = json.dumps([long_context.CREDIT_CARD_EXTENSION, long_context.BOOKING_RECORD_EXTENSION])
    trajectories = []
    for task_id, entry in load_entries("multi_turn_long_context").items():
        config = entry["initial_config"].get("TravelAPI", {})
        if "TravelAPI" in entry["involved_classes"] and "access_token" in config:
            insurance = {
                "access_token": config["access_token"],
                "insurance_type": "travel",
                "booking_id": booking_id,
                "insurance_cost": 1.0,
                "card_id": card_id,
            }
            last = len(entry["ground_truth"]) - 1
            trajectories.append((task_id, with_extra(task_id, last, ("purchase_insurance", insurance))))
            cancel = {"access_token": config["access_token"], "booking_id": booking_id}
            trajectories.append((task_id, with_extra(task_id, last, ("cancel_booking", cancel))))
    found = verdicts(trajectories[:8])
    assert True in found and False in found
    assert json.dumps([long_context.CREDIT_CARD_EXTENSION, long_context.BOOKING_RECORD_EXTENSION]) == before
