"""
TRL environments as environments of messages.

A TRL environment is an object whose public methods are tools: `reset(**row)` may return text that is appended to the
prompt, the policy calls the other methods, and the episode ends with a message that calls nothing. [`ToolEnvironment`]
makes such an object a [`~seeupo_trl.envs.MultiTurnEnvironment`]. It does what the tool loop of `GRPOTrainer` does (trl
1.15 and 1.16), to the letter of the messages: the same schemas, the same results and error texts, in the same order.
Two things differ: a list that is no content in parts, of which templates print nothing, becomes JSON, and the text of
an object is without the object's address.

The policy's mistakes (a wrong name, wrong arguments, an exception inside a tool) are text that it reads. An exception
in `reset` or `get_reward` is a fault of the environment, and so is one of a tool that works in another thread only.
Where a tool catches that and returns its text, there is a warning.
"""

import asyncio
import inspect
import json
import logging
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache, cached_property
from typing import Any

import numpy as np
from transformers.utils import get_json_schema
from trl.trainer.utils import start_event_loop_in_daemon

from .base import MultiTurnEnvironment, Observation, StepResult
from .one_thread import explained, look_for_thread_errors, needs_another_thread, text_of
from .plain import real_number


logger = logging.getLogger(__name__)

# What TRL shows where a row has no prompt, for `reset` to append to.
EMPTY_PROMPT = [{"role": "user", "content": ""}]

# Methods that TRL calls itself.
RESERVED_METHODS = ("reset", "get_reward")

# types of the parts of a content that are text
TEXT_TYPES = ("text", "input_text")

# Floats of few digits, by the names that NumPy and PyTorch give them, and what writes them.
_NARROW_FLOATS = {"float16": np.float16, "float32": np.float32, "bfloat16": np.float32}

_ADDRESS = re.compile(r" at (0x[0-9a-f]+)", re.IGNORECASE)

Message = dict[str, Any]


class RowObservation(Observation):
    """The conversation of a dataset row, to whose end `reset` may have appended: what is odd in it is the row's."""


