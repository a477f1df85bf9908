"""
The episodes of one batch: what an episode may do, how it goes on, and what it ends with.

*When* something happens is decided elsewhere: [`~seeupo_trl.rollout.free`] lets every episode go on by itself,
[`~seeupo_trl.rollout.lock_step`] takes all of them through one turn after another.
"""

import math
import random
import zlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..envs.base import StepResult, StopReason
from ..trajectory import Turn
from .chat_format import ChatFormat
from .contexts import contexts_for
from .environment_pool import CallOutcome, EnvironmentPool, Instance
from .episode import Episode
from .failures import MISTAKES, raise_if_too_many_failed
from .limits import EpisodeLimits
from .observations import (
    CHARACTERS_PER_TOKEN,
    check_observation,
    check_step_result,
    cut_message,
    number_of_characters,
)
from .output import rollout_output
from .progress import Progress
from .random_state import RandomState
from .sampler import Request, Sampler
from .samplers import open_sampler
from .settings import RolloutSettings
from .shared_state import SharedState
from .tasks import first_episode, occasion, seeds_for
from .turn_ends import TurnEnds


if TYPE_CHECKING:
    from trl import GRPOTrainer


class Environments(Protocol):
    """
    Who plays the episodes of a batch: [`~seeupo_trl.rollout.message_environments.MessageEnvironments`] or a
    [`~seeupo_trl.rollout.trl_environments.Cast`].

    `take` chooses an instance, `reset` has it begin the episode, in its own thread; `give_back` takes it when the
    episode has ended, or is given up, `release` takes all when the batch has been scored, or given up.
    """

    pool: EnvironmentPool

    def take(self, episode: Episode) -> Instance: ...

    def reset(self, instance: Instance, episode: Episode) -> Any: ...

    def give_back(self, instance: Instance) -> None: ...

    def release(self) -> None: ...


