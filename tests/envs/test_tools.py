"""What the policy reads of the results of TRL tools."""

import asyncio

import pytest

from seeupo_trl.envs.tools import ToolEnvironment


class Unprintable:
    def __str__(self):
        raise RuntimeError("no text")


RESULTS = {
    "list": ["alpha", "\u00e9", {"b": None}],
    "empty list": [],
    "parts": [{"type": "text", "text": "alpha"}],
    "dict": {"a": 1},
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
        ("dict", "{'a': 1}", 0),
        ("huge", "{'error': 'Exceeds the limit (4300 digits) for integer string conversion", 1),
        ("huge in a list", "{'error': 'Exceeds the limit (4300 digits) for integer string conversion", 1),
        ("object", "{'error': 'no text'}", 1),
    ],
)
def test_any_result_is_text_that_the_policy_reads(environment, tool, name, content, failures):
    environment.reset(prompt=[{"role": "user", "content": "x"}])
    call = {"type": "function", "function": {"name": tool, "arguments": {"name": name}}}
    (message,) = environment.step({"role": "assistant", "tool_calls": [call]}).messages
    read = message["content"]
    assert read[: len(content)] == content if failures else read == content
    assert environment.failures == failures
