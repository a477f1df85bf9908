"""
The random generators of the process, `random` and `numpy.random`. A `reset` that seeds one and draws from it begins
the episode that its seed says only if nobody else draws meanwhile: members of a group would play different tasks.
"""

import inspect
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import numpy as np


logger = logging.getLogger(__name__)

# Both are Mersenne twisters: so many words that are drawn one after another, and then all made anew.
_WORDS = 624
_MOST_BLOCKS = 16

Twister = tuple[Any, int]  # the words, and how many were drawn


class RandomState:
    """
    Which environments have to begin their episodes alone: those that seed generators of the process in `reset`. The
    first one of a factory does in any case, and shows it.
    """

    def __init__(self):
        self._known: list[Any] = []  # factories of which one has begun an episode
        self._is_seeded = False
        self._has_warned = False

    def begins_alone(self, factory: Any) -> bool:
        """Whether no other environment may be called while one of this factory begins an episode."""
        return self._is_seeded or all(factory is not known for known in self._known)

    def watched(self, factory: Any, reset: Callable[[], Any], is_alone: bool) -> Callable[[], Any]:
        """The `reset` of an environment of some factory, with a look at the generators before and after."""
        look = partial(self._look, is_alone)

        def call() -> Any:
            if all(factory is not known for known in self._known):
                self._known.append(factory)  # also where this one never returns
            with look():
                result = reset()
            return finish(result, look) if inspect.iscoroutine(result) else result

        async def finish(coroutine: Any, look: Callable[[], AbstractContextManager]) -> Any:
            with look():
                return await coroutine

        return call

    @contextmanager
    def _look(self, is_alone: bool) -> Iterator[None]:
        if self._is_seeded and (is_alone or self._has_warned):
            yield
            return
        before = _twisters()
        try:
            yield
        finally:
            if not all(map(_is_drawn, before, _twisters())):
                self._is_seeded = True
                if not is_alone and not self._has_warned:
                    self._has_warned = True
                    logger.warning(
                        "Environments seeded the random generators of the process (`random`, `numpy.random`) while "
                        "several began their episodes: members of a group may have got different tasks in this "
                        "batch. From now on they begin one after another. A generator of the environment's own "
                        "(`random.Random(seed)`) needs neither."
                    )


def _twisters() -> list[Twister]:
    words = random.getstate()[1]
    states: list[Twister] = [(words[:-1], words[-1])]
    of_numpy = np.random.get_state()
    if isinstance(of_numpy, tuple):  # the script has not put another generator there
        states.append((of_numpy[1].tobytes(), of_numpy[2]))
    return states


def _is_drawn(before: Twister, after: Twister) -> bool:
    """Whether draws alone lead from one state to another, ten thousand at most."""
    (words, drawn), (goal, at_last) = before, after
    if words == goal:
        return drawn <= at_last
    if isinstance(words, bytes):
        words, goal = (tuple(np.frombuffer(state, np.uint32).tolist()) for state in (words, goal))
    generator = random.Random()
    generator.setstate((3, (*words, drawn), None))
    for _ in range(_MOST_BLOCKS):
        generator.getrandbits(32 * (_WORDS + 1 - drawn))  # the first one of the next words
        drawn = 1
        if generator.getstate()[1][:-1] == goal:
            return True
    return False
