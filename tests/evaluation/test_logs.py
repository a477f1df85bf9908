"""The tables of completions survive whatever stands in a conversation."""

import json

import pytest
from trl.trainer.utils import print_prompt_completions_sample

from seeupo_trl.evaluation.logs import as_logged


def call(arguments, name="look"):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    "calls",
    [
        [call([1])],
        [call("[1]")],
        [call("no json")],
        [call(None)],
        [call(3)],
        [call({"x": 10**5000})],
        [call("9" * 5000)],
        [call({"x": "\ud83d"})],
        [call({"x": {"y": [None]}}, name=None)],
        [call({}, name=["a"])],
        [{"type": "function"}],
        [{"type": "function", "function": "look"}],
        [{"name": "look", "arguments": {"x": 1}}],
        ["look"],
        [None],
        "look",
        {},
        [],
        None,
    ],
    ids=range(19),
)
def test_any_tool_call_can_be_printed(calls):
    conversation = [{"role": "assistant", "content": None, "tool_calls": calls}]
    logged = as_logged(conversation)
    print_prompt_completions_sample([logged], [logged], {"r": [1.0]}, [0.0], 1)
    json.dumps(logged).encode()
    for made in logged[0].get("tool_calls", []):
        function = made.get("function", made)
        assert isinstance(json.loads(function.get("arguments", "{}")), dict)


def test_arguments_of_the_usual_kind_are_json_text():
    (message,) = as_logged([{"role": "assistant", "content": "", "tool_calls": [call({"x": 1})]}])
    assert message["tool_calls"] == [call('{"x": 1}')]
    (message,) = as_logged([{"role": "assistant", "content": "", "tool_calls": [call('{"x":  1}')]}])
    assert message["tool_calls"] == [call('{"x":  1}')]


def test_conversations_without_calls_and_plain_text_stay_as_they_are():
    conversation = [{"role": "user", "content": "Hi."}]
    assert as_logged(conversation) == conversation and as_logged("Hi.") == "Hi."
