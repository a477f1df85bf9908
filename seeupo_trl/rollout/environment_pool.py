"""
The environments of a process: made, called at the same time, each call under a time limit, and closed.

Each environment lives in a thread of its own ([`Instance`]): it is made, called and closed there, one call after
another, because what some libraries open (a connection of sqlite3, a browser of Playwright) works in one thread only.
A call that does not come back can be given up only together with its thread: Python cannot end it. Such a thread, and
the environment in it, is left behind; should the call return one day, the environment is closed, not before. That of a
coroutine returns when the coroutine, which is cancelled, has ended.
Coroutines (`async def reset`) all run on one event loop, so that environments may share an asynchronous client.

A call that holds the interpreter's lock for ever (a loop in C code) stops every thread; such environments belong in
processes of their own, see [`~seeupo_trl.envs.IsolatedEnvironment`].
"""

import asyncio
import inspect
import logging
import math
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future, wait
from contextvars import Context
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from ..envs.base import MultiTurnEnvironment
from ..envs.call_thread import CallThread
from ..envs.tools import ToolEnvironment
from .random_state import RandomState


logger = logging.getLogger(__name__)

CLOSE_TIMEOUT = 10.0  # seconds
_CALL = "seeupo-call"  # name of tasks that run coroutines of environments
_AT_EXIT = (
    ". The interpreter is exiting, where `asyncio.to_thread` and executors work no longer. An environment that needs "
    "them is closed by `close()` of the trainer, or of the rollout, at the end of the script."
)
LONG_CALL = 120.0  # seconds after which a call without a time limit is worth a word


class NotAnEnvironmentError(TypeError):
    """The factory does not make environments: a mistake of the script, not a fault of an environment."""


class Instance(CallThread):
    """
    An environment and the thread that it lives in. Made by [`EnvironmentPool`].

    Args:
        factory (`Callable[[], MultiTurnEnvironment]`):
            Makes the environment.
        event_loop ([`CommonEventLoop`]):
            Runs coroutines.
        instances (`Iterable[Instance]`):
            All that may be called: none plays with the environment of another.

    Attributes:
        factory (`Callable[[], MultiTurnEnvironment]`):
            The same.
        environment ([`~seeupo_trl.envs.MultiTurnEnvironment`], *optional*):
            The environment; `None` until it is made.
        is_stuck (`bool`):
            Whether it was given up in the middle of a call.
    """

    def __init__(
        self,
        factory: Callable[[], MultiTurnEnvironment],
        event_loop: "CommonEventLoop",
        instances: "Iterable[Instance]",
    ):
        self.environment: MultiTurnEnvironment | None = None
        self.is_stuck = False
        self.factory = factory
        self._event_loop = event_loop
        self._instances = instances
        self._coroutine: RunningCoroutine | None = None
        super().__init__("seeupo-environment")

    def made(self) -> MultiTurnEnvironment:
        """
        The environment, which is made now if there is none yet. To be called in the thread.

        Raises:
            `NotAnEnvironmentError`:
                When the factory returns something else, or what another instance plays with.
        """
        if self.environment is None:
            environment = self.factory()
            if not isinstance(environment, MultiTurnEnvironment):
                raise NotAnEnvironmentError(
                    f"environment_factory returned a {type(environment).__name__}; it must return an instance of a "
                    "subclass of seeupo_trl.envs.MultiTurnEnvironment."
                )
            self.environment = environment
            played = _played(environment)
            others = [other.environment for other in list(self._instances) if other is not self]
            if any(played is _played(other) for other in others):
                self.environment = None  # it is the other's to close
                raise NotAnEnvironmentError(
                    f"environment_factory returned the same {type(played).__name__} again, but each episode that is "
                    "played at the same time needs one of its own. Return a new instance at each call, or give the "
                    "class itself."
                )
        return self.environment

    def give_up(self) -> None:
        """Wait for the present call no longer. A coroutine is cancelled, and has returned when it has cleaned up."""
        self.is_stuck = True
        coroutine = self._coroutine
        if coroutine is not None:
            coroutine.cancel()

    def close(self) -> Future:
        """Close the environment when its present call has returned, and end the thread."""
        closed = self.submit(self._close)
        closed.add_done_callback(self._report)
        self.end()
        return closed

    def _call(self, function: Callable[[], Any]) -> Any:
        """Run a function in the thread; a coroutine that it returns is run on the event loop."""
        result = super()._call(function)
        if not inspect.iscoroutine(result):
            return result
        self._coroutine = self._event_loop.run(result, self._context)
        try:
            return self._coroutine.result()
        finally:
            self._coroutine = None

    def _close(self) -> Any:
        return None if self.environment is None else self.environment.close()

    def _report(self, closed: Future) -> None:
        if closed.exception() is not None:
            hint = "" if threading.main_thread().is_alive() else _AT_EXIT
            logger.warning("Could not close %s: %s%s", type(self.environment).__name__, closed.exception(), hint)