class ToolEnvironment(MultiTurnEnvironment):
    """
    A TRL environment, played by messages.

    [`SeeUPOTrainer`] makes these from its `environment_factory`. To play the same rollouts with a stock
    [`~trl.GRPOTrainer`], give them to a [`MultiTurnRollout`] yourself, as in the example.

    Args:
        factory (`Callable[[], object]`):
            A TRL environment class, or a function without arguments that returns an instance: it has `reset` and
            public methods with type hints and docstrings, sync or async.
        tools (`Sequence[Callable]`, *optional*, defaults to `()`):
            Further tools, as in [`~trl.GRPOTrainer`].
        event_loop (`asyncio.AbstractEventLoop`, *optional*):
            Running event loop for the methods that are coroutines. Defaults to one that all environments share.

    Attributes:
        environment (`object`):
            The TRL environment.
        calls, failures (`int`):
            Tool calls in this episode, and how many of them failed.
        prompt (`list[dict]`):
            The opening conversation of this episode, with what `reset` returned.

    Example:

    ```python
    rollout = MultiTurnRollout(partial(ToolEnvironment, Counter), tasks=dataset)
    ```
    """

    def __init__(
        self,
        factory: Callable[[], Any],
        *,
        tools: Sequence[Callable] = (),
        event_loop: asyncio.AbstractEventLoop | None = None,
    ):
        with explained(f"The factory {getattr(factory, '__name__', factory)}"):
            self.environment = factory()
        self.calls = self.failures = 0
        self.prompt: list[Message] = EMPTY_PROMPT
        self.event_loop = event_loop
        self._tools = tools

    @cached_property
    def tools(self) -> list[Callable]:
        """Everything the policy can call: the further tools, then the methods in alphabetical order."""
        names = [name for name in self._methods if name not in RESERVED_METHODS and not name.startswith("_")]
        return [*self._tools, *(getattr(self.environment, name) for name in names)]

    @cached_property
    def schemas(self) -> list[dict[str, Any]]:
        """
        JSON schemas of the tools.

        Raises:
            `DocstringParsingException` or `TypeHintParsingException`:
                When a tool lacks a docstring or type hints.
        """
        return [get_json_schema(tool) for tool in self.tools]

    @cached_property
    def owns_reward(self) -> bool:
        """Whether the environment scores its episodes."""
        return "get_reward" in self._methods

    @property
    def _methods(self) -> list[str]:
        # of the class: a property is not to be evaluated
        return [name for name, _ in inspect.getmembers(type(self.environment), predicate=inspect.isfunction)]

    def reset(self, **task: Any) -> Observation:
        self.calls = self.failures = 0
        self.prompt = task.get("prompt", EMPTY_PROMPT)
        if not isinstance(self.prompt, list) or not self.prompt:
            raise TypeError(
                f"The tools of an environment need a conversation to be called in, but the prompt is {self.prompt!r}. "
                "Give a list of messages."
            )
        with self._explained("`reset`"):
            text = self.environment.reset(**task)
        self.prompt = _append_to_prompt(self.prompt, text)
        return RowObservation(self.prompt, tools=self.schemas or None)

    def step(self, message: Message) -> StepResult:
        calls = message.get("tool_calls")
        if not calls:
            return StepResult([], terminated=True)
        results = self._execute(calls)
        for name, content in results:
            look_for_thread_errors(self._named(f"The tool {name}"), str(content))
        return StepResult([_tool_message(name, content) for name, content in results])

    def close(self) -> None:
        if isinstance(self.environment, MultiTurnEnvironment):  # given by mistake
            self.environment.close()

    def reward(self) -> float | None:
        """What the environment says the episode is worth."""
        get_reward = self.environment.get_reward
        with self._explained("`get_reward`"):
            if inspect.iscoroutinefunction(get_reward):
                (reward,) = self._run([get_reward()])
                if isinstance(reward, BaseException):
                    raise reward
            else:
                reward = get_reward()
        try:
            # as for TRL, a reward that is not a number is none
            return None if reward is None or reward != reward else real_number(reward)
        except ValueError as error:
            raise ValueError(f"get_reward() must return a finite number or None; it returned {reward!r}.") from error

    def _execute(self, calls: list[dict[str, Any]]) -> list[tuple[str, str | list]]:
        """Names and contents of the results: of functions in the order of the calls, then those of coroutines."""
        functions = {tool.__name__: tool for tool in self.tools if not inspect.iscoroutinefunction(tool)}
        coroutine_functions = {tool.__name__: tool for tool in self.tools if inspect.iscoroutinefunction(tool)}
        results: list[tuple[str, str | list]] = []
        coroutines: list[tuple[str, Any]] = []
        for call in calls:
            self.calls += 1
            if call["type"] != "function":
                name = call.get("name", "unknown")
                results.append((name, self._failure(name, f"Unsupported tool call type: {call['type']}")))
                continue
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            try:
                if name in functions:
                    results.append((name, content_of(functions[name](**arguments))))
                elif name in coroutine_functions:
                    coroutines.append((name, coroutine_functions[name](**arguments)))
                else:
                    raise ValueError(f"Tool {name} not found.")
            except Exception as error:
                results.append((name, self._failure(name, error)))
        if coroutines:
            awaited = self._run([coroutine for _, coroutine in coroutines])
            for (name, _), result in zip(coroutines, awaited, strict=True):
                try:
                    if isinstance(result, BaseException):
                        raise result
                    results.append((name, content_of(result)))
                except Exception as error:
                    results.append((name, self._failure(name, error)))
        return results

    def _run(self, coroutines: list[Any]) -> list[Any]:
        """What coroutines return, or raise."""
        event_loop = _common_event_loop() if self.event_loop is None else self.event_loop
        return asyncio.run_coroutine_threadsafe(_gather(coroutines), event_loop).result()

    def _failure(self, name: str, error: Exception | str) -> str:
        """What the policy reads of its mistake; raises an error that is not the policy's."""
        if isinstance(error, Exception) and needs_another_thread(error):
            with self._explained(f"The tool {name}"):
                raise error
        self.failures += 1
        return str({"error": text_of(error)})

    def _explained(self, what: str) -> AbstractContextManager[None]:
        consequence = " Its episodes are left out of training: the policy is not to blame."
        return explained(self._named(what), consequence)

    def _named(self, what: str) -> str:
        return f"{what} of {type(self.environment).__name__}"


def content_of(result: Any) -> str | list:
    """
    What a tool returned, as the content of a message: a list of parts (texts, images) as it is, any other list as JSON
    (templates print nothing of it, nor of dicts with a `type` of their own), everything else as its text.

    Raises:
        `Exception`:
            When the result has no text: it is too large a number, or its `__str__` raises.
    """
    if not isinstance(result, list):
        return _text_of_object(result)
    return result if is_in_parts(result) and all(map(_is_filled, result)) else _json_of(result)


