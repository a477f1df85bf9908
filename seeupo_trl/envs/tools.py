"""
TRL environments as environments of messages.

A TRL environment is an object whose public methods are tools: `reset(**row)` may return text that is appended to the
prompt, the policy calls the other methods, and the episode ends with a message that calls nothing. [`ToolEnvironment`]
makes such an object a [`~seeupo_trl.envs.MultiTurnEnvironment`]. It does what the tool loop of `GRPOTrainer` does (trl
1.15 and 1.16), to the letter of the messages: the same schemas, the same results and error texts, in the same order.

The policy's mistakes (a wrong name, wrong arguments, an exception inside a tool) are text that it reads. An exception
in `reset` is a fault of the environment.
"""

import asyncio
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from transformers.utils import get_json_schema

from .base import MultiTurnEnvironment, Observation, StepResult


# What TRL shows where a row has no prompt, for `reset` to append to.
EMPTY_PROMPT = [{"role": "user", "content": ""}]

# Methods that TRL calls itself.
RESERVED_METHODS = ("reset", "get_reward")

Message = dict[str, Any]


class ToolEnvironment(MultiTurnEnvironment):
    """
    A TRL environment, played by messages.

    Args:
        environment (`object`, *optional*):
            Instance of a TRL environment: `reset` and public methods with type hints and docstrings, sync or async.
            `None` for nothing but `tools`.
        tools (`Sequence[Callable]`, *optional*, defaults to `()`):
            Further tools, as in [`~trl.GRPOTrainer`].
        max_iterations (`int`, *optional*):
            How many messages of an episode have their calls executed; the next message with calls ends it.
            `max_tool_calling_iterations` of [`~trl.GRPOConfig`].
        event_loop (`asyncio.AbstractEventLoop`, *optional*):
            Running event loop for the methods that are coroutines. Required if there are any: what they hold
            (connections, locks) usually belongs to one loop.

    Attributes:
        calls, failures (`int`):
            Tool calls in this episode, and how many of them failed.
        prompt (`list[dict]`):
            The opening conversation of this episode, with what `reset` returned.
        is_cut (`bool`):
            Whether this episode ended because its calls were used up.

    Example:

    ```python
    rollout = MultiTurnRollout(lambda: ToolEnvironment(Counter()), tasks=dataset)
    ```
    """

    def __init__(
        self,
        environment: Any = None,
        *,
        tools: Sequence[Callable] = (),
        max_iterations: int | None = None,
        event_loop: asyncio.AbstractEventLoop | None = None,
    ):
        self.environment = environment
        self.max_iterations = max_iterations
        self.calls = self.failures = 0
        self.prompt: list[Message] = EMPTY_PROMPT
        self.is_cut = False
        self._iterations = 0
        self._event_loop = event_loop
        functions = [*tools, *tool_methods(environment)]
        self._schemas = [get_json_schema(function) for function in functions]
        self._sync_tools = {f.__name__: f for f in functions if not inspect.iscoroutinefunction(f)}
        self._async_tools = {f.__name__: f for f in functions if inspect.iscoroutinefunction(f)}
        if self._async_tools and event_loop is None:
            raise ValueError(
                f"{', '.join(self._async_tools)} of {type(environment).__name__} are coroutines; give the event loop "
                "they run on as `event_loop`."
            )

    def reset(self, **task: Any) -> Observation:
        self.calls = self.failures = self._iterations = 0
        self.is_cut = False
        self.prompt = task.get("prompt", EMPTY_PROMPT)
        if not isinstance(self.prompt, list) or not self.prompt:
            raise TypeError(
                f"The tools of an environment need a conversation to be called in, but the prompt is {self.prompt!r}. "
                "Give a list of messages."
            )
        if self.environment is not None:
            self.prompt = _append_to_prompt(self.prompt, self.environment.reset(**task))
        return Observation(self.prompt, tools=self._schemas or None)

    def step(self, message: Message) -> StepResult:
        calls = message.get("tool_calls")
        if not calls:
            return StepResult([], terminated=True)
        if self._iterations == self.max_iterations:
            self.is_cut = True
            return StepResult([], truncated=True)
        self._iterations += 1
        results = self._execute(calls)
        return StepResult([_tool_message(name, result) for name, result in results])

    def _execute(self, calls: list[dict[str, Any]]) -> list[tuple[str, Any]]:
        """Names and results of the calls: of functions in the order of the calls, then those of coroutines."""
        results: list[tuple[str, Any]] = []
        coroutines: list[tuple[str, Any]] = []
        for call in calls:
            self.calls += 1
            if call["type"] != "function":
                name = call.get("name", "unknown")
                results.append((name, self._failure(f"Unsupported tool call type: {call['type']}")))
                continue
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            try:
                if name in self._sync_tools:
                    results.append((name, self._sync_tools[name](**arguments)))
                elif name in self._async_tools:
                    coroutines.append((name, self._async_tools[name](**arguments)))
                else:
                    raise ValueError(f"Tool {name} not found.")
            except Exception as error:
                results.append((name, self._failure(error)))
        if coroutines:
            names, awaitables = zip(*coroutines, strict=True)
            for name, result in zip(names, self._run(awaitables), strict=True):
                results.append((name, self._failure(result) if isinstance(result, Exception) else result))
        return results

    def _run(self, awaitables: Sequence[Any]) -> list[Any]:
        async def gather() -> list[Any]:
            return await asyncio.gather(*awaitables, return_exceptions=True)

        return asyncio.run_coroutine_threadsafe(gather(), self._event_loop).result()

    def _failure(self, error: Any) -> dict[str, str]:
        self.failures += 1
        return {"error": str(error)}


def tool_methods(environment: Any) -> list[Callable]:
    """
    The methods of a TRL environment that are tools: public ones of its class, in alphabetical order.

    Args:
        environment (`object`):
            Instance of a TRL environment, or `None`.
    """
    if environment is None:
        return []
    names = [name for name, _ in inspect.getmembers(type(environment), predicate=inspect.isfunction)]
    return [getattr(environment, n) for n in names if n not in RESERVED_METHODS and not n.startswith("_")]


def _append_to_prompt(prompt: list[Message], text: Any) -> list[Message]:
    """The prompt with what `reset` returned at the end of its last message."""
    if text is None:
        return prompt
    if not isinstance(text, (str, list)):
        raise TypeError(
            f"reset() of a TRL environment must return text to append to the prompt, or None; it returned {text!r}."
        )
    content = prompt[-1]["content"]
    if isinstance(text, list) and isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if isinstance(text, str) and isinstance(content, list):
        text = [{"type": "text", "text": text}]
    return [*prompt[:-1], {**prompt[-1], "content": content + text}]


def _tool_message(name: str, result: Any) -> Message:
    return {"role": "tool", "name": name, "content": result if isinstance(result, list) else str(result)}
