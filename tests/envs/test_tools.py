"""What the policy reads of the results of TRL tools."""

import asyncio
import math
import sys
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch

from seeupo_trl.envs.tools import ToolEnvironment


class Unprintable:
    def __str__(self):
        raise RuntimeError("no text")


class Thing:
    pass


RESULTS = {
    "list": ["alpha", "\u00e9", {"b": None}],
    "empty list": [],
    "parts": [{"type": "text", "text": "alpha"}],
    "typed data": [{"type": "flight", "price": 3}, {"type": "text", "text": None}],
    "parts and data": [{"type": "text", "text": "alpha"}, {"type": "image", "path": "a.png"}],
    "dict": {"a": 1},
    "data with null text": [{"type": "text", "text": "alpha"}, {"type": "text", "text": None}],
    "data with numbers as text": [{"type": "text", "text": 5}],
    "data without images": [{"type": "image", "image": None, "name": "a.png"}],
    "numbers of numpy": [np.int64(3), np.float32(1.5), np.bool_(True), np.arange(2), {"a": np.int64(4)}],
    "short floats": [{"score": np.float32(0.8132), "half": np.float16(0.1)}, np.array([[0.1], [1e-30]], np.float32)],
    "short floats of torch": [torch.tensor(0.8132), torch.tensor([0.1], dtype=torch.float16, requires_grad=True)],
    "brain floats": [torch.tensor([0.1, 2.0], dtype=torch.bfloat16)],
    "missing and infinite": [np.array([math.nan, math.inf], np.float32), np.ma.array(np.float32([1, 2]), mask=[0, 1])],
    "widest floats": [np.longdouble("0.5"), np.array([1.5], np.longdouble)],
    "keys that are no texts": [{(1, 2): "alpha"}],
    "object in a list": [Fraction(1, 2)],
    "thing": Thing(),
    "things in a list": [Thing(), {"thing": Thing}],
    "things in a dict": {"thing": Thing(), "found": "<it at 0x7f00>"},
    "things among keys": [{(1, 2): {Thing()}}],
    "huge": 10**5000,
    "huge in a list": [10**5000],
    "object": Unprintable(),
}


class Results:
    def reset(self, **row) -> None:
        pass

    def give(self, name: str) -> str:
        """
        Gives.

        Args:
            name: Which.
        """
        return RESULTS[name]

    async def give_later(self, name: str) -> str:
        """
        Gives.

        Args:
            name: Which.
        """
        await asyncio.sleep(0)
        return RESULTS[name]

    async def leave(self) -> None:
        """Leaves."""
        sys.exit(3)


def tool_call(tool, **arguments):
    return {"type": "function", "function": {"name": tool, "arguments": arguments}}


@pytest.fixture(scope="module")
def environment():
    environment = ToolEnvironment(Results)
    yield environment
    environment.close()


@pytest.mark.parametrize("tool", ["give", "give_later"])
@pytest.mark.parametrize(
    ("name", "content", "failures"),
    [
        ("list", '["alpha", "\u00e9", {"b": null}]', 0),
        ("empty list", "[]", 0),
        ("parts", [{"type": "text", "text": "alpha"}], 0),
        ("typed data", '[{"type": "flight", "price": 3}, {"type": "text", "text": null}]', 0),
        ("parts and data", '[{"type": "text", "text": "alpha"}, {"type": "image", "path": "a.png"}]', 0),
        (
            "data with null text",
            '[{"type": "text", "text": "alpha"}, {"type": "text", "text": null}]',
            0,
        ),
        ("data with numbers as text", '[{"type": "text", "text": 5}]', 0),
        ("data without images", '[{"type": "image", "image": null, "name": "a.png"}]', 0),
        ("numbers of numpy", '[3, 1.5, true, [0, 1], {"a": 4}]', 0),
        ("short floats", '[{"score": 0.8132, "half": 0.1}, [[0.1], [1e-30]]]', 0),
        ("short floats of torch", "[0.8132, [0.1]]", 0),
        ("brain floats", "[[0.100097656, 2.0]]", 0),
        ("missing and infinite", "[[NaN, Infinity], [1.0, null]]", 0),
        ("widest floats", '["0.5", ["1.5"]]', 0),
        ("keys that are no texts", "[{(1, 2): 'alpha'}]", 0),
        ("object in a list", '["1/2"]', 0),
        ("dict", "{'a': 1}", 0),
        ("thing", "<test_tools.Thing object>", 0),
        ("things in a list", '["<test_tools.Thing object>", {"thing": "<class \'test_tools.Thing\'>"}]', 0),
        ("things in a dict", "{'thing': <test_tools.Thing object>, 'found': '<it at 0x7f00>'}", 0),
        ("things among keys", "[{(1, 2): {<test_tools.Thing object>}}]", 0),
        ("huge", "{'error': 'Exceeds the limit (4300 digits) for integer string conversion", 1),
        ("huge in a list", "{'error': 'Exceeds the limit (4300 digits) for integer string conversion", 1),
        ("object", "{'error': 'no text'}", 1),
    ],
)
def test_any_result_is_text_that_the_policy_reads(environment, tool, name, content, failures):
    environment.reset(prompt=[{"role": "user", "content": "x"}])
    (message,) = environment.step({"role": "assistant", "tool_calls": [tool_call(tool, name=name)]}).messages
    read = message["content"]
    assert read[: len(content)] == content if failures else read == content
    assert environment.failures == failures


def test_a_coroutine_that_exits_is_the_environments_fault_and_ends_no_other(environment):
    environment.reset(prompt=[{"role": "user", "content": "x"}])
    with pytest.raises(SystemExit):
        environment.step({"role": "assistant", "tool_calls": [tool_call("leave")]})
    (message,) = environment.step({"role": "assistant", "tool_calls": [tool_call("give_later", name="dict")]}).messages
    assert message["content"] == "{'a': 1}"


class Scored(Results):
    def __init__(self, reward):
        self.reward = reward

    def get_reward(self):
        return self.reward


class ScoredLater(Scored):
    async def get_reward(self):
        if isinstance(self.reward, BaseException):
            raise self.reward
        return self.reward


@pytest.mark.parametrize("environment_class", [Scored, ScoredLater])
def test_a_reward_that_is_not_a_number_is_none(environment_class):
    for reward in (None, math.nan, np.float32("nan")):
        assert ToolEnvironment(partial(environment_class, reward)).reward() is None
    assert ToolEnvironment(partial(environment_class, 0.5)).reward() == 0.5
    for reward in (math.inf, "1.0", np.ones(2)):
        with pytest.raises(ValueError, match=r"get_reward\(\) must return a finite number or None; it returned "):
            ToolEnvironment(partial(environment_class, reward)).reward()


@pytest.mark.parametrize("error", [SystemExit, LookupError])
def test_a_coroutine_get_reward_raises_what_it_raises(error):
    with pytest.raises(error):
        ToolEnvironment(partial(ScoredLater, error())).reward()
