"""How deep data from outside may be."""

import json

import pytest

from seeupo_trl.envs.plain import MAX_NESTING, is_deep, is_deep_text


def nested(depth):
    value = []
    for _ in range(depth - 1):
        value = [value]
    return value


def test_lists_and_dicts_are_levels():
    assert not is_deep(nested(MAX_NESTING)) and is_deep(nested(MAX_NESTING + 1))
    assert not is_deep({"key": nested(MAX_NESTING - 1)}) and is_deep({"key": nested(MAX_NESTING)})


@pytest.mark.parametrize(
    "text",
    ["[" * (MAX_NESTING + 1), '{"a":' * (MAX_NESTING + 1), "[{" * MAX_NESTING, "]" * 1000 + "[" * (MAX_NESTING + 1)],
)
def test_texts_that_are_too_deep(text):
    assert is_deep_text(text)


@pytest.mark.parametrize(
    "text", ["[" * MAX_NESTING, "[]" * 1000, json.dumps({"code": '\\"[' * 1000}), json.dumps([{}] * 1000), ""]
)
def test_texts_that_are_not(text):
    assert not is_deep_text(text)
