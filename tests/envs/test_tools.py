"""What the policy reads of the results of TRL tools."""

import asyncio
import contextlib
import math
import sys
import threading
import time
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


def calling(function):
    """A step of an environment whose tool calls a function."""

    class Calling(Results):
        def give(self, name: str) -> str:
            """
            Gives.

            Args:
                name: Anything.
            """
            return function()

    Calling.__name__ = function.__name__  # a class is named once
    call = {"type": "function", "function": {"name": "give", "arguments": {"name": "it"}}}
    return partial(ToolEnvironment(Calling).step, {"role": "assistant", "tool_calls": [call]})


def raised_from_itself():
    try:
        raise KeyError("no such item")
    except KeyError as error:
        raise error from error


def raised_in_a_circle():
    first, second, third = ValueError("first"), ValueError("second"), ValueError("third")
    first.__context__, second.__cause__, third.__context__ = second, third, first
    raise first


def nested_in_its_own_loop():
    async def nested():
        loop = asyncio.get_event_loop()
        loop.run_until_complete(loop.create_future())

    asyncio.run(nested())


def like_one_of_threads():
    return Thing().client


def quotes_one_of_threads():
    raise RuntimeError("exit code 1\nRuntimeError: This event loop is already running")


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (raised_from_itself, "no such item"),
        (raised_in_a_circle, "first"),
        (nested_in_its_own_loop, "This event loop is already running"),
        (like_one_of_threads, "has no attribute 'client'"),
        (quotes_one_of_threads, "exit code 1"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_a_tool_raises_is_text_that_the_policy_reads(function, text):
    assert text in calling(function)().messages[0]["content"]


async def one_after_another(lock):
    """Waits for a lock in tasks of one event loop."""

    async def hold():
        async with lock:
            await asyncio.sleep(0)

    await asyncio.gather(hold(), hold())


def held_by_another_loop():
    lock = asyncio.Lock()
    asyncio.run(one_after_another(lock))
    asyncio.run(one_after_another(lock))


def waits_for_another_loop():
    async def waits(future):
        await asyncio.ensure_future(future, loop=asyncio.get_running_loop())

    with contextlib.closing(asyncio.new_event_loop()) as loop:
        asyncio.run(waits(loop.create_future()))


def awaits_of_another_loop():
    async def awaits(future):
        await future

    with contextlib.closing(asyncio.new_event_loop()) as loop:
        asyncio.run(awaits(loop.create_future()))


def local_of_another_thread():
    local = threading.local()
    thread = threading.Thread(target=setattr, args=(local, "client", "a client"))
    thread.start()
    thread.join()
    return local.client


def runs_in_another_thread():
    with contextlib.closing(asyncio.new_event_loop()) as loop:
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        while not loop.is_running():
            time.sleep(0.001)
        try:
            loop.run_until_complete(loop.create_future())
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()


def one_of_several():
    try:
        raised_in_a_circle()
    except ValueError as error:
        try:
            runs_in_another_thread()
        except RuntimeError as another:
            raise ExceptionGroup("several", [error, another]) from None


@pytest.mark.parametrize(
    "function",
    [
        held_by_another_loop,
        waits_for_another_loop,
        awaits_of_another_loop,
        local_of_another_thread,
        runs_in_another_thread,
        one_of_several,
    ],
)
def test_what_instances_share_and_cannot_is_the_environments_fault(caplog, function):
    with pytest.raises(Exception, match="loop|_thread._local|several"):
        calling(function)()
    (warning,) = caplog.messages
    assert f"of {function.__name__} works in one thread only" in warning and "max_concurrent_envs=1" in warning
