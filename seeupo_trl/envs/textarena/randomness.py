"""
A random generator for each game.

TextArena's games draw from Python's module `random`, and `reset` seeds it: games that play at once in one process
would draw from one stream, and seed it for one another and for the training around them. Here the name `random` in
TextArena's own modules stands for an object that hands every call on to the generator of the game that is being
called. Python's module and its state stay as they are, for TextArena's games that something else plays as well.

The same is done with `print`, with which some games write to the console in every step.
"""

import random
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


_called = threading.local()


class _RandomOfTheGame:
    """In place of the module `random`."""

    def __getattr__(self, name: str) -> Any:
        generator = getattr(_called, "generator", None)
        # classes like `random.Random` are the module's
        return getattr(random if generator is None or not hasattr(generator, name) else generator, name)


def _print(*values: Any, **options: Any) -> None:
    if getattr(_called, "generator", None) is None:
        print(*values, **options)


_random = _RandomOfTheGame()


def separate_games() -> None:
    """Give the modules of TextArena that are loaded so far their own `random` and `print`."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "textarena":
            names = vars(module)
            if names.get("random") is random:
                names["random"] = _random
            names.setdefault("print", _print)


@contextmanager
def drawing_from(generator: random.Random) -> Iterator[None]:
    """While a game is called in this thread, what it draws comes from this generator."""
    _called.generator = generator
    try:
        yield
    finally:
        _called.generator = None