class RolloutBatch:
    """
    The episodes of one batch.

    Args:
        environments ([`Environments`]):
            Has an environment begin an episode, and takes it back when that has ended.
        settings ([`~seeupo_trl.rollout.settings.RolloutSettings`]):
            Options of the rollout.
        limits ([`~seeupo_trl.rollout.limits.EpisodeLimits`]):
            How long an episode may become.
        chat ([`~seeupo_trl.rollout.chat_format.ChatFormat`]):
            The policy's chat format.
        trainer ([`~trl.GRPOTrainer`]):
            The trainer whose policy plays.
        steps_ahead (`int`, *optional*, defaults to `0`):
            1 for the batch of the iteration after the one that the trainer is at.

    First `prepare`, then `play`, then `output`, or `give_up` in place of what is left of these. `begin`, `begun`,
    `request`, `act`, `step` and `answered` take an episode on, in this order and from `request` on again and again as
    long as it is `active`.
    """

    def __init__(
        self,
        environments: Environments,
        settings: RolloutSettings,
        limits: EpisodeLimits,
        chat: ChatFormat,
        trainer: "GRPOTrainer",
        steps_ahead: int = 0,
    ):
        self.episodes: list[Episode] = []
        self.settings = settings
        self.trainer = trainer
        self.environments = environments
        self.ends = TurnEnds.of(settings, trainer, chat.tokenizer, chat.end_of_message)
        self.counts: Counter = Counter()
        self.progress = Progress()
        self._limits = limits
        self._chat = chat
        self._contexts = contexts_for(settings.history, chat)
        self._occasion = occasion(trainer, steps_ahead)
        self._openings: dict[int, int] = {}  # checksums of the opening contexts, by episode
        self.sampler: Sampler | None = None
        self.shared_state = SharedState(settings)
        self._first = 0  # number of this process's first episode, see `first_episode`
        self._may_hang = False  # an environment did: others do not wait for one another's time limits

    def prepare(self, tasks: list[dict[str, Any]]) -> None:
        """Get ready to play one episode for each task with the policy as it is now. A collective operation."""
        self._first = first_episode(self.trainer, len(tasks))
        seeds = seeds_for(self.trainer, self._first, len(tasks), self._occasion)
        self.episodes = [Episode(key, *pair) for key, pair in enumerate(zip(tasks, seeds, strict=True))]
        self.sampler = open_sampler(self.trainer, self.ends, self.settings)

    def output(self) -> dict[str, list[Any] | None]:
        """What TRL takes from a rollout function. A collective operation, which raises if too many episodes failed."""
        if not getattr(self.trainer, "rollout_round", 0):  # in further rounds, few episodes may all fail by chance
            raise_if_too_many_failed(self.episodes, self.settings.max_env_failure_rate, self.trainer)
        metrics = self.trainer._metrics["train" if self.trainer.model.training else "eval"]
        values = {name: self.counts[name] for name in ("env/resets_retried", "env/observations_cut")}
        for name, value in (values | self.progress.metrics()).items():
            metrics[name].append(float(value))
        return rollout_output(self.episodes, self.trainer, self._chat.tokenizer.eos_token_id)

    def give_up(self) -> None:
        """
        Other batches may have the environments of this one; those that were given up in a call do not play again.
        """
        for episode in self.episodes:
            if episode.active and episode.instance in self.environments.pool:
                self.environments.give_back(episode.instance)
                episode.instance = None
        self.environments.release()
        for random_state in (self.environments.pool.random_state, self.environments.pool.random_state_of_rewards):
            random_state.give_up()

    def begin(self, episode: Episode) -> tuple[Callable[[], Any], bool]:
        """
        Choose an environment for an episode; what it has to do to begin it, and whether no other may be called
        meanwhile.
        """
        episode.instance = self.environments.take(episode)
        reset = partial(self.environments.reset, episode.instance, episode)
        return self._watched(episode, reset, self.environments.pool.random_state)

    def begun(self, episode: Episode, outcome: CallOutcome) -> Exception | None:
        """Take the opening of an episode. Returns what went wrong: another environment may begin it then."""
        try:
            episode.open(check_observation(outcome.value()))
            self._open_context(episode)
        except MISTAKES:
            raise
        except Exception as error:
            if outcome.is_stuck:
                self._gave_up(self.environments.pool.random_state)
            self.environments.pool.discard(episode.instance)
            return error
        return None

    def request(self, episode: Episode) -> Request:
        """What the policy is asked for, with a seed that no other response of the run has."""
        if not episode.turns:
            self._openings[episode.key] = zlib.crc32(np.array(episode.context_ids).tobytes())
        number = self._first + episode.key
        name = f"{self._occasion} {number} {len(episode.turns)} {self._openings[episode.key]}"
        return Request(episode.key, episode.context_ids, random.Random(name).getrandbits(31))

    def act(self, episode: Episode, action_ids: list[int], logps: list[float] | None) -> None:
        """Take the policy's response as its message. One that was cut ends the episode: no environment reads it."""
        self.progress.count_tokens(len(action_ids))
        limit, reason = self._limits.length_of(episode)
        room = limit - len(episode.context_ids)
        overflow = len(action_ids) > room
        if overflow:
            action_ids = action_ids[: int(room)]
            logps = None if logps is None else logps[: int(room)]
        message: dict[str, Any] = {}
        if action_ids:
            message = self._chat.parse(action_ids, episode.context_ids, episode.observation.tools)
            message = self.ends.trimmed(message)
            episode.act(Turn(episode.context_ids, action_ids, logps), message)
        is_whole = self.ends.are_in(action_ids) and not overflow
        episode.stopped_early = is_whole and action_ids[-1] not in self._chat.eos_token_ids
        if not is_whole and not (self._limits.executes_truncated_calls and "tool_calls" in message):
            at_limit = len(action_ids) == room
            self._end(episode, reason if at_limit else StopReason.response_truncated)
        elif message.get("tool_calls") and len(episode.turns) > self._limits.max_tool_calling_iterations:
            self._end(episode, StopReason.max_turns)

    def step(self, episode: Episode) -> Callable[[], Any]:
        """What an episode's environment has to do with the policy's message."""
        return self.shared_state.guarded(partial(episode.environment.step, episode.last_message))

    def answered(self, episode: Episode, outcome: CallOutcome) -> None:
        """Take the answer of an episode's environment, and build the next context."""
        try:
            episode.answer(self._cut(check_step_result(outcome.value())))
            if episode.active:
                self._go_on(episode)
        except MISTAKES:
            raise
        except Exception as error:
            self.fail(episode, error)
        else:
            if not episode.active:
                self.environments.give_back(episode.instance)

    def fail(self, episode: Episode, error: Exception) -> None:
        """End an episode whose environment failed. The environment does not play again."""
        self.environments.pool.discard(episode.instance)
        episode.fail(error)

    def _watched(
        self, episode: Episode, function: Callable[[], Any], random_state: RandomState
    ) -> tuple[Callable[[], Any], bool]:
        function = self.shared_state.guarded(function)
        if self.settings.max_concurrent_envs == 1:
            return function, False
        factory = episode.instance.factory
        is_alone = random_state.is_alone(factory) and not self._may_hang
        return random_state.watched(factory, function, is_alone), is_alone

    def _gave_up(self, random_state: RandomState) -> None:
        self._may_hang = True
        random_state.give_up()

    def _open_context(self, episode: Episode) -> None:
        characters = sum(number_of_characters(message) for message in episode.observation.messages)
        if characters > self._limits.max_context_length * CHARACTERS_PER_TOKEN:
            self._end(episode, StopReason.context_overflow)  # without tokenising it
            return
        episode.context_ids = self._contexts.first(episode)
        if len(episode.context_ids) > self._limits.longest_context:
            self._end(episode, StopReason.context_overflow)

    def _go_on(self, episode: Episode) -> None:
        """Build the next context, if the episode may have another turn."""
        if len(episode.turns) >= self._limits.max_turns:
            episode.stop_reason = StopReason.max_turns
            return
        episode.context_ids = self._contexts.next(episode)
        if not self._limits.leave_room(episode):
            _, episode.stop_reason = self._limits.length_of(episode)

    def _cut(self, result: StepResult) -> StepResult:
        limit = self.settings.max_observation_tokens
        if limit != math.inf:
            for message in result.messages:
                self.counts["env/observations_cut"] += cut_message(message, limit, self._chat.tokenizer)
        return result

    def _end(self, episode: Episode, stop_reason: StopReason) -> None:
        episode.stop_reason = stop_reason
        self.environments.give_back(episode.instance)
