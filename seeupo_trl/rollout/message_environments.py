"""Message-level environments on the side of the rollout: who plays which episode."""

from collections.abc import Callable
from typing import Any

from ..envs.base import MultiTurnEnvironment
from .environment_pool import EnvironmentPool
from .episode import ResetCall
from .observations import copied


class MessageEnvironments:
    """
    [`~seeupo_trl.envs.MultiTurnEnvironment`]s that are lent to one episode after another, and all alike.

    Args:
        factory (`Callable[[], MultiTurnEnvironment]`):
            Makes one where none is idle.
    """

    def __init__(self, factory: Callable[[], MultiTurnEnvironment]):
        self.pool = EnvironmentPool()
        self._factory = factory
        self._idle: list[MultiTurnEnvironment] = []

    def reset(self, call: ResetCall) -> Any:
        """Begin an episode, and return what the environment's own `reset` does. Runs in a thread of the pool."""
        call.environment = self._take()
        return call.environment.reset(**copied(call.episode.task))

    def give_back(self, environment: MultiTurnEnvironment) -> None:
        """The episode of an environment has ended well."""
        self._idle.append(environment)

    def close(self) -> None:
        """Close all environments."""
        self.pool.close()
        self._idle.clear()

    def _take(self) -> MultiTurnEnvironment:
        try:
            return self._idle.pop()
        except IndexError:  # other threads take environments at the same time
            return self.pool.make(self._factory)
