"""
A batch whose episodes take their turns together: one call of the trainer's generation for all of them, then one step
of all environments.

Each turn waits for its longest response and its slowest environment. It is for backends that answer whole batches
only; where single requests can be answered, see [`~seeupo_trl.rollout.free`].
"""

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from accelerate.utils.memory import clear_device_cache

from .cached_generation import CachedGeneration
from .environment_pool import CallOutcome, Instance
from .episode import Episode
from .generation import generate_responses


if TYPE_CHECKING:
    from .batch import RolloutBatch

RETRY_PAUSE = 0.1  # seconds before the first retry of a reset; four times as many before each further one


def play_in_lock_step(batch: "RolloutBatch") -> None:
    """
    Play the episodes of a batch to their ends. A collective operation.

    Args:
        batch ([`~seeupo_trl.rollout.batch.RolloutBatch`]):
            The batch.
    """
    trainer = batch.trainer
    waiting, playing = deque(batch.episodes), []
    # parameters do not change during a rollout, so what was computed for one turn serves the next
    cache = CachedGeneration(trainer) if CachedGeneration.supports(trainer) else None
    while True:
        playing = [episode for episode in playing if episode.active]
        while waiting and len(playing) < batch.settings.max_concurrent_envs:
            room = min(len(waiting), batch.settings.max_concurrent_envs - len(playing))
            starting = [waiting.popleft() for _ in range(int(room))]
            _begin(batch, starting)
            playing += [episode for episode in starting if episode.active]
        batch.progress.show(batch.episodes)
        start = time.perf_counter()
        responses = generate_responses(playing, trainer, cache, batch.ends)
        if responses is None:
            break
        batch.progress.generated([len(ids) for ids, _ in responses], time.perf_counter() - start)
        for episode, (action_ids, logps) in zip(playing, responses, strict=True):
            batch.act(episode, action_ids, logps)
        stepping = [episode for episode in playing if episode.active]
        outcomes = call(batch, [(episode.instance, batch.step(episode)) for episode in stepping])
        for episode, outcome in zip(stepping, outcomes, strict=True):
            batch.answered(episode, outcome)
        if cache is not None:
            cache.forget(episode.key for episode in playing if not episode.active)
    if cache is not None:
        # what keys and values of all sizes leave behind is too small for an update's activations
        del cache
        clear_device_cache()


def call(batch: "RolloutBatch", calls: list[tuple[Instance, Callable[[], Any]]]) -> list[CallOutcome]:
    """
    Have environments do something, all at the same time and each within `env_timeout`, and wait for all of them.

    Args:
        batch ([`~seeupo_trl.rollout.batch.RolloutBatch`]):
            The batch.
        calls (`list[tuple[Instance, Callable]]`):
            As in [`~seeupo_trl.rollout.environment_pool.EnvironmentPool.call`].
    """
    start = time.perf_counter()
    outcomes = batch.environments.pool.call(calls, batch.settings.call_timeout)
    batch.progress.stepped([outcome.seconds for outcome in outcomes], time.perf_counter() - start)
    return outcomes


def _reset(batch: "RolloutBatch", episodes: list[Episode]) -> list[tuple[Episode, Exception]]:
    """Have environments begin episodes, all at the same time but for those that do it alone; which failed, and why."""
    failed: list[tuple[Episode, Exception]] = []
    together: list[tuple[Episode, Callable[[], Any]]] = []

    def hear(episode: Episode, outcome: CallOutcome) -> None:
        error = batch.begun(episode, outcome)
        if error is not None:
            failed.append((episode, error))

    for episode in episodes:
        function, is_alone = batch.begin(episode)
        if is_alone:
            hear(episode, *call(batch, [(episode.instance, function)]))
        else:
            together.append((episode, function))
    outcomes = call(batch, [(episode.instance, function) for episode, function in together])
    for (episode, _), outcome in zip(together, outcomes, strict=True):
        hear(episode, outcome)
    return failed


def _begin(batch: "RolloutBatch", episodes: list[Episode]) -> None:
    """Begin episodes, and try those whose environment fails again with another one."""
    batch.progress.begun(episodes)
    failed: list[tuple[Episode, Exception]] = []
    for attempt in range(batch.settings.env_reset_retries + 1):
        if attempt:
            time.sleep(RETRY_PAUSE * 4 ** (attempt - 1))
            batch.counts["env/resets_retried"] += len(episodes)
        failed = _reset(batch, episodes)
        episodes = [episode for episode, _ in failed]
        if not episodes:
            return
    for episode, error in failed:
        episode.fail(error)
