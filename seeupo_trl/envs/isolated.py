"""
An environment in a process of its own, which can be ended whatever it does.

Threads are enough for most environments. A process is for those that must not share ours: code that holds the
interpreter's lock or crashes, libraries with global state, memory that leaks.
"""

import logging
import multiprocessing
import os
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from .base import MultiTurnEnvironment, Observation, StepResult


logger = logging.getLogger(__name__)

START_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
CLOSE_TIMEOUT = 5.0  # seconds that a process has to close its environment


class IsolatedEnvironment(MultiTurnEnvironment):
    """
    Runs an environment in a process of its own.

    The process starts with the first episode. It is killed when a call takes too long, and replaced before the next
    episode. It ends with ours, however that ends.

    Args:
        environment_factory (`Callable[[], MultiTurnEnvironment]`):
            Makes the environment, in the process. It must be picklable: a class or function of a module, or a
            `functools.partial` of one. As everywhere with processes, a script that defines it needs
            `if __name__ == "__main__":` around what it runs.
        timeout (`float`, *optional*, defaults to `60.0`):
            Seconds that a call may take. Keep it below the rollout's `env_timeout`.
        max_episodes (`int`, *optional*):
            Replace the process after so many episodes, whatever it may have leaked. `None` keeps it.

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
        if timeout <= 0:
            raise ValueError(f"timeout is {timeout}; give a positive number of seconds.")
        if max_episodes is not None and max_episodes < 1:
            raise ValueError(f"max_episodes is {max_episodes}; give at least 1, or None to keep the process.")
        self._factory = environment_factory
        self._timeout = timeout
        self._max_episodes = max_episodes
        self._episodes = 0
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None

    def reset(self, **task: Any) -> Observation:
        """Begin an episode, in a new process where there is none."""
        if self._episodes == self._max_episodes:
            self.close()
        if self._process is None:
            self._start()
        self._episodes += 1
        return self._call("reset", (), task)

    def step(self, message: dict[str, Any]) -> StepResult:
        """Hand over the policy's message."""
        return self._call("step", (message,), {})

    def close(self) -> None:
        """Close the environment and end the process."""
        if self._process is not None:
            try:
                self._call("close", (), {}, CLOSE_TIMEOUT)
            except Exception as error:
                logger.warning("Could not close the environment in process %s: %s", self._process.pid, error)
            self._kill()

    def _start(self) -> None:
        context = multiprocessing.get_context(START_METHOD)
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._factory), daemon=True)
        self._process.start()
        theirs.close()
        self._episodes = 0

    def _kill(self) -> None:
        process, connection = self._process, self._connection
        self._process = self._connection = None
        if process is not None:
            process.kill()
            process.join()
            connection.close()

    def _call(self, method: str, args: tuple, kwargs: dict[str, Any], timeout: float | None = None) -> Any:
        timeout = timeout or self._timeout
        if self._process is None:
            raise RuntimeError("The environment's process has ended; call reset() first.")
        pid = self._process.pid
        try:
            self._connection.send((method, args, kwargs))
            if not self._connection.poll(timeout):
                self._kill()
                raise TimeoutError(f"{method}() took more than {timeout:g} seconds; process {pid} was killed")
            error, result = self._connection.recv()
        except (EOFError, OSError) as error:
            if isinstance(error, TimeoutError):
                raise
            self._kill()
            raise RuntimeError(f"Process {pid} of the environment died during {method}().") from error
        if error is not None:
            raise RuntimeError(error)
        return result


def _serve(connection: Connection, factory: Callable[[], MultiTurnEnvironment]) -> None:
    """The process: answers calls until it is told to close, or until ours is gone."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    environment = None
    while True:
        try:
            method, args, kwargs = connection.recv()
        except EOFError:
            return
        try:
            if environment is None:
                environment = factory()
            answer = None, getattr(environment, method)(*args, **kwargs)
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}", None
        try:
            connection.send(answer)
        except OSError:
            return
        except Exception as error:
            connection.send((f"{method}() returned what cannot be sent between processes: {error}", None))


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
