"""
The random generators of the process: of `random`, `numpy.random` and `torch`. A `reset` that seeds one and draws from
it begins the episode that its seed says only if nobody else draws meanwhile: members of a group would play different
tasks. The same holds for a `get_reward`.
"""

import inspect
import logging
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import partial, wraps
from typing import Any

import numpy as np
import torch


logger = logging.getLogger(__name__)

# `random` and NumPy have Mersenne twisters: so many words that are drawn one after another, and then all made anew.
_WORDS = 624
_MOST_BLOCKS = 50_000
_FEW_BLOCKS = 1_000

# What seeds, or puts back a state. `torch.manual_seed` calls the last one, however the script imported it.
_SEEDING = (
    (random, "seed"),
    (random, "setstate"),
    (np.random, "seed"),
    (np.random, "set_state"),
    (torch, "set_rng_state"),
    (torch.cuda, "manual_seed_all"),
)

Twister = tuple[Any, int]  # the words, and how many were drawn


class RandomState:
    """
    Which environments have to do something alone, as beginning an episode: those that seed generators of the process
    in it. The first one of a factory does in any case, and shows it: by what it calls, and by where generators are
    that were in a state that no seed leads to.

    Args:
        risk (`str`):
            What several do at the same time, and what comes of seeding in it, for the warning.
    """

    def __init__(self, risk: str):
        self._risk = risk
        self._known: list[Any] = []  # factories of which one has done it
        self._is_seeded = False
        self._times_given_up = 0
        self._judging = threading.Lock()
        self._kept: list[Callable[[], None]] = []  # give the generators the states that the first one did not get

    def is_alone(self, factory: Any) -> bool:
        """Whether no other environment may be called while one of this factory does it."""
        return self._is_seeded or self._is_first(factory)

    def watched(self, factory: Any, function: Callable[[], Any], is_alone: bool) -> Callable[[], Any]:
        """What an environment of some factory does, with a look at the generators before and after."""

        def call() -> Any:
            look = self._look_at_later
            if self._is_first(factory):
                self._known.append(factory)  # also where this one never returns
                look = self._look_at_first if is_alone else look
            with look():
                result = function()
                if not inspect.iscoroutine(result):
                    return result
            return finish(result, look)

        async def finish(coroutine: Any, look: Callable[[], AbstractContextManager]) -> Any:
            with look():
                return await coroutine

        return call

    def give_up(self) -> None:
        """
        Calls that are under way show nothing any longer: they may return when others have seeded. The generators get
        the states that they had before the first one, unless it is over.
        """
        self._times_given_up += 1
        self._put_back()

    def _put_back(self) -> None:
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
        calls: list[str] = []
        try:
            with _noting(calls):
                yield
        finally:
            if self._kept:  # not given up
                most_blocks = _FEW_BLOCKS if calls else _MOST_BLOCKS
                drawn = [_is_drawn(*states, most_blocks) for states in zip(before, _twisters(), strict=True)]
                self._is_seeded |= bool(calls) or not all(drawn)
                self._kept = [put_back for put_back, is_drawn in zip(self._kept, drawn, strict=True) if is_drawn]
                self._put_back()

    @contextmanager
    def _look_at_later(self) -> Iterator[None]:
        """Of several at the same time."""
        if self._is_seeded:
            yield
            return
        before, times_given_up = _twisters(), self._times_given_up
        try:
            yield
        finally:
            after = _twisters()
            with self._judging:  # where several seed, one look is enough, and takes a while
                is_judged = self._is_seeded or self._times_given_up > times_given_up
                if not is_judged and not all(map(_is_drawn, before, after)):
                    self._is_seeded = True
                    logger.warning(
                        "Environments seeded the random generators of the process (`random`, `numpy.random`) while "
                        "several %s in this batch. From now on they do it one after another. A generator of the "
                        "environment's own (`random.Random(seed)`) needs neither.",
                        self._risk,
                    )


class _Patch:
    """While somebody watches, functions that seed note their calls where the context of the call says."""

    def __init__(self):
        self.notes: ContextVar[list[str] | None] = ContextVar("notes", default=None)
        self._lock = threading.Lock()
        self._watching = 0
        self._patched: list[tuple[Any, str, Callable, Callable]] = []

    def __enter__(self) -> None:
        with self._lock:
            if not self._watching:
                originals = [(module, name, getattr(module, name)) for module, name in _SEEDING]
                self._patched = [(*original, self._noted(*original[1:])) for original in originals]
                for module, name, _, noted in self._patched:
                    setattr(module, name, noted)
            self._watching += 1

    def __exit__(self, *_: Any) -> None:
        with self._lock:
            self._watching -= 1
            if not self._watching:
                for module, name, original, noted in self._patched:
                    if getattr(module, name) is noted:  # not patched by somebody else
                        setattr(module, name, original)

    def _noted(self, name: str, function: Callable) -> Callable:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            notes = self.notes.get()
            if notes is not None:
                notes.append(name)
            return function(*args, **kwargs)

        return call


_patch = _Patch()


@contextmanager
def _noting(calls: list[str]) -> Iterator[None]:
    """Note what seeds in this context, not in other threads: a trainer's update may seed at the same time."""
    _patch.notes.set(calls)
    try:
        with _patch:
            yield
    finally:
        _patch.notes.set(None)


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


def _is_drawn(before: Twister, after: Twister, most_blocks: int = _MOST_BLOCKS) -> bool:
    """Whether draws alone lead from one state to another, and not too many."""
    (words, drawn), (goal, at_last) = before, after
    if words == goal:
        return drawn <= at_last
    if isinstance(words, bytes):
        words, goal = (tuple(np.frombuffer(state, np.uint32).tolist()) for state in (words, goal))
    generator = random.Random()
    generator.setstate((3, (*words, drawn), None))
    for _ in range(most_blocks):
        generator.getrandbits(32 * (_WORDS + 1 - drawn))  # the first one of the next words
        drawn = 1
        if generator.getstate()[1][:-1] == goal:
            return True
    return False
