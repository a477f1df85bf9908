"""Two evaluations are compared task by task, and what is noise is called noise."""

import math

import numpy as np
import pytest

from seeupo_trl.envs import StopReason
from seeupo_trl.evaluation.comparison import compare
from seeupo_trl.evaluation.outcome import Outcome
from seeupo_trl.recipes.learning_curve import describe_change, print_learning_curve


def outcomes(successes: dict[str, list[bool | None]], stop_reason=StopReason.completed) -> list[Outcome]:
    return [
        Outcome(index=0, group=0, task=t, category=None, turns=1, stop_reason=stop_reason, success=s, reward=0.0)
        for t, values in successes.items()
        for s in values
    ]


def test_the_standard_error_is_that_of_the_differences_of_tasks():
    before = {"a": [False, False], "b": [True, False], "c": [True, True], "d": [False, None]}
    after = {"d": [True, True], "c": [True, True], "b": [True, True], "a": [True, False]}
    before |= {"e": [False], "f": [True, True], "g": [False, True], "h": [None, False]}
    after |= {"e": [True], "f": [True, True], "g": [True, True], "h": [True, False]}
    change = compare(outcomes(before), outcomes(after))
    differences = [0.5, 0.5, 0.0, 1.0, 1.0, 0.0, 0.5, 0.5]
    assert (change.before, change.after, change.tasks) == (0.375, 0.875, 8)
    assert change.difference == pytest.approx(np.mean(differences))
    assert change.standard_error == pytest.approx(np.std(differences, ddof=1) / 8**0.5)
    assert change.is_beyond_noise


def test_tasks_count_alike_however_often_they_were_played():
    change = compare(outcomes({"a": [False] * 9, "b": [True]}), outcomes({"a": [False], "b": [True] * 5}))
    assert (change.before, change.after, change.difference) == (0.5, 0.5, 0.0)
    assert not change.is_beyond_noise


def test_spoiled_episodes_and_tasks_of_one_side_are_left_out():
    spoiled = outcomes({"a": [True], "b": [True]}, stop_reason=StopReason.env_error)
    change = compare(outcomes({"a": [False], "c": [True]}) + spoiled, outcomes({"a": [True], "b": [True]}))
    assert (change.before, change.after, change.tasks) == (0.0, 1.0, 1)
    assert math.isnan(change.standard_error)
    assert not change.is_beyond_noise


def test_without_a_common_task_there_is_nothing_to_compare():
    with pytest.raises(ValueError, match="no task in common"):
        compare(outcomes({"a": [True]}), outcomes({"b": [True]}))


def test_the_sentence_says_what_is_noise():
    better = compare(outcomes(dict.fromkeys("abcdef", [False])), outcomes(dict.fromkeys("abcdef", [True])))
    assert describe_change("held-out", better, "0.000", "1.000") == (
        "success on 6 held-out tasks: 0.000 before, 1.000 after; difference +1.000, standard error 0.000 "
        "(more than two standard errors)"
    )
    halves = [dict.fromkeys("abcd", [True]), dict.fromkeys("efgh", [False])]
    same = compare(
        outcomes(halves[0] | halves[1]), outcomes(dict.fromkeys("abcd", [False]) | dict.fromkeys("efgh", [True]))
    )
    assert "noise" in describe_change("held-out", same, "0.500", "0.500")


def test_a_few_tasks_that_all_move_alike_are_no_verdict():
    change = compare(outcomes(dict.fromkeys("abcde", [False])), outcomes(dict.fromkeys("abcde", [True])))
    assert (change.difference, change.standard_error, change.is_beyond_noise) == (1.0, 0.0, False)
    assert "(fewer than 6 tasks: too few to tell from noise)" in describe_change("new", change, "0.000", "1.000")


def test_evaluations_without_any_success_cannot_be_compared():
    silent, heard = outcomes(dict.fromkeys("abcdef", [None])), outcomes(dict.fromkeys("abcdef", [True]))
    with pytest.raises(ValueError, match="No episode.*reports success.*set `success_threshold`"):
        compare(silent, silent)
    # one of the two says that success is reported: before, all episodes ended too early
    assert compare(silent, heard).difference == 1.0


def test_the_curve_has_a_bar_for_iterations_that_follow_one_another(capsys):
    pytest.importorskip("rich")
    history = [{"step": i, "reward": 0.5, "rewards/success/mean": i / 50} for i in range(1, 51)]
    change = compare(outcomes({"a": [True, False]}), outcomes({"a": [True]}))
    print_learning_curve(
        [{"step": 0, "eval_reward": 1.0}, *history, {"step": 50, "train_runtime": 1.0}], {"new": change}
    )
    *bars, before, after = [line for line in capsys.readouterr().out.splitlines() if "█" in line]
    assert [line.split()[1] for line in bars[:2] + bars[-1:]] == ["1-3", "4-6", "49-50"]
    lengths = [line.count("█") for line in bars]
    assert lengths == sorted(lengths) and lengths[-1] > 25
    assert before.split()[:3] == ["new,", "before", "0.50"] and after.split()[:3] == ["new,", "after", "1.00"]
    assert after.count("█") == 2 * before.count("█") == 28
    print_learning_curve([], {})
    assert capsys.readouterr().out == ""
