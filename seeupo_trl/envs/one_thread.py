"""
What works in one thread only: in the main one, or in the one that made it. It fails in an environment, which has a
thread of its own, and then the policy is not to blame.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache


logger = logging.getLogger(__name__)

# What is said where something works in the main thread only, or in the thread that made it; and by which package.
_THREAD_ERRORS = {
    "signal only works in main thread": "builtins",
    "set_wakeup_fd only works in main thread": "builtins",
    "There is no current event loop in thread": "builtins",
    "SQLite objects created in a thread can only be used in that same thread": "sqlite3",
    "Cannot switch to a different thread": "greenlet",  # by Playwright
}

CAUSE = (
    "in one thread only: in the main one (it sets a signal, or asks for that thread's event loop), or in the one "
    "where something that it uses was made (a connection of sqlite3, a browser of Playwright). Each environment plays "
    "in a thread of its own."
)
CURE = (
    "Make such things in `reset` of the environment, not beside it; limit a tool's time in another way than by a "
    "signal (`env_timeout` gives up a call that hangs), or make it `async def`."
)


def needs_another_thread(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, says that it comes from the thread it happened in."""
    while error is not None:
        package = type(error).__module__.partition(".")[0]
        if any(package == by and text in text_of(error) for text, by in _THREAD_ERRORS.items()):
            return True
        error = error.__cause__ or error.__context__
    return False


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
    if any(text in result for text in _THREAD_ERRORS):
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
