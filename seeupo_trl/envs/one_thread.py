"""
What works in one thread only: in the main one, or in the one that made it. It fails in an environment, which has a
thread of its own, and then the policy is not to blame.
"""

import inspect
import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from traceback import walk_tb


logger = logging.getLogger(__name__)

# What is said where something works in the main thread only, or in the thread that made it; and by which package.
_THREAD_ERRORS = {
    "signal only works in main thread": "builtins",
    "set_wakeup_fd only works in main thread": "builtins",
    "There is no current event loop in thread": "builtins",
    "SQLite objects created in a thread can only be used in that same thread": "sqlite3",
    "Cannot switch to a different thread": "greenlet",  # by Playwright
}

# The same of Python's own errors whose whole text is needed to tell them from others, and their types.
_ALREADY_RUNNING = "This event loop is already running"
_WHOLE_TEXTS = {
    _ALREADY_RUNNING: RuntimeError,
    "Task <.*> got Future <.*> attached to a different loop": RuntimeError,
    "<.* at 0x.*> is bound to a different event loop": RuntimeError,
    "The future belongs to a different loop than the one specified as the loop argument": ValueError,
    r"'_thread\._local' object has no attribute '\w+'": AttributeError,
}

CAUSE = (
    "in one thread only: in the main one (it sets a signal, or asks for that thread's event loop), in the one where "
    "something that it uses was made (a connection of sqlite3, a browser of Playwright, what a `threading.local` "
    "holds), or in one at a time (an event loop, or an object of asyncio, that environments share). Each environment "
    "plays in a thread of its own."
)
CURE = (
    "Make such things in `reset` of the environment, not beside it; limit a tool's time in another way than by a "
    "signal (`env_timeout` gives up a call that hangs), or make it `async def`: coroutines all run on one event loop. "
    "An event loop that environments share serves them one after another, with `max_concurrent_envs=1`."
)


def needs_another_thread(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, says that it comes from the thread it happened in."""
    seen: dict[int, BaseException] = {}  # errors may be raised from themselves
    left = [error]
    while left:
        error = left.pop()
        if error is None or id(error) in seen:
            continue
        if _is_of_thread(error):
            return True
        seen[id(error)] = error
        left += [error.__cause__, error.__context__]
        left += error.exceptions if isinstance(error, BaseExceptionGroup) else []
    return False


def _is_of_thread(error: BaseException) -> bool:
    text, package = text_of(error), type(error).__module__.partition(".")[0]
    if any(package == by and part in text for part, by in _THREAD_ERRORS.items()):
        return True
    if text == _ALREADY_RUNNING and _is_of_coroutine(error):  # which waits for its own loop
        return False
    return any(type(error) is kind and re.fullmatch(whole, text) for whole, kind in _WHOLE_TEXTS.items())


def _is_of_coroutine(error: BaseException) -> bool:
    return any(frame.f_code.co_flags & inspect.CO_COROUTINE for frame, _ in walk_tb(error.__traceback__))


def text_of(error: BaseException | str) -> str:
    """Its text, also of an error that has none."""
    try:
        return str(error)
    except Exception:
        return type(error).__name__


@contextmanager
def explained(what: str, consequence: str = "") -> Iterator[None]:
    """
    Says once for `what` where an error that leaves the block comes from, and what to do, if it comes from the thread.
    """
    try:
        yield
    except Exception as error:
        if needs_another_thread(error):
            _say_once(f"{what} works {CAUSE}{consequence} {CURE}")
        raise


def look_for_thread_errors(tool: str, result: str) -> None:
    """Says once for `tool` that it may work in another thread only, if its result has the text of such an error."""
    if any(text in result for text in _THREAD_ERRORS) or any(re.search(whole, result) for whole in _WHOLE_TEXTS):
        _say_once(
            f"{tool} may work {CAUSE} One of its results has the text of such an error. If that is none of code that "
            "the policy wrote, but one that the tool caught, the policy is trained on it without being to blame: let "
            f"the tool raise it, and such episodes are left out of training. {CURE}"
        )


_lock = threading.Lock()


def _say_once(text: str) -> None:
    with _lock:  # a cached function may run in several threads at first
        _say(text)


@cache
def _say(text: str) -> None:
    logger.warning(text)