def text_content_of(result: Any) -> str | list:
    """What a tool returned, as the content of a message for a policy that reads text only: images are JSON, too."""
    content = content_of(result)
    if isinstance(content, list) and any(map(_is_image, content)):
        _warn_of_images()
        return _json_of(content)
    return content


def _json_of(result: list) -> str:
    try:
        return json.dumps(result, ensure_ascii=False, default=_plain)
    except (TypeError, ValueError):  # keys that are no texts, a list that holds itself
        return _text_of_object(result)


def _plain(value: Any) -> Any:
    """Numbers and arrays of any library as Python's own, any other object as its text."""
    as_list = getattr(value, "tolist", None)
    numbers = as_list() if callable(as_list) else value
    if type(numbers) is type(value):  # also NumPy's widest floats, which Python has nothing for
        return _text_of_object(value)
    kind = _NARROW_FLOATS.get(str(getattr(value, "dtype", "")).removeprefix("torch."))
    return numbers if kind is None else _with_digits_of(kind, numbers)


def _with_digits_of(kind: type[np.floating], numbers: Any) -> Any:
    """Numbers with as many digits as tell those of a kind apart: 0.1, not 0.10000000149011612."""
    if isinstance(numbers, list):
        return [_with_digits_of(kind, number) for number in numbers]
    return float(str(kind(numbers))) if isinstance(numbers, float) else numbers


def _text_of_object(value: Any) -> str:
    """Its text, without the addresses of objects in it: they would be others in each process."""
    text = str(value)
    if isinstance(value, str) or not _ADDRESS.search(text):
        return text
    objects, found = [value], set()
    while objects:
        one = objects.pop()
        if id(one) in found:
            continue
        found.add(id(one))
        if isinstance(one, dict):
            objects += [*one, *one.values()]
        elif isinstance(one, (list, tuple, set, frozenset)):
            objects += one
    return _ADDRESS.sub(lambda address: "" if int(address[1], 16) in found else address[0], text)


@cache
def _warn_of_images() -> None:
    logger.warning(
        "A tool returned an image, but the policy reads text only, and gets the result as JSON. With a "
        "vision-language model, give its processor as `processing_class`."
    )


def is_in_parts(content: list) -> bool:
    """Whether a list is a content in parts (texts, images), and not data."""
    return bool(content) and all(_is_text(part) or _is_image(part) for part in content)


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in TEXT_TYPES and "text" in part


def _is_image(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in ("image", "image_url") and part["type"] in part


def _is_filled(part: dict[str, Any]) -> bool:
    """Rows of data may have a `type`, too, and a text that is missing or a number."""
    return isinstance(part["text"], str) if _is_text(part) else part[part["type"]] is not None


@cache
def _common_event_loop() -> asyncio.AbstractEventLoop:
    _, event_loop, is_ready = start_event_loop_in_daemon(name="seeupo-tools-loop")
    is_ready.wait()
    return event_loop


async def _gather(coroutines: list[Any]) -> list[Any]:
    return await asyncio.gather(*map(_contained, coroutines), return_exceptions=True)


async def _contained(coroutine: Any) -> Any:
    """What a coroutine returns. A `sys.exit()` is returned: raised, it would end the loop, and all others with it."""
    try:
        return await coroutine
    except (SystemExit, KeyboardInterrupt) as error:
        return error


def _append_to_prompt(prompt: list[Message], text: Any) -> list[Message]:
    """The prompt with what `reset` returned at the end of its last message."""
    if text is None:
        return prompt
    if not isinstance(text, (str, list)):
        raise TypeError(
            f"reset() of a TRL environment must return text to append to the prompt, or None; it returned {text!r}."
        )
    _refuse_images(text)
    content = prompt[-1]["content"]
    if isinstance(text, list) and isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if isinstance(text, str) and isinstance(content, list):
        text = [{"type": "text", "text": text}]
    return [*prompt[:-1], {**prompt[-1], "content": content + text}]


def _tool_message(name: str, content: str | list) -> Message:
    _refuse_images(content)
    return {"role": "tool", "name": name, "content": content}


def _refuse_images(content: Any) -> None:
    if isinstance(content, list) and any(map(_is_image, content)):
        raise TypeError(
            "The environment returned an image, but the policy reads text only. With a vision-language model, give "
            "its processor as `processing_class`."
        )
