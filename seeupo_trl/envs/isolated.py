"""
An environment in a process of its own, which can be ended whatever it does.

Threads are enough for most environments. A process is for those that must not share ours: code that holds the
interpreter's lock or crashes, libraries with global state, memory that leaks.

What the process sends is JSON, and nothing else is read: no object of the environment's comes to life here.
"""

import ast
import asyncio
import inspect
import json
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from .base import MultiTurnEnvironment, Observation, StepResult
from .plain import flag, plain_data, real_number


logger = logging.getLogger(__name__)

START_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
CLOSE_TIMEOUT = 5.0  # seconds that a process has to close its environment
MAX_ANSWER_BYTES = 2**30


class UnimportableScriptError(RuntimeError):
    """The script cannot be imported by another process: a mistake of the script, not a fault of an environment."""


class IsolatedEnvironment(MultiTurnEnvironment):
    """
    Runs an environment in a process of its own.

    The process starts with the first episode. It is killed when a call takes too long, and replaced before the next
    episode. It ends with ours, however that ends. What it has started ends with it, unless that has a process group of
    its own (`subprocess.Popen(..., start_new_session=True)`). It cannot start processes by `multiprocessing`.

    What the environment returns is sent as JSON: messages, tools and `info` are texts, numbers, booleans, `None`,
    lists and dicts with texts as keys. Tuples arrive as lists; numbers, arrays and tensors of other libraries as
    numbers and lists. Anything else (a date, an image, an object) is an error that names it. The task and the policy's
    message may be anything that can be pickled: they are sent by us.

    Args:
        environment_factory (`Callable[[], MultiTurnEnvironment]`):
            Makes the environment, in the process. It must be picklable: a class or function of a module, or a
            `functools.partial` of one. As everywhere with processes, a script that defines it needs
            `if __name__ == "__main__":` around what it runs.
        timeout (`float`, *optional*, defaults to `60.0`):
            Seconds that a call may take. Keep it below the rollout's `env_timeout`.
        max_episodes (`int`, *optional*):
            Replace the process after so many episodes, whatever it may have leaked. `None` keeps it.

    Raises:
        [`UnimportableScriptError`]:
            At the first `reset`, when the process could not import the script without running it again.

    Example:

    ```python
    rollout = MultiTurnRollout(partial(IsolatedEnvironment, MyEnvironment, timeout=30.0, max_episodes=100))
    ```
    """

    def __init__(
        self,
        environment_factory: Callable[[], MultiTurnEnvironment],
        *,
        timeout: float = 60.0,
        max_episodes: int | None = None,
    ):
        if not callable(environment_factory):
            raise TypeError(
                f"environment_factory is a {type(environment_factory).__name__}; give a MultiTurnEnvironment class or "
                "a function without arguments that returns an instance."
            )
        if not timeout > 0:
            raise ValueError(f"timeout is {timeout}; give a positive number of seconds.")
        if max_episodes is not None and max_episodes < 1:
            raise ValueError(f"max_episodes is {max_episodes}; give at least 1, or None to keep the process.")
        self._factory = environment_factory
        self._timeout = timeout
        self._max_episodes = max_episodes
        self._episodes = 0
        self._process: multiprocessing.process.BaseProcess | None = None
        self._socket: socket.socket | None = None
        self._answers: BinaryIO | None = None

    @property
    def takes_seed(self) -> bool:
        """Whether the environment takes a seed, where its factory is a class or a `functools.partial` of one."""
        factory = self._factory
        while isinstance(factory, partial):
            factory = factory.func
        return isinstance(factory, type) and "seed" in inspect.signature(factory.reset).parameters

    def reset(self, **task: Any) -> Observation:
        """Begin an episode, in a new process where there is none."""
        if self._episodes == self._max_episodes:
            self.close()
        if self._process is None:
            self._start()
        self._episodes += 1
        return Observation(**self._call("reset", (), task))

    def step(self, message: dict[str, Any]) -> StepResult:
        """Hand over the policy's message."""
        return StepResult(**self._call("step", (message,), {}))

    def close(self) -> None:
        """Close the environment and end the process."""
        if self._process is not None:
            try:
                self._call("close", (), {}, CLOSE_TIMEOUT)
            except Exception as error:
                logger.warning("Could not close the environment: %s", error)
            self._kill()

    def _start(self) -> None:
        _check_importable(self._factory)
        context = multiprocessing.get_context(START_METHOD)
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = context.Process(target=_serve, args=(theirs, self._factory), daemon=True)
            try:
                self._process.start()
            except BaseException:
                self._process = None
                self._socket.close()
                raise
        self._answers = self._socket.makefile("rb")
        self._episodes = 0

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            _kill_group(process.pid)
            process.kill()  # it may not have had its group yet
            process.join()
            self._answers.close()
            self._socket.close()

    def _call(self, method: str, args: tuple, kwargs: dict[str, Any], timeout: float | None = None) -> dict[str, Any]:
        timeout = timeout or self._timeout
        if self._process is None:
            raise RuntimeError("The environment's process has ended; call reset() first.")
        pid = self._process.pid
        request = pickle.dumps((method, args, kwargs))
        try:
            self._socket.settimeout(timeout)
            self._socket.sendall(request)
            line = self._answers.readline(MAX_ANSWER_BYTES)
        except TimeoutError as error:
            self._kill()
            raise TimeoutError(f"{method}() took more than {timeout:g} seconds; process {pid} was killed") from error
        except OSError:
            line = b""
        if not line.endswith(b"\n"):
            self._kill()
            raise RuntimeError(f"Process {pid} of the environment died during {method}().")
        try:
            answer = json.loads(line)
            error, is_timeout, result = answer["error"], answer["is_timeout"], answer["result"]
            if not isinstance(result, dict) or not result.keys() <= _FIELDS[method]:
                raise TypeError("no result of this method")
        except (ValueError, TypeError, KeyError, RecursionError) as problem:
            self._kill()
            raise RuntimeError(f"Process {pid} answered {method}() with something else: {problem}.") from problem
        if error is not None:
            raise (TimeoutError if is_timeout else RuntimeError)(str(error))
        return result