def _word_on_long_call(instance: Instance) -> str:
    taken = f"has taken {LONG_CALL:g} seconds"
    if instance.environment is None:
        return (
            f"The factory {_name_of(instance.factory)} {taken} to make an environment, and is waited for. "
            "`env_timeout` sets a limit, but for those that are made with the trainer."
        )
    return (
        f"A call of {type(_played(instance.environment)).__name__} {taken}, and is waited for. `env_timeout` sets a "
        "limit, after which the episode is given up. A semaphore, lock or queue of asyncio that environments share "
        "may wait for ever where each of them runs an event loop of its own (`asyncio.run` in a tool): use it in "
        "`async def` methods, which all run on one, or play one after another (`max_concurrent_envs=1`)."
    )


def _name_of(factory: Callable) -> str:
    """The name of the class or function that the script gave."""
    while isinstance(factory, partial):
        factory = factory.args[0] if factory.func is ToolEnvironment and factory.args else factory.func
    return getattr(factory, "__name__", repr(factory))


def _played(environment: MultiTurnEnvironment | None) -> Any:
    """What the factory of the script made."""
    return environment.environment if isinstance(environment, ToolEnvironment) else environment


class EnvironmentPool:
    """
    Environments, from when they are made until they fail or all are closed. Others decide who plays what.

    Attributes:
        random_state ([`~seeupo_trl.rollout.random_state.RandomState`]):
            Says which of them begin an episode alone.
        random_state_of_rewards ([`~seeupo_trl.rollout.random_state.RandomState`]):
            Says which of them compute a reward alone.
        has_said_long (`bool`):
            Whether there was a word on a call without a time limit that took long.
    """

    def __init__(self):
        self.random_state = RandomState("began their episodes: members of a group may have got different tasks")
        self.random_state_of_rewards = RandomState("computed their rewards, which may be wrong")
        self.has_said_long = False
        self._instances: dict[Instance, None] = {}  # in the order in which they were made
        self._event_loop = CommonEventLoop()
        weakref.finalize(self, _shut_down, self._instances, self._event_loop)

    def new_instance(self, factory: Callable[[], MultiTurnEnvironment]) -> Instance:
        """
        An environment, which is made in its thread when [`Instance.made`] is called there.

        Args:
            factory (`Callable[[], MultiTurnEnvironment]`):
                Makes it.
        """
        instance = Instance(factory, self._event_loop, self._instances)
        self._instances[instance] = None
        return instance

    def __contains__(self, instance: Instance | None) -> bool:
        """Whether an environment may still be called: it was not discarded, nor the pool closed."""
        return instance in self._instances

    def discard(self, instance: Instance) -> None:
        """Close an environment that failed: whatever state it is in, it does not get another task."""
        if instance in self:
            del self._instances[instance]
            _close_all([instance])

    def pending_calls(self, timeout: float | None) -> "PendingCalls":
        """
        Calls of environments of this pool, none yet.

        Args:
            timeout (`float`, *optional*):
                As in [`PendingCalls`].
        """
        return PendingCalls(self, timeout)

    def call(self, calls: list[tuple[Instance, Callable[[], Any]]], timeout: float | None) -> list["CallOutcome"]:
        """
        Run functions at the same time, each in the thread of its environment. Those of an interrupted wait are given
        up, as by [`PendingCalls.give_up`].

        Args:
            calls (`list[tuple[Instance, Callable]]`):
                Different instances, and functions without arguments. A coroutine that one returns is run on the
                common event loop.
            timeout (`float`, *optional*):
                Seconds until those that have not returned are given up. `None` waits for ever.

        Returns:
            `list[CallOutcome]`: one for each function.
        """
        pending = self.pending_calls(timeout)
        outcomes = {}
        try:
            for key, (instance, function) in enumerate(calls):
                pending.make(key, instance, function)
            while pending:
                outcomes.update(pending.wait(None))
        finally:
            pending.give_up()
        return [outcomes[key] for key in range(len(calls))]

    def give_up(self, instances: Iterable[Instance]) -> None:
        """Wait no longer for the present calls of some environments."""
        instances = list(instances)
        for instance in instances:
            instance.give_up()
        if instances:
            self._event_loop.replace_if_blocked()

    def close(self) -> None:
        """Close all environments."""
        _shut_down(self._instances, self._event_loop)


