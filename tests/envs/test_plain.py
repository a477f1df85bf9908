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
    [
        "[" * (MAX_NESTING + 1),
        '{"a":' * (MAX_NESTING + 1),
        "[{" * MAX_NESTING,
        "]" * 1000 + "[" * (MAX_NESTING + 1),
        '[-1.5e+3, true, [null], {"a": "\\"]"}, \n' * (MAX_NESTING + 1),
        "call:look{" + 'thing:<|"|>sky [0, 1)<|"|>, beside:{' * (MAX_NESTING + 1),
        "<parameter=thing>\n" + "[" * (MAX_NESTING + 1),
        '5" of [0, 1)\n' + '{"a": ' * (MAX_NESTING + 1),
    ],
)
def test_texts_that_are_too_deep(text):
    assert is_deep_text(text)


@pytest.mark.parametrize(
    "text",
    [
        "[" * MAX_NESTING,
        "[]" * 1000,
        json.dumps({"code": '\\"[' * 1000}),
        json.dumps([{}] * 1000),
        "",
        '"' + '\\"' * 100_000 + "[(" * 300,  # takes no longer than its length
    ],
)
def test_texts_that_are_not(text):
    assert not is_deep_text(text)


PROSE = [
    "[0, 1), ",
    "[0, 1[, ",
    "[0, 1>, ",
    "\\left[0, \\frac{1}{2}\\right) ",
    "\\left\\{x : x = [y \\right. ",
    "区间[0,1），",
    "see [a, the [b, ",
    "- [x\n- [y, ",
    'case "$1" in [a) echo ${x ',
    "x = {'a': [1, ",
    "if (x) {\n  y = z[\n",
    "\x1b[31mred\x1b[0m ",
]


@pytest.mark.parametrize("prose", PROSE)
def test_prose_is_not_deep_however_many_brackets_it_leaves_open(prose):
    assert not is_deep_text(prose * 1000)
