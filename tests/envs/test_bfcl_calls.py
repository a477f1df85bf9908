"""BFCL: what the model calls is looked up and bounded, and nothing it writes is ever evaluated."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest


pytest.importorskip("bfcl_eval", reason="BFCL's package is optional")

from bfcl_play import ANSWER, call

from seeupo_trl.envs.bfcl import BfclEnvironment
from seeupo_trl.envs.bfcl.data import load_entries, load_function_docs
from seeupo_trl.envs.bfcl.services import Services


@pytest.fixture
def environment():
    environment = BfclEnvironment()
    environment.reset(id="multi_turn_base_0")
    return environment


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
