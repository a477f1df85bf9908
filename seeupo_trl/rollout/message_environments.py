"""Message-level environments on the side of the rollout: who plays which episode."""

from collections.abc import Callable
from typing import Any

from ..envs.base import MultiTurnEnvironment
from .environment_pool import EnvironmentPool, Instance
from .episode import Episode
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
        self._idle: list[Instance] = []

    def begin_with(self, instance: Instance, pool: EnvironmentPool) -> None:
        """Lend an instance that was made before first, and make all others in its pool."""
        instance.factory = self._factory
        self.pool = pool
        self._idle = [instance]

    def take(self, episode: Episode) -> Instance:
        """Who plays an episode."""
        return self._idle.pop() if self._idle else self.pool.new_instance(self._factory)

    def reset(self, instance: Instance, episode: Episode) -> Any:
        """Begin an episode, and return what the environment's own `reset` does. Runs in the instance's thread."""
        environment = instance.made()
        task = copied(episode.task)
        if environment.takes_seed and task.get("seed") is None:
            task["seed"] = episode.seed
        return environment.reset(**task)

    def give_back(self, instance: Instance) -> None:
        """The episode of an environment has ended well, or is given up before the environment was called again."""
        self._idle.append(instance)

    def release(self) -> None:
        """Nothing to do: each came back when its episode ended."""

    def close(self) -> None:
        """Close all environments."""
        self.pool.close()
        self._idle.clear()
