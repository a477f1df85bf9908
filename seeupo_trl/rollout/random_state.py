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
_MOST_BLOCKS = 10_000

Twister = tuple[Any, int]  # the words, and how many were drawn


class RandomState:
    """
    Which environments have to begin their episodes alone: those that seed generators of the process in `reset`. The
    first one of a factory does in any case, and shows it: from generators in a state that no seed leads to.
    """

    def __init__(self):
        self._known: list[Any] = []  # factories of which one has begun an episode
        self._is_seeded = False
        self._kept: list[Callable[[], None]] = []  # give the generators the states that the first one did not get

    def begins_alone(self, factory: Any) -> bool:
        """Whether no other environment may be called while one of this factory begins an episode."""
        return self._is_seeded or self._is_first(factory)

    def watched(self, factory: Any, reset: Callable[[], Any], is_alone: bool) -> Callable[[], Any]:
        """The `reset` of an environment of some factory, with a look at the generators before and after."""

        def call() -> Any:
            look = self._look_at_later
            if self._is_first(factory):
                self._known.append(factory)  # also where this one never returns
                look = self._look_at_first if is_alone else look
            with look():
                result = reset()
                if not inspect.iscoroutine(result):
                    return result
            return finish(result, look)

        async def finish(coroutine: Any, look: Callable[[], AbstractContextManager]) -> Any:
            with look():
                return await coroutine

        return call

    def put_back(self) -> None:
        """Give the generators the states that they had before the first `reset`, unless it is over."""
        kept, self._kept = self._kept, []
        for put_back in kept:
            put_back()

    def _is_first(self, factory: Any) -> bool:
        return all(factory is not known for known in self._known)

    @contextmanager
    def _look_at_first(self) -> Iterator[None]:
        of_python, of_numpy = random.getstate(), np.random.get_state()
        name = repr(of_python)
        self._kept = [partial(random.setstate, of_python)]
        random.seed(name)
        if _is_twister(of_numpy):
            self._kept.append(partial(np.random.set_state, of_numpy))
            np.random.seed(random.Random(name).choices(range(2**32), k=_WORDS))
        before = _twisters()
        try:
            yield
        finally:
            drawn = list(map(_is_drawn, before, _twisters()))
            if self._kept:  # not given up
                self._is_seeded |= not all(drawn)
                self._kept = [put_back for put_back, is_drawn in zip(self._kept, drawn, strict=True) if is_drawn]
                self.put_back()

    @contextmanager
    def _look_at_later(self) -> Iterator[None]:
        """Of several at the same time."""
        if self._is_seeded:
            yield
            return
        before = _twisters()
        try:
            yield
        finally:
            seeds = not all(map(_is_drawn, before, _twisters()))
            if seeds and not self._is_seeded:
                self._is_seeded = True
                logger.warning(
                    "Environments seeded the random generators of the process (`random`, `numpy.random`) while "
                    "several began their episodes: members of a group may have got different tasks in this batch. "
                    "From now on they begin one after another. A generator of the environment's own "
                    "(`random.Random(seed)`) needs neither."
                )


def _twisters() -> list[Twister]:
    words = random.getstate()[1]
    states: list[Twister] = [(words[:-1], words[-1])]
    of_numpy = np.random.get_state()
    if _is_twister(of_numpy):
        states.append((of_numpy[1].tobytes(), of_numpy[2]))
    return states


def _is_twister(of_numpy: Any) -> bool:
    """Whether the script has not put another generator in the place of NumPy's."""
    return isinstance(of_numpy, tuple)


def _is_drawn(before: Twister, after: Twister) -> bool:
    """Whether draws alone lead from one state to another, a few million at most."""
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
