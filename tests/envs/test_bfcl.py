"""BFCL: the conversation with its limits, functions that are held back, and the options of the environment."""

import json

import pytest


pytest.importorskip("bfcl_eval", reason="BFCL's package is optional")

from bfcl_play import ANSWER, calling, ids, play

from seeupo_trl.envs.bfcl import BfclEnvironment
from seeupo_trl.envs.bfcl.data import CATEGORIES, load_entries, load_function_docs
from seeupo_trl.envs.bfcl.services import ground_truth


# --- the conversation -----------------------------------------------------------------------------------------------


def test_a_user_turn_lasts_until_an_answer_without_calls():
    environment = BfclEnvironment()
    opening = environment.reset(id="multi_turn_base_0", prompt=[], category="multi_turn_base")
    entry = load_entries("multi_turn_base")["multi_turn_base_0"]
    assert opening.messages == entry["question"][0]
    step = environment.step(calling(("cd", {"folder": "document"}), ("pwd", {})))
    assert [message["name"] for message in step.messages] == ["cd", "pwd"] and not step.terminated
    step = environment.step(calling(("ls", {})))
    assert [message["name"] for message in step.messages] == ["ls"]
    assert step.info == {"category": "multi_turn_base", "success": False, "turns_passed": [], "failure": None}
    step = environment.step({**ANSWER, "parse_error": True})
    assert step.messages == entry["question"][1]
    assert step.info["turns_passed"] == [False] and "GorillaFileSystem" in step.info["failure"]


def test_more_than_twenty_steps_in_a_user_turn_fail_the_task():
    environment = BfclEnvironment()

    def pad(steps):
        environment.reset(id="multi_turn_base_0")
        truth = environment.ground_truth_calls()
        results = [environment.step(calling(("pwd", {}))) for _ in range(steps - 1)]
        results.append(environment.step({"role": "assistant", "content": "", "tool_calls": truth}))
        return results

    assert not any(result.truncated for result in pad(20))
    assert environment.step(ANSWER).info["turns_passed"] == [True]
    last = pad(21)[-1]
    assert last.truncated and not last.info["success"] and "More than 20 steps in turn 0" in last.info["failure"]


def test_the_step_limit_counts_each_user_turn_anew():
    environment = BfclEnvironment(max_steps_per_turn=2)
    environment.reset(id="multi_turn_base_0")
    for _ in range(3):
        for _ in range(2):
            assert not environment.step(calling(("pwd", {}))).truncated
        assert not environment.step(ANSWER).terminated


def test_the_step_that_is_one_too_many_still_counts_in_the_last_user_turn():
    """As in the official harness, which stops there but checks what it has."""
    environment = BfclEnvironment(max_steps_per_turn=2)
    environment.reset(id="multi_turn_base_0")
    while environment._turn < 3:
        environment.step({"role": "assistant", "content": "", "tool_calls": environment.ground_truth_calls()})
        environment.step(ANSWER)
    truth = environment.ground_truth_calls()
    for _ in range(2):
        assert not environment.step(calling(("pwd", {}))).truncated
    last = environment.step({"role": "assistant", "content": "", "tool_calls": truth})
    assert last.truncated and not last.terminated and last.messages == []
    assert last.info["success"] and last.reward == 1.0 and last.info["turns_passed"] == [True] * 4


def play_paper(task_id, messages):
    """Assistant messages, each a list of calls, in the paper's protocol; the last step result."""
    environment = BfclEnvironment(protocol="paper", reward="fraction")
    environment.reset(id=task_id)
    results = []
    for calls in messages:
        results.append(environment.step({**ANSWER, "tool_calls": calls} if calls else ANSWER))
    return results


def test_the_papers_protocol_ends_an_episode_after_ten_messages():
    pwd = calling(("pwd", {}))["tool_calls"]
    results = play_paper("multi_turn_base_0", [pwd] * 10)
    assert [result.truncated for result in results] == [False] * 9 + [True]
    assert "No end within 10 assistant messages, in turn 0" in results[-1].info["failure"]
    # a user turn may have any number of steps
    assert BfclEnvironment(protocol="paper").max_steps_per_turn is None