# What each method's answer consists of.
_FIELDS = {
    "reset": {"messages", "tools", "info"},
    "step": {"messages", "reward", "terminated", "truncated", "info"},
    "close": set(),
}
_RETURNS = {"reset": Observation, "step": StepResult}
_READ_AS = {"reward": real_number, "terminated": flag, "truncated": flag}


def _serve(connection: socket.socket, factory: Callable[[], MultiTurnEnvironment]) -> None:
    """The process: answers calls until it is told to close, or until ours is gone."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    requests = connection.makefile("rb")
    event_loop = asyncio.new_event_loop()
    context = copy_context()
    environment = None
    while True:
        try:
            method, args, kwargs = pickle.load(requests)
        except (EOFError, OSError):
            return
        answer = {"error": None, "is_timeout": False, "result": {}}
        try:
            if environment is None:
                environment = context.run(factory)
            returned = context.run(getattr(environment, method), *args, **kwargs)
            if inspect.iscoroutine(returned):
                returned = event_loop.run_until_complete(event_loop.create_task(returned, context=context))
            answer["result"] = _as_dict(method, returned)
            line = json.dumps(answer)
        except BaseException as error:
            line = json.dumps({"error": _describe(error), "is_timeout": isinstance(error, TimeoutError), "result": {}})
        try:
            connection.sendall(line.encode() + b"\n")
        except OSError:
            return


def _as_dict(method: str, returned: Any) -> dict[str, Any]:
    """What a method returned as plain data, by field."""
    expected = _RETURNS.get(method)
    if expected is None:
        return {}
    try:
        if not isinstance(returned, expected):
            raise TypeError(f"it is a {type(returned).__name__} and no {expected.__name__}")
        return {name: _plain_field(getattr(returned, name), name) for name in sorted(_FIELDS[method])}
    except TypeError as error:
        raise TypeError(f"{method}() returned what cannot be sent between processes: {error}.") from error


def _plain_field(value: Any, name: str) -> Any:
    try:
        return _READ_AS[name](value)
    except (KeyError, ValueError):  # if it is wrong, the rollout says so
        return plain_data(value, name)


def _describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    _kill_group(os.getpid())
    os._exit(1)


def _kill_group(pid: int) -> None:
    """Kill a process and what it has started, where the system has groups of processes."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):  # nothing is left of them
            os.killpg(pid, signal.SIGKILL)


def _check_importable(factory: Callable[[], MultiTurnEnvironment]) -> None:
    """
    Refuse a script that a new process, which imports it, would run again from its beginning.

    Raises:
        [`UnimportableScriptError`]:
            When the script's main thread is at a line of the top level that no `if` guards, or the factory is of a
            notebook or a command line, which cannot be imported.
    """
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script is None or not Path(script).is_file():
        if b"__main__" in pickle.dumps(factory):
            raise UnimportableScriptError(
                "The environment is defined in a notebook or on the command line, where another process cannot import "
                "it from. Define it in a module (a .py file) and import it."
            )
        return
    line = _top_level_line(script)
    if line is not None and not _is_guarded(Path(script), line):
        raise UnimportableScriptError(
            f"{script} runs at line {line} without `if __name__ == '__main__':` around it. Each environment in a "
            "process of its own imports the script, which would run it again from its beginning. Put what the script "
            "runs below that line."
        )


def _top_level_line(script: str) -> int | None:
    """The line of the script's top level at which the main thread is, if it is in the script at all."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    script, line = os.path.abspath(script), None
    while frame is not None:
        if frame.f_code.co_name == "<module>" and os.path.abspath(frame.f_code.co_filename) == script:
            line = frame.f_lineno
        frame = frame.f_back
    return line


def _is_guarded(script: Path, line: int) -> bool:
    """Whether an `if` stands around a line: which condition it has is the script's own affair."""
    tree = ast.parse(script.read_bytes())
    return any(
        isinstance(node, (ast.If, ast.Match)) and node.lineno <= line <= node.end_lineno for node in ast.walk(tree)
    )