class PendingCalls:
    """
    Calls of environments that have not been answered yet.

    Args:
        pool ([`EnvironmentPool`]):
            Where the environments are from.
        timeout (`float`, *optional*):
            Seconds until a call that has not returned is given up. `None` waits for ever, and says so once.
    """

    def __init__(self, pool: EnvironmentPool, timeout: float | None):
        self._pool = pool
        self._timeout = timeout
        self._calls: dict[Future, tuple[int, Instance, float]] = {}  # the oldest first: key, instance, when it began
        self._done: SimpleQueue[tuple[Future, float]] = SimpleQueue()

    def __len__(self) -> int:
        return len(self._calls)

    def make(self, key: int, instance: Instance, function: Callable[[], Any]) -> None:
        """
        Run a function in the thread of an environment.

        Args:
            key (`int`):
                Comes back with the outcome.
            instance ([`Instance`]):
                The environment.
            function (`Callable`):
                A function without arguments. A coroutine that it returns is run on the common event loop.
        """
        future: Future = Future()
        self._calls[future] = (key, instance, time.perf_counter())  # before an interrupt may find it begun
        future.add_done_callback(lambda future: self._done.put((future, time.perf_counter())))
        instance.submit(function, future)

    def wait(self, timeout: float | None) -> list[tuple[int, "CallOutcome"]]:
        """
        Wait until a call returns, is given up, or `timeout` seconds are over (`None`: for ever). Returns the keys and
        outcomes of all that have.
        """
        outcomes = []
        until = math.inf if timeout is None else time.perf_counter() + timeout
        while self._calls and not outcomes:
            outcomes = [*self._returned(min(until, self._deadline())), *self._overdue()]
            if time.perf_counter() >= until:
                break
        return outcomes

    def give_up(self) -> None:
        """Wait for none of them any longer. Environments that have not answered, or failed, do not play again."""
        calls = [(future, instance) for future, (_, instance, _) in self._calls.items()]
        instances = [instance for future, instance in calls if not future.done() or future.exception() is not None]
        self._calls.clear()
        self._pool.give_up(instances)
        for instance in instances:
            self._pool.discard(instance)

    def _deadline(self) -> float:
        """When the oldest call is given up, or said to take long."""
        _, _, start = next(iter(self._calls.values()))
        patience = math.inf if self._pool.has_said_long else LONG_CALL
        return start + (patience if self._timeout is None else self._timeout)

    def _returned(self, until: float) -> list[tuple[int, "CallOutcome"]]:
        """Those that have returned; waits for one."""
        outcomes = []
        left = None if until == math.inf else max(until - time.perf_counter(), 0.0)
        try:
            while True:
                future, end = self._done.get(timeout=0.0 if outcomes else left)
                if future in self._calls:  # not if it was given up
                    key, _, start = self._calls.pop(future)
                    outcomes.append((key, CallOutcome(future, self._timeout, end - start)))
        except Empty:
            return outcomes

    def _overdue(self) -> list[tuple[int, "CallOutcome"]]:
        """Those that are given up now."""
        outcomes, stuck = [], []
        if self._timeout is None and self._calls and self._deadline() <= time.perf_counter():
            self._pool.has_said_long = True
            _, instance, _ = next(iter(self._calls.values()))
            logger.warning(_word_on_long_call(instance))
        while self._calls and self._deadline() <= time.perf_counter():
            future = next(iter(self._calls))
            key, instance, start = self._calls.pop(future)
            outcome = CallOutcome(future, self._timeout, time.perf_counter() - start)
            outcomes.append((key, outcome))
            if outcome.is_stuck:
                stuck.append(instance)
        self._pool.give_up(stuck)
        return outcomes