def test_the_papers_protocol_checks_an_unfinished_last_user_turn():
    task_id = "multi_turn_base_0"
    turns = [
        [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls]
        for calls in ground_truth(task_id)
    ]
    spoken = [message for calls in turns[:3] for message in (calls, [])]
    pwd = calling(("pwd", {}))["tool_calls"]
    for waste, solved in ((3, True), (4, False)):
        results = play_paper(task_id, ([*spoken, *[pwd] * waste, turns[3]])[:10])
        assert results[-1].truncated and results[-1].info["success"] is solved
        assert sum(result.reward for result in results) == (1.0 if solved else 0.75)
    # the tenth message ends the third user turn: the last one was never begun
    results = play_paper(task_id, [turns[0], [], turns[1], [], *[pwd] * 4, turns[2], []])
    assert results[-1].truncated and results[-1].info["turns_passed"] == [True] * 3
    assert "in turn 3" in results[-1].info["failure"]


def test_limits_can_be_set_one_by_one():
    environment = BfclEnvironment(protocol="paper", max_messages=12, max_steps_per_turn=5)
    assert (environment.max_messages, environment.max_steps_per_turn) == (12, 5)
    assert (BfclEnvironment().max_messages, BfclEnvironment().max_steps_per_turn) == (None, 20)


# --- functions held back --------------------------------------------------------------------------------------------


def test_functions_held_back_arrive_in_a_message_at_their_user_turn():
    environment = BfclEnvironment()
    opening = environment.reset(id="multi_turn_miss_func_0")
    assert "sort" not in [tool["function"]["name"] for tool in opening.tools] and len(opening.tools) == 18 + 14 - 1
    messages = [environment.step(ANSWER).messages for _ in range(4)]
    document = next(doc for doc in load_function_docs("GorillaFileSystem") if doc["name"] == "sort")
    assert messages[2] == [
        {
            "role": "user",
            "content": f"{[document]}\nI have updated some more functions you can choose from. What about now?",
        }
    ]
    entry = load_entries("multi_turn_miss_func")["multi_turn_miss_func_0"]
    assert messages[:2] == entry["question"][1:3] and messages[3] == entry["question"][4]


@pytest.mark.parametrize("detail", ["raw", "full", "trimmed", "brief"])
def test_every_function_is_shown_once_by_the_end(detail):
    environment = BfclEnvironment(tools=detail)
    for task_id in ids("multi_turn_miss_func")[::9]:
        opening = environment.reset(id=task_id)
        listed = [tool.get("function", tool)["name"] for tool in opening.tools]
        entry = load_entries("multi_turn_miss_func")[task_id]
        held_back = {name for names in entry["missed_function"].values() for name in names}
        all_names = [doc["name"] for service in entry["involved_classes"] for doc in load_function_docs(service)]
        assert held_back and sorted(listed) == sorted(set(all_names) - held_back)
        said = "".join(m["content"] for _ in entry["question"] for m in environment.step(ANSWER).messages)
        assert all(f"[{{'name': '{name}'" in said or f", {{'name': '{name}'" in said for name in held_back)
        assert ("'response'" in said) is (detail in ("raw", "full"))


def test_every_user_turn_says_something():
    for category in CATEGORIES:
        for task_id in ids(category)[::5]:
            environment = BfclEnvironment()
            messages = [environment.reset(id=task_id).messages]
            while not (result := environment.step(ANSWER)).terminated:
                messages.append(result.messages)
            assert all(len(turn) == 1 and turn[0]["role"] == "user" and turn[0]["content"] for turn in messages)
            assert len(messages) == len(load_entries(category)[task_id]["ground_truth"])


# --- options --------------------------------------------------------------------------------------------------------


def test_the_success_reward_is_paid_once_at_the_end():
    steps = play(BfclEnvironment(success_reward=1.5), "multi_turn_base_0")
    assert [step.reward for step in steps][-1] == 1.5 and sum(step.reward for step in steps) == 1.5


def test_the_fraction_of_user_turns_can_be_the_reward():
    environment = BfclEnvironment(reward="fraction", success_reward=2.0)
    assert sum(step.reward for step in play(environment, "multi_turn_base_0")) == 2.0
    steps = play(environment, "multi_turn_base_0", lambda turn, calls: calls if turn < 3 else [])
    assert steps[-1].info["turns_passed"] == [True, True, True, False]
    assert sum(step.reward for step in steps) == 1.5


