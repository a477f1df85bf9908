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


class RandomState:
    """
    Which environments have to begin their episodes alone: those that draw from generators of the process in `reset`.
    The first one of a kind does in any case, and shows it.
    """

    def __init__(self):
        self._known: set[Any] = set()  # kinds of which one has begun an episode
        self._is_drawn_from = False

    def begins_alone(self, kind: Any) -> bool:
        """Whether no other environment may be called while one of this kind begins an episode."""
        return self._is_drawn_from or kind not in self._known

    def watched(self, kind: Any, reset: Callable[[], Any]) -> Callable[[], Any]:
        """The `reset` of an environment of some kind, with a look at the generators before and after."""

        def call() -> Any:
            look = partial(self._look, self.begins_alone(kind))
            self._known.add(kind)  # also where this one never returns
            with look():
                result = reset()
            return finish(result, look) if inspect.iscoroutine(result) else result

        async def finish(coroutine: Any, look: Callable[[], AbstractContextManager]) -> Any:
            with look():
                return await coroutine

        return call

    @contextmanager
    def _look(self, is_alone: bool) -> Iterator[None]:
        before = _states()
        try:
            yield
        finally:
            is_new = not self._is_drawn_from and _states() != before
            self._is_drawn_from |= is_new
            if is_new and not is_alone:
                logger.warning(
                    "Environments drew from the random generators of the process (`random`, `numpy.random`) while "
                    "several began their episodes: where `reset` seeds them, members of a group may have got "
                    "different tasks in this batch. From now on they begin one after another. A generator of the "
                    "environment's own (`random.Random(seed)`) needs neither."
                )


def _states() -> tuple[Any, ...]:
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), kind, keys.tobytes(), rest
