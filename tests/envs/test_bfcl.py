"""BFCL: the ground truth scores 100 %, anything less fails, and nothing the model writes is ever evaluated."""

import json
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest


pytest.importorskip("bfcl_eval", reason="BFCL's package is optional")

from seeupo_trl.envs.bfcl import BfclEnvironment, ground_truth_messages, load_bfcl
from seeupo_trl.envs.bfcl.data import CATEGORIES, load_entries, load_function_docs
from seeupo_trl.envs.bfcl.services import Services, ground_truth


TRAIN_OF_SEED_0 = [0, 1, 2, 3, 5, 7, 9, 13]  # the split is the same everywhere
ANSWER = {"role": "assistant", "content": "Done."}


def ids(category="multi_turn_base"):
    return list(load_bfcl(category, split="all")["id"])


def calling(*calls):
    """An assistant message with calls, each `(name, arguments)`."""
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls],
    }


def call(environment, name, arguments):
    (message,) = environment.step(calling((name, arguments))).messages
    assert message["role"] == "tool"
    return message["content"]


def play(environment, task_id, change=lambda turn, calls: calls):
    """Play the ground truth, after `change(turn, calls)`; returns all step results."""
    environment.reset(id=task_id)
    results = []
    while not (results and results[-1].terminated):
        calls = change(len(results and results[-1].info["turns_passed"]), environment.ground_truth_calls())
        if calls:
            results.append(environment.step({"role": "assistant", "content": "", "tool_calls": calls}))
        results.append(environment.step(ANSWER))
    return results


@pytest.fixture
def environment():
    environment = BfclEnvironment()
    environment.reset(id="multi_turn_base_0")
    return environment


# --- scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("category", CATEGORIES)
def test_the_ground_truth_solves_every_task(category):
    environment = BfclEnvironment()
    results = [play(environment, task_id) for task_id in ids(category)]
    assert len(results) == 200
    assert sum(steps[-1].info["success"] for steps in results) == 200
    assert sum(sum(step.reward for step in steps) for steps in results) == 200.0
    assert all(all(steps[-1].info["turns_passed"]) for steps in results)


@pytest.mark.parametrize("category", CATEGORIES)
def test_without_the_last_call_no_task_is_solved(category):
    environment = BfclEnvironment()
    for task_id in ids(category):
        truth = load_entries(category)[task_id]["ground_truth"]
        last = max(turn for turn, calls in enumerate(truth) if calls)
        steps = play(environment, task_id, lambda turn, calls, last=last: calls[:-1] if turn == last else calls)
        assert not steps[-1].info["success"] and sum(step.reward for step in steps) == 0.0


@pytest.mark.parametrize("category", CATEGORIES)
def test_empty_answers_solve_no_task(category):
    environment = BfclEnvironment()
    for task_id in ids(category):
        steps = play(environment, task_id, lambda turn, calls: [])
        assert not steps[-1].info["success"] and sum(step.reward for step in steps) == 0.0
        assert "Model response list is empty" in steps[-1].info["failure"]


def test_many_threads_at_once_give_the_same_scores():
    tasks = ids() * 3
    with ThreadPoolExecutor(64) as threads:
        results = list(threads.map(lambda task_id: play(BfclEnvironment(), task_id)[-1], tasks))
    assert sum(result.info["success"] for result in results) == len(tasks) == 600


def test_a_wrong_episode_leaves_nothing_behind():
    environment = BfclEnvironment()
    for task_id in ids()[:50]:
        assert not play(environment, task_id, lambda turn, calls: calls[:1])[-1].info["turns_passed"] == []
        assert play(environment, task_id)[-1].info["success"]


def test_a_long_context_episode_leaves_the_package_as_it_was():
    """The scenarios hand dicts of the package's modules to the services."""
    task_id = next(
        i for i in ids("multi_turn_long_context") if "TravelAPI" in str(load_entries("multi_turn_long_context")[i])
    )
    outputs = [
        [message["content"] for step in play(BfclEnvironment(), task_id) for message in step.messages]
        for _ in range(3)
    ]
    assert outputs[0] == outputs[1] == outputs[2]


def test_extra_calls_that_change_nothing_are_allowed():
    environment = BfclEnvironment()
    pwd = calling(("pwd", {}))["tool_calls"]
    assert play(environment, "multi_turn_base_0", lambda turn, calls: pwd + calls)[-1].info["success"]


# --- against the official implementation ----------------------------------------------------------------------------


