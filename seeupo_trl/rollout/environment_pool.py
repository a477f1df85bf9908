"""
The environments of a process: made, called at the same time, each call under a time limit, and closed.

Every call runs in a thread of its own, because a call that does not come back can be given up only together with its
thread: Python cannot end it. Such a thread, and the environment in it, is left behind and does nothing more; should
the call return one day, the environment is closed. Coroutines (`async def reset`) all run on one event loop, so that
environments may share an asynchronous client.

A call that holds the interpreter's lock for ever (a loop in C code) stops every thread; such environments belong in
processes of their own, see [`~seeupo_trl.envs.IsolatedEnvironment`].
"""

import asyncio
import inspect
import logging
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from typing import Any

from ..envs.base import MultiTurnEnvironment
from ..envs.call_thread import CallThread


logger = logging.getLogger(__name__)

CLOSE_TIMEOUT = 10.0  # seconds


class EnvironmentPool:
    """Environments, from when they are made until they fail or all are closed. Others decide who plays what."""

    def __init__(self):
        self._environments: list[MultiTurnEnvironment] = []
        self._callers = _Callers()
        weakref.finalize(self, _shut_down, self._environments, self._callers)

    def make(self, factory: Callable[[], MultiTurnEnvironment]) -> MultiTurnEnvironment:
        """
        A new environment.

        Args:
            factory (`Callable[[], MultiTurnEnvironment]`):
                Makes it.

        Raises:
            `NotAnEnvironmentError`:
                When the factory returns something else.
        """
        environment = factory()
        if not isinstance(environment, MultiTurnEnvironment):
            raise NotAnEnvironmentError(
                f"environment_factory returned a {type(environment).__name__}; it must return an instance of a "
                "subclass of seeupo_trl.envs.MultiTurnEnvironment."
            )
        self._environments.append(environment)
        return environment

    def discard(self, environment: MultiTurnEnvironment) -> None:
        """Close an environment that failed: whatever state it is in, it does not get another task."""
        self._environments.remove(environment)
        _close_all([environment], self._callers)

    def call(self, functions: list[Callable[[], Any]], timeout: float | None) -> list["CallOutcome"]:
        """
        Run functions at the same time.

        Args:
            functions (`list[Callable]`):
                Functions without arguments. A coroutine that one returns is run on the common event loop.
            timeout (`float`, *optional*):
                Seconds until those that have not returned are given up. `None` waits for ever.

        Returns:
            `list[CallOutcome]`: one for each function.
        """
        return self._callers.call(functions, timeout)

    def close(self) -> None:
        """Close all environments."""
        _shut_down(self._environments, self._callers)


class NotAnEnvironmentError(TypeError):
    """The factory does not make environments: a mistake of the script, not a fault of an environment."""


class CallOutcome:
    """
    What became of a call.

    Attributes:
        error (`Exception`, *optional*):
            What it raised; a `TimeoutError` if it did not return in time.
        is_stuck (`bool`):
            Whether it has not returned yet.
    """

    def __init__(self, future: Future, timeout: float | None):
        self._future = future
        self.error: Exception | None = None
        self.is_stuck = not future.done()
        if self.is_stuck:
            self.error = TimeoutError(f"no answer within {timeout:g} seconds")
            return
        error = future.exception()
        if error is not None and not isinstance(error, Exception):
            # an environment that calls sys.exit() does not end the run
            error = RuntimeError(f"{type(error).__name__}: {error}")
        self.error = error

    def value(self) -> Any:
        """What the call returned; raises what it raised."""
        if self.error is not None:
            raise self.error
        return self._future.result()

    def when_it_returns(self, function: Callable[[], None]) -> None:
        """Run `function` now, or in the call's own thread, should a stuck call return after all."""
        self._future.add_done_callback(lambda _: function())


class _Callers:
    """Threads that run calls, and the event loop for coroutines. Idle threads are used again."""

    def __init__(self):
        self._idle: list[_Caller] = []
        self._loop: _EventLoop | None = None
        self._lock = threading.Lock()

    def call(self, functions: list[Callable[[], Any]], timeout: float | None) -> list[CallOutcome]:
        with self._lock:
            idle = [self._idle.pop() for _ in functions[: len(self._idle)]]
        callers = idle + [_Caller(self.run_coroutine) for _ in functions[len(idle) :]]
        futures = [caller.call(function) for caller, function in zip(callers, functions, strict=True)]
        wait(futures, timeout)
        outcomes = [CallOutcome(future, timeout) for future in futures]
        for caller, outcome in zip(callers, outcomes, strict=True):
            if outcome.is_stuck:
                caller.give_up()
            else:
                with self._lock:
                    self._idle.append(caller)
        if self._loop is not None and any(outcome.is_stuck for outcome in outcomes) and not self._loop.answers():
            self._loop = None  # a coroutine blocks it; the calls to come get a new one
        return outcomes

    def run_coroutine(self, coroutine: Any) -> Future:
        with self._lock:
            if self._loop is None:
                self._loop = _EventLoop()
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop.loop)

    def close(self) -> None:
        for caller in self._idle:
            caller.give_up()
        self._idle.clear()
        if self._loop is not None:
            self._loop.stop()
            self._loop = None


class _Caller(CallThread):
    """A thread whose calls may be given up."""

    def __init__(self, run_coroutine: Callable[[Any], Future]):
        self._run_coroutine = run_coroutine
        self._coroutine: Future | None = None
        super().__init__("seeupo-environment")

    def call(self, function: Callable[[], Any]) -> Future:
        """Run a function; a coroutine that it returns is run on the event loop."""
        return self.submit(partial(self._complete, function))

    def give_up(self) -> None:
        """End the thread once its present call has returned; a coroutine is cancelled."""
        self.end()
        if self._coroutine is not None:
            self._coroutine.cancel()

    def _complete(self, function: Callable[[], Any]) -> Any:
        result = function()
        if not inspect.iscoroutine(result):
            return result
        self._coroutine = self._run_coroutine(result)
        try:
            return self._coroutine.result()
        finally:
            self._coroutine = None


class _EventLoop:
    """An event loop in a thread of its own."""

    def __init__(self):
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True, name="seeupo-event-loop").start()

    def answers(self) -> bool:
        """Whether the loop still turns."""
        answered = threading.Event()
        self.loop.call_soon_threadsafe(answered.set)
        return answered.wait(1.0)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)


def _shut_down(environments: list[MultiTurnEnvironment], callers: _Callers) -> None:
    _close_all(environments, callers)
    environments.clear()
    callers.close()


def _close_all(environments: list[MultiTurnEnvironment], callers: _Callers) -> None:
    if not environments:
        return
    outcomes = callers.call([environment.close for environment in environments], CLOSE_TIMEOUT)
    for environment, outcome in zip(environments, outcomes, strict=True):
        if outcome.error is not None:
            logger.warning("Could not close %s: %s", type(environment).__name__, outcome.error)