def test_only_the_first_user_turns_can_be_played():
    environment = BfclEnvironment(max_user_turns=2)
    steps = play(environment, "multi_turn_base_0")
    assert len(steps[-1].info["turns_passed"]) == 2 and steps[-1].info["success"]
    assert sum(play(environment, task_id)[-1].info["success"] for task_id in ids()) == 200


def test_all_functions_of_the_services_are_shown():
    tools = BfclEnvironment().reset(id="multi_turn_base_0").tools
    assert len(tools) == 18 + 14
    names = [tool["function"]["name"] for tool in tools]
    entry = load_entries("multi_turn_base")["multi_turn_base_0"]
    assert names == [doc["name"] for service in entry["involved_classes"] for doc in load_function_docs(service)]


def test_tools_are_json_schemas():
    def types(value):
        if isinstance(value, dict):
            found = {value["type"]} if isinstance(value.get("type"), str) else set()
            return found.union(*map(types, value.values()))
        return set().union(*map(types, value)) if isinstance(value, list) else set()

    environment = BfclEnvironment()
    found = set()
    for task_id in ids():
        tools = environment.reset(id=task_id).tools
        json.dumps(tools)
        found |= types(tools)
    assert found == {"function", "object", "string", "number", "integer", "boolean", "array"}
    assert all(tool["type"] == "function" for tool in tools)


def test_a_parameter_named_type_is_not_taken_for_a_schema():
    docs = [doc for name in ("TicketAPI", "TradingBot") for doc in load_function_docs(name)]
    ticket = next(doc for doc in docs if doc["name"] == "edit_ticket")
    task_id = next(i for i, e in load_entries("multi_turn_base").items() if "TicketAPI" in e["involved_classes"])
    tools = {t["function"]["name"]: t["function"] for t in BfclEnvironment().reset(id=task_id).tools}
    shown = tools["edit_ticket"]["parameters"]["properties"]["updates"]
    assert shown["type"] == "object"
    assert set(shown["properties"]) == set(ticket["parameters"]["properties"]["updates"]["properties"])


def test_tool_documents_can_be_those_of_bfcl():
    tools = BfclEnvironment(tools="raw").reset(id="multi_turn_base_0").tools
    entry = load_entries("multi_turn_base")["multi_turn_base_0"]
    docs = [doc for service in entry["involved_classes"] for doc in load_function_docs(service)]
    hint = " Note that the provided function is in Python 3 syntax."
    assert tools == [{**doc, "description": doc["description"] + hint} for doc in docs]
    tools[0]["parameters"].clear()
    assert docs[0]["parameters"]


def test_tool_documents_can_be_shortened():
    shown = {
        detail: BfclEnvironment(tools=detail).reset(id="multi_turn_base_0").tools[0]["function"]
        for detail in ("full", "trimmed", "brief")
    }
    assert "response" in shown["full"] and "response" not in shown["trimmed"]
    assert shown["trimmed"]["description"].startswith("This tool belongs to")
    assert not shown["brief"]["description"].startswith("This tool belongs to")
    assert shown["full"]["parameters"] == shown["trimmed"]["parameters"] == shown["brief"]["parameters"]


def test_the_tool_list_can_be_cut_down_to_what_is_needed():
    def names(**options):
        tools = BfclEnvironment(tool_list="needed", **options).reset(id="multi_turn_base_0").tools
        return [tool["function"]["name"] for tool in tools]

    needed = ["cd", "diff", "grep", "mkdir", "mv", "sort"]
    assert sorted(names()) == needed
    assert sorted(names(max_user_turns=1)) == ["cd", "mkdir", "mv"]
    assert len(names(distractors=3)) == 9 and set(needed) < set(names(distractors=3))
    assert names(distractors=3) == names(distractors=3)
    assert len(names(distractors=1000)) == 32
    with pytest.raises(ValueError, match="distractors is -1; give the number of functions to add, 0 or more"):
        names(distractors=-1)


@pytest.mark.parametrize(
    "options",
    [
        {"protocol": "mine"},
        {"reward": "half"},
        {"tools": "none"},
        {"tool_list": "some"},
        {"max_user_turns": 0},
        {"max_steps_per_turn": 0},
        {"max_messages": 0},
    ],
)
def test_wrong_options_say_what_is_allowed(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} is .*(must be one of|at least 1)"):
        BfclEnvironment(**options)
