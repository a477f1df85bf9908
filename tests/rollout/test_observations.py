"""What environments return is mended and cut wherever text stands."""

import json
import math
from collections import OrderedDict
from threading import Lock

import numpy as np
import pytest
from byte_tokenizer import byte_tokenizer
from talk import TOOLS
from transformers import ByT5Tokenizer

from seeupo_trl.envs import Observation, StepResult
from seeupo_trl.rollout.observations import (
    check_observation,
    check_step_result,
    cut_message,
    mended,
    number_of_characters,
    plain_message,
)


LONE = "a\ud83db"


def text_part(text):
    return {"type": "text", "text": text}


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": LONE},
        {"role": "user", "content": [text_part(LONE), text_part("c")]},
        {"role": "tool", "name": LONE, "content": "c"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {LONE: [LONE]}}}]},
    ],
    ids=["text", "part", "name", "arguments"],
)
def test_text_that_no_tokenizer_takes_is_mended(message):
    (checked,) = check_step_result(StepResult([message])).messages
    assert repr(checked) == repr(message).replace("\\ud83d", "?")
    assert LONE in repr(message).encode().decode("unicode_escape"), "the environment's own message is left alone"


def test_subclasses_of_text_dicts_and_lists_are_mended_too():
    message = {
        "role": "user",
        "content": [OrderedDict(text_part(np.str_(LONE)))],
        "meta": (np.str_(LONE), OrderedDict(x=LONE)),
    }
    (checked,) = check_step_result(StepResult([OrderedDict(message)])).messages
    assert checked == {"role": "user", "content": [text_part("a?b")], "meta": ["a?b", {"x": "a?b"}]}


@pytest.mark.parametrize(
    "part",
    [{"type": "image", "image": "x.png"}, {"type": "image_url", "image_url": {}}, {"type": "text", "text": None}],
)
def test_a_part_that_is_no_text_is_named(part):
    with pytest.raises(TypeError, match=f"has a part of type '{part['type']}' that is no text"):
        check_step_result(StepResult([{"role": "user", "content": [text_part("Look:"), part]}]))


def test_input_text_is_text():
    (checked,) = check_step_result(
        StepResult([{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}])
    ).messages
    assert checked["content"] == [text_part("hello")]


def test_data_with_a_type_is_no_content_in_parts():
    data = [{"type": "flight", "price": 3}, {"type": "train", "price": 1}]
    (checked,) = check_step_result(StepResult([{"role": "tool", "content": data}])).messages
    assert json.loads(checked["content"]) == data


def test_a_tokenizer_without_offsets_cuts_by_its_tokens():
    message = {"role": "user", "content": "\u00e9" * 9000}  # two tokens each
    assert cut_message(message, 100, ByT5Tokenizer())
    assert message["content"] == "\u00e9" * 50 + "\n[cut: 50 of 9000 characters]"
    message = {"role": "user", "content": "x" * 90}
    assert not cut_message(message, 100, ByT5Tokenizer()) and message["content"] == "x" * 90


def test_what_an_environment_reported_stays_as_it_was():
    info = {"log": [1], "lock": None}
    opening = check_observation(Observation([{"role": "user", "content": "x"}], info=info))
    result = check_step_result(StepResult([], terminated=True, info=info))
    info["log"].append(2)
    assert opening.info == result.info == {"log": [1], "lock": None}
    info["lock"] = Lock()  # cannot be copied
    assert check_step_result(StepResult([], terminated=True, info=info)).info == info


def test_schemas_of_tools_are_mended_too():
    tools = [{**TOOLS[0], "function": {**TOOLS[0]["function"], "description": LONE}}]
    checked = check_observation(Observation([{"role": "user", "content": "x"}], tools))
    assert checked.tools[0]["function"]["description"] == "a?b"


def test_what_needs_no_mending_is_not_copied():
    value = {"a": ["b", {"c": 1.5, "d": None}]}
    assert mended(value) is value


def test_what_arrow_filled_in_is_left_out():
    message = {"role": "assistant", "content": None, "tool_calls": None, "name": None}
    assert plain_message(message) == {"role": "assistant", "content": None}
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1, "y": None}}, "id": None}
    (checked,) = check_step_result(StepResult([{"role": "user", "content": "c", "tool_calls": [call]}])).messages
    assert checked["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    parameters = {"type": "object", "properties": {"x": {"type": "string"}, "y": None}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters, "strict": None}}]
    checked = check_observation(Observation([{"role": "user", "content": "x"}], tools)).tools
    assert checked[0]["function"] == {
        "name": "f",
        "parameters": {"type": "object", "properties": {"x": {"type": "string"}}},
    }


def test_a_list_that_is_no_content_in_parts_is_json():
    (checked,) = check_step_result(StepResult([{"role": "tool", "content": ["alpha", {"b": "\u00e9"}]}])).messages
    assert checked["content"] == '["alpha", {"b": "\u00e9"}]'


def test_parts_are_cut_together():
    tokenizer = byte_tokenizer("qwen2_5")
    image = {"type": "image", "image": object()}
    message = {"role": "user", "content": [text_part("x" * 60), image, text_part("y" * 5000), text_part("z")]}
    assert number_of_characters(message) == 5061
    assert cut_message(message, 100, tokenizer)
    texts = [part.get("text") for part in message["content"]]
    assert texts[:2] == ["x" * 60, None]
    assert texts[2] == "y" * 40 + "\n[cut: 40 of 5000 characters]"
    assert texts[3] == "\n[cut: 0 of 1 characters]"


@pytest.mark.parametrize("content", ["short", [text_part("short")], None, []])
def test_what_is_short_is_not_cut(content):
    message = {"role": "user", "content": content}
    assert not cut_message(message, 100, byte_tokenizer("qwen2_5"))
    assert message == {"role": "user", "content": content} and number_of_characters(message) < math.inf
