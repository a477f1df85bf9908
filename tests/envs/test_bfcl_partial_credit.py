"""A user turn that does not pass may earn something for its calls, never as much as one that passes."""

import pytest


pytest.importorskip("bfcl_eval")

from seeupo_trl.envs.bfcl import BfclEnvironment, ground_truth_messages, load_bfcl
from seeupo_trl.envs.bfcl.partial_credit import share_of_calls_right


CD = ("cd", {"folder": "a"})
TOUCH = ("touch", {"file_name": "x"})


@pytest.mark.parametrize(
    "made, truth, share",
    [
        ([], [CD], 0.0),
        ([TOUCH], [CD], 0.0),
        ([CD], [CD], 1.0),
        ([("cd", {"folder": "b"})], [CD], 0.5),
        ([("cd", {})], [CD], 0.5),
        ([("cd", {"folder": "a", "mode": 1})], [CD], 0.75),
        ([TOUCH, CD], [CD, TOUCH], 1.0),  # in any order
        ([CD], [CD, TOUCH], 0.5),
        ([CD, CD], [CD], 0.5),  # superfluous
        ([("cd", {"folder": "b"}), CD], [CD], 0.5),  # the better one is matched
        ([("ls", {})], [("ls", {})], 1.0),
        ([("ls", {"a": 1})], [("ls", {"a": True})], 0.5),
        ([("f", {"x": 1})], [("f", {"x": 1.0})], 1.0),
        ([], [], 1.0),
    ],
)
def test_share_of_calls_right(made, truth, share):
    assert share_of_calls_right(made, truth) == share


def play(task, edit, **options):
    """Play the ground truth of a task, with its calls edited, and return the reward of each step."""
    messages = ground_truth_messages(task, one_call_a_message=True)
    environment = BfclEnvironment(**options)
    environment.reset(id=task)
    rewards = []
    for message in (edit(m) for m in messages if m["role"] == "assistant"):
        result = environment.step(message)
        rewards.append(result.reward)
        if result.terminated:
            break
    return rewards, result


def without_calls(message):
    return {**message, "tool_calls": []}


def with_another_argument(message):
    calls = [
        {**call, "function": {**call["function"], "arguments": dict.fromkeys(call["function"]["arguments"], "?")}}
        for call in message.get("tool_calls") or []
    ]
    return {**message, "tool_calls": calls}


@pytest.mark.parametrize("max_user_turns", [1, None])
def test_the_whole_reward_is_for_what_passes(max_user_turns):
    for task in load_bfcl("base", "train")["id"][:10]:
        options = {"reward": "calls", "success_reward": 2.0, "max_user_turns": max_user_turns}
        solved, result = play(task, lambda message: message, **options)
        assert result.info["success"]
        assert sum(solved) == pytest.approx(2.0)
        wrong, result = play(task, with_another_argument, **options)
        # where the argument makes no difference, the checks pass
        assert 0 < sum(wrong) <= (2.0 if any(result.info["turns_passed"]) else 1.0)
        nothing, _ = play(task, without_calls, **options, tool_list="needed")
        assert sum(nothing) == 0
