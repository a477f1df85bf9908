"""
A batch whose episodes go on by themselves: a finished response goes to its environment at once, an environment's
answer becomes the next request at once. No episode waits for another.

Which episodes are played does not depend on what arrives first: an environment's seed and a response's seed belong to
the episode and its turn, see [`~seeupo_trl.rollout.sampler`].
"""

import time
from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from threading import Event
from typing import TYPE_CHECKING, Any

from .environment_pool import CallOutcome
from .episode import Episode
from .lock_step import RETRY_PAUSE
from .sampler import Response, Sampler


if TYPE_CHECKING:
    from .batch import RolloutBatch

GLANCE = 0.01  # seconds until the other side is looked at again, while both sampler and environments work
CANCEL_GLANCE = 0.1  # seconds until a batch that may be cancelled looks whether it was


def play_freely(batch: "RolloutBatch", sampler: Sampler, cancelled: Event | None = None) -> None:
    """
    Play the episodes of a batch to their ends.

    Args:
        batch ([`~seeupo_trl.rollout.batch.RolloutBatch`]):
            The batch.
        sampler ([`~seeupo_trl.rollout.sampler.Sampler`]):
            Answers the requests. It is closed at the end, also when something went wrong.
        cancelled (`Event`, *optional*):
            The episodes are given up as soon as it is set.
    """
    play = _FreePlay(batch, sampler, cancelled)
    try:
        play.run()
    finally:
        play.calls.give_up()
        sampler.close()


class _FreePlay:
    def __init__(self, batch: "RolloutBatch", sampler: Sampler, cancelled: Event | None):
        self._batch = batch
        self._sampler = sampler
        self._cancelled = Event() if cancelled is None else cancelled
        self._patience = None if cancelled is None else CANCEL_GLANCE
        self._waiting = deque(batch.episodes)
        self.calls = batch.environments.pool.pending_calls(batch.settings.call_timeout)
        self._retries: list[tuple[float, int]] = []  # when to begin which episode again
        self._attempts = [0] * len(batch.episodes)
        self._asked: set[int] = set()
        self._num_playing = 0

    def run(self) -> None:
        while (self._num_playing or self._waiting) and not self._cancelled.is_set():
            self._begin_waiting()
            self._begin_again()
            self._hear_calls(0.0 if self._asked else GLANCE)
            for response in self._sampler.poll(GLANCE if self.calls or self._retries else self._patience):
                self._take(response)

    def _begin_waiting(self) -> None:
        most = self._batch.settings.max_concurrent_envs
        while self._waiting and self._num_playing < most and not self._cancelled.is_set():
            self._num_playing += 1
            self._begin(self._waiting.popleft())

    def _begin_again(self) -> None:
        while self._retries and self._retries[0][0] <= time.monotonic() and not self._cancelled.is_set():
            _, key = heappop(self._retries)
            self._batch.counts["env/resets_retried"] += 1
            self._begin(self._batch.episodes[key])

    def _begin(self, episode: Episode) -> None:
        reset, is_alone = self._batch.begin(episode)
        if is_alone:
            self._finish_calls()
        if self._cancelled.is_set():
            return
        self._call(episode, reset)
        if is_alone:
            self._finish_calls()

    def _finish_calls(self) -> None:
        while self.calls and not self._cancelled.is_set():
            self._hear_calls(self._patience)

    def _hear_calls(self, timeout: float | None) -> None:
        for key, outcome in self.calls.wait(timeout):
            self._hear(self._batch.episodes[key], outcome)

    def _call(self, episode: Episode, function: Callable[[], Any]) -> None:
        self._batch.progress.waits_for(episode.key, "environment")
        self.calls.make(episode.key, episode.instance, function)

    def _hear(self, episode: Episode, outcome: CallOutcome) -> None:
        """An environment has answered, or will not any more."""
        self._batch.progress.waits_for(episode.key, "others")
        if episode.turns:
            self._batch.answered(episode, outcome)
        else:
            error = self._batch.begun(episode, outcome)
            if error is not None:
                self._begin_later(episode, error)
                return
        self._ask(episode)

    def _begin_later(self, episode: Episode, error: Exception) -> None:
        attempt = self._attempts[episode.key]
        if attempt == self._batch.settings.env_reset_retries:
            episode.fail(error)
            self._end(episode)
            return
        self._attempts[episode.key] += 1
        heappush(self._retries, (time.monotonic() + RETRY_PAUSE * 4**attempt, episode.key))

    def _ask(self, episode: Episode) -> None:
        """Ask the policy for its next response, if the episode goes on."""
        if not episode.active:
            self._end(episode)
            return
        self._batch.progress.waits_for(episode.key, "sampler")
        self._asked.add(episode.key)
        self._sampler.submit(self._batch.request(episode))

    def _take(self, response: Response) -> None:
        """The policy has answered."""
        if response.key not in self._asked:  # of an episode that has ended, or a second answer
            return
        self._asked.remove(response.key)
        episode = self._batch.episodes[response.key]
        self._batch.progress.waits_for(episode.key, "others")
        self._batch.act(episode, response.action_ids, response.logps)
        if episode.active:
            self._call(episode, self._batch.step(episode))
        else:
            self._end(episode)

    def _end(self, episode: Episode) -> None:
        self._num_playing -= 1
        self._sampler.forget(episode.key)
        self._batch.progress.waits_for(episode.key, None)
        self._batch.progress.ended()