@pytest.mark.parametrize("category", CATEGORIES)
def test_outputs_equal_the_official_executors(category):
    """Ground truth of all tasks, both ways. The official executor runs in a process of its own: it evaluates code."""
    code = f"""
import json
from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_utils import execute_multi_turn_func_call as execute
from seeupo_trl.envs.bfcl.data import load_entries
outputs = {{}}
for task_id, entry in load_entries({category!r}).items():
    outputs[task_id] = [
        execute(calls, entry["initial_config"], entry["involved_classes"], "m", task_id, "long" in task_id)[0]
        for calls in entry["ground_truth"]
    ]
print(json.dumps(outputs))
"""
    official = json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)
    # It hands the dicts of its own modules to long-context trips, so that a task changes the ones after it.
    shared = {
        task_id
        for task_id in official
        if "long_context" in category and "Travel" in str(load_entries(category)[task_id]["involved_classes"])
    }
    compared = 0
    for task_id, turns in official.items():
        entry = load_entries(category)[task_id]
        services = Services(entry)
        ours = [[services.call(*services.parse_call(call)) for call in calls] for calls in entry["ground_truth"]]
        if task_id not in shared:
            assert ours == turns, task_id
            compared += sum(map(len, turns))
    assert compared > 800


def test_nothing_is_stored_in_the_official_executor_or_on_disk():
    code = """
import sys, pathlib
from seeupo_trl.envs.bfcl import ground_truth_messages, load_bfcl
from bfcl_eval.eval_checker.multi_turn_eval import multi_turn_utils
before = set(vars(multi_turn_utils))
site = pathlib.Path(multi_turn_utils.__file__).parents[3]
files = set(site.iterdir())
for task_id in load_bfcl(split="all")["id"]:
    ground_truth_messages(task_id)
assert set(vars(multi_turn_utils)) == before
assert set(site.iterdir()) == files
assert "bfcl_eval.constants.eval_config" not in sys.modules, "importing it creates directories"
assert "bfcl_eval.eval_checker.eval_runner" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# --- calls ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "__import__('os').system",
        "__import__('pathlib').Path('{path}').touch",
        "open",
        "print",
        "exit",
        "_load_scenario",
        "__init__",
        "__class__",
        "_current_dir",
        "root",
        "GorillaFileSystem.ls",
        "",
        "ls()",
    ],
)
def test_only_documented_functions_can_be_called(environment, tmp_path, name):
    target = tmp_path / "pwned"
    name = name.replace("{path}", str(target))
    arguments = {"command": f"touch {target}"}
    assert call(environment, name, arguments) == f"Error during execution: name '{name}' is not defined"
    assert call(environment, name, {}) == f"Error during execution: name '{name}' is not defined"
    assert not target.exists()


def test_every_documented_function_can_be_called_and_nothing_else():
    entry = {**load_entries("multi_turn_base")["multi_turn_base_0"]}
    for class_name in {name for e in load_entries("multi_turn_base").values() for name in e["involved_classes"]}:
        entry["involved_classes"] = [class_name]
        services = Services(entry)
        for doc in load_function_docs(class_name):
            assert "is not defined" not in services.call(doc["name"], {"no such argument": 1})
            assert not doc["name"].startswith("_")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "GorillaFileSystem.cd() missing 1 required positional argument: 'folder'"),
        ({"folder": "document", "x": 1}, "GorillaFileSystem.cd() got an unexpected keyword argument 'x'"),
        ({"folder": "document", "self": 1}, "GorillaFileSystem.cd() got multiple values for argument 'self'"),
        ({"folder": 3}, "'int' object has no attribute 'rstrip'"),
        (["document"], "the arguments of cd must be a JSON object"),
        ("document", "the arguments of cd must be a JSON object"),
        (None, "the arguments of cd must be a JSON object"),
        (3.5, "the arguments of cd must be a JSON object"),
    ],
)
def test_wrong_arguments_come_back_as_an_error(environment, arguments, text):
    assert call(environment, "cd", arguments) == f"Error during execution: {text}"
    assert call(environment, "cd", {"folder": "document"}) == '{"current_working_directory": "document"}'


def test_arguments_may_be_json_text(environment):
    assert call(environment, "cd", '{"folder": "document"}') == '{"current_working_directory": "document"}'


def test_strings_are_data_even_if_they_look_like_calls(environment):
    text = "ls() and __import__('os').getcwd() and sort(x)"
    call(environment, "touch", {"file_name": "note.txt"})
    call(environment, "echo", {"content": text, "file_name": "note.txt"})
    assert json.loads(call(environment, "cat", {"file_name": "note.txt"})) == {"file_content": text}


def test_services_do_not_keep_the_callers_objects():
    services = Services(load_entries("multi_turn_base")["multi_turn_base_0"])
    tags = ["#a"]
    services.call("post_tweet", {"content": "x", "tags": tags})
    tags.append("#later")
    assert "#later" not in str(services.instances["TwitterAPI"].tweets)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("power", {"base": 7, "exponent": 10**7}, "Exceeds the limit (4300 digits)"),
        ("power", {"base": -7, "exponent": 10**200}, "Exceeds the limit (4300 digits)"),
        ("power", {"base": 2, "exponent": 10}, '{"result": 1024}'),
        ("power", {"base": 10.0, "exponent": 400}, "Error during execution: (34, 'Numerical result out of range')"),
        ("logarithm", {"value": 2, "base": 10, "precision": 10**6}, "precision must be at most 1000"),
        ("square_root", {"number": 2, "precision": 10**9}, "precision must be at most 1000"),
        ("round_number", {"number": 5, "decimal_places": -(10**9)}, "decimal_places must be at most 1000"),
    ],
)
def test_absurd_amounts_of_work_are_refused(name, arguments, text):
    task_id = next(i for i, e in load_entries("multi_turn_base").items() if "MathAPI" in e["involved_classes"])
    assert text in Services(load_entries("multi_turn_base")[task_id]).call(name, arguments)


def test_precision_of_one_call_does_not_reach_another():
    import decimal

    import mpmath

    task_id = next(i for i, e in load_entries("multi_turn_base").items() if "MathAPI" in e["involved_classes"])
    services = Services(load_entries("multi_turn_base")[task_id])
    before = (mpmath.mp.dps, decimal.getcontext().prec)

    def log(precision):
        return services.call("logarithm", {"value": 20, "base": 10, "precision": precision})

    expected = {precision: log(precision) for precision in range(2, 40)}
    with ThreadPoolExecutor(16) as threads:
        precisions = list(range(2, 40)) * 20
        assert list(threads.map(log, precisions)) == [expected[precision] for precision in precisions]
    services.call("square_root", {"number": 2, "precision": 3})
    assert (mpmath.mp.dps, decimal.getcontext().prec) == before


def test_a_cyclic_directory_fails_the_turn_and_not_the_environment(environment):
    call(environment, "cp", {"source": "document", "destination": "document"})
    for _ in range(4):
        result = environment.step(ANSWER)
    assert result.terminated and not result.info["success"]


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


def test_categories_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="'composite'; it must be one of 'multi_turn_base'.*, short 'base'"):
        load_bfcl("composite")
    with pytest.raises(ValueError, match="'multi_turn_composite'; it must be one of 'multi_turn_base'"):
        load_bfcl(["base", "multi_turn_composite"])
    with pytest.raises(ValueError, match="'multi_turn_composite_0' is 'multi_turn_composite'; it must be one of"):
        BfclEnvironment().reset(id="multi_turn_composite_0")
    with pytest.raises(ValueError, match="There is no task 'multi_turn_base_200'; .*multi_turn_base_0 to _199"):
        BfclEnvironment().reset(id="multi_turn_base_200")


# --- data -----------------------------------------------------------------------------------------------------------


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


# --- as a rollout ---------------------------------------------------------------------------------------------------


def test_a_perfect_policy_is_rewarded_through_the_rollout(tmp_path):
    """Tool calls written as text by a scripted policy, parsed, run, checked: all of the pipeline but the sampling."""
    from test_multi_turn import byte_tokenizer, tiny_model
    from trl import GRPOConfig, GRPOTrainer

    from seeupo_trl.rollout import MultiTurnRollout, environment_reward

    factory = partial(BfclEnvironment, tools="brief", tool_list="needed")
    tokenizer = byte_tokenizer("qwen2_5")
    scripts = {}
    for task_id in ids()[:20:4]:
        messages = ground_truth_messages(task_id, factory())
        spoken = [
            "\n".join(f"<tool_call>\n{json.dumps(call['function'])}\n</tool_call>" for call in message["tool_calls"])
            if message.get("tool_calls")
            else message["content"]
            for message in messages
            if message["role"] == "assistant"
        ]
        scripts[messages[0]["content"]] = spoken

    class Perfect(GRPOTrainer):
        def _generate_single_turn(self, prompt_ids, *args):
            responses = []
            for ids in prompt_ids:
                text = tokenizer.decode(ids)
                script = next(script for opening, script in scripts.items() if f"user\n{opening}<" in text)
                responses.append(script[text.count("<|im_start|>assistant") - 1] + "<|im_end|>")
            return [tokenizer(text)["input_ids"] for text in responses], None

    dataset = load_bfcl(split="all").select(range(0, 20, 4))
    trainer = Perfect(
        model=tiny_model(tokenizer, positions=100_000),
        args=GRPOConfig(
            output_dir=str(tmp_path),
            report_to=[],
            use_cpu=True,
            bf16=False,
            num_generations=2,
            per_device_train_batch_size=2,
            max_completion_length=2000,
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
        reward_funcs=environment_reward,
    )
    output = MultiTurnRollout(factory, tasks=dataset, max_turns=30)(list(dataset["prompt"]), trainer)
    assert output["environment_reward"] == [1.0] * 5 and output["stop_reason"] == ["completed"] * 5
    assert all(trajectory.info["success"] for trajectory in output["trajectories"])