class CallOutcome:
    """
    What became of a call.

    Args:
        future (`Future`):
            The call. One that is not done is given up.
        timeout (`float`, *optional*):
            Seconds that it had.
        seconds (`float`):
            Seconds that it took.

    Attributes:
        error (`Exception`, *optional*):
            What it raised; a `TimeoutError` if it did not return in time.
        is_stuck (`bool`):
            Whether it had not returned.
    """

    def __init__(self, future: Future, timeout: float | None, seconds: float):
        self._future = future
        self.seconds = seconds
        self.error: Exception | None = None
        self.is_stuck = not future.done()
        if self.is_stuck:
            self.error = TimeoutError(f"no answer within {timeout:g} seconds (`env_timeout`)")
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


class RunningCoroutine:
    """
    A coroutine on an event loop, which another thread waits for.

    Args:
        coroutine (`Coroutine`):
            The coroutine.
        context (`Context`):
            The context that it runs in, which nothing else may be in until it has ended.
        event_loop (`asyncio.AbstractEventLoop`):
            The loop.
    """

    def __init__(self, coroutine: Coroutine, context: Context, event_loop: asyncio.AbstractEventLoop):
        self._event_loop = event_loop
        self._task: asyncio.Task | None = None
        self._ended: SimpleQueue[asyncio.Task] = SimpleQueue()
        event_loop.call_soon_threadsafe(self._start, coroutine, context)

    def result(self) -> Any:
        """Wait until it has ended, also where it is cancelled; what it returned, or raises what it raised."""
        return self._ended.get().result()

    def cancel(self) -> None:
        """Have it end soon."""
        self._event_loop.call_soon_threadsafe(self._cancel)

    def _start(self, coroutine: Coroutine, context: Context) -> None:
        self._task = self._event_loop.create_task(coroutine, name=_CALL, context=context)
        self._task.add_done_callback(self._ended.put)

    def _cancel(self) -> None:
        self._task.cancel()


class CommonEventLoop:
    """An event loop in a thread of its own, which starts with the first coroutine."""

    def __init__(self):
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()

    def run(self, coroutine: Coroutine, context: Context) -> RunningCoroutine:
        """Run a coroutine in a context, which nothing else may be in until it has ended."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=_run, args=(self._loop,), daemon=True, name="seeupo-event-loop").start()
            return RunningCoroutine(coroutine, context, self._loop)

    def replace_if_blocked(self) -> None:
        """Leave a loop that a coroutine blocks; coroutines to come get a new one."""
        if self._loop is not None:
            answered = threading.Event()
            self._loop.call_soon_threadsafe(answered.set)
            if not answered.wait(1.0):
                self._loop = None

    def stop(self) -> None:
        """Stop the loop, once coroutines that were given up have ended."""
        with self._lock:
            if self._loop is not None:
                asyncio.run_coroutine_threadsafe(_stop_after_calls(self._loop), self._loop)
                self._loop = None


async def _stop_after_calls(event_loop: asyncio.AbstractEventLoop) -> None:
    calls = [task for task in asyncio.all_tasks() if task.get_name() == _CALL]
    if calls:
        await asyncio.wait(calls)
    event_loop.stop()


def _run(event_loop: asyncio.AbstractEventLoop) -> None:
    """Run a loop until it is stopped, whatever coroutines raise."""
    while True:
        try:
            return event_loop.run_forever()
        except (SystemExit, KeyboardInterrupt):  # also the error of the coroutine that raised it
            pass


def _shut_down(instances: dict[Instance, None], event_loop: CommonEventLoop) -> None:
    _close_all(instances)
    instances.clear()
    event_loop.stop()


def _close_all(instances: Iterable[Instance]) -> None:
    """Close environments, and wait for those that are not stuck."""
    closing = [(instance, instance.close()) for instance in instances]
    in_time = [(instance, closed) for instance, closed in closing if not instance.is_stuck]
    wait([closed for _, closed in in_time], CLOSE_TIMEOUT)
    for instance, closed in in_time:
        if not closed.done():
            name = type(instance.environment).__name__
            logger.warning("%s did not close within %g seconds.", name, CLOSE_TIMEOUT)
