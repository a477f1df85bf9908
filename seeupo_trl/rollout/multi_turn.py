"""
Rollouts: environments and the policy play episodes together, turn by turn, for a whole batch at once.

Tokens are the truth. The chat template renders the opening conversation once; from there on a context grows by the
tokens the policy generated (never tokenised again) and by the rendering of the environment's new messages, unless
`history` says otherwise. Each turn keeps the exact context it was sampled from, and that is what is trained on.

Templates that rewrite history when messages are appended (Qwen3 drops earlier reasoning) cannot be continued that way;
for those TRL's training template is used instead, which keeps the history as it was.

Generation goes through the trainer's own backend (transformers, continuous batching, vLLM) with the trainer's sampling
settings.

An environment may raise, hang, or return garbage; none of that reaches the policy. See [`MultiTurnRollout`].

[`RolloutBatch`] plays the episodes. It is given what differs between message-level environments ([`MultiTurnRollout`])
and those of TRL ([`~seeupo_trl.rollout.trl_environments.ToolRollout`]): who plays, and the limits.
"""

import math
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from ..envs.base import MultiTurnEnvironment, StepResult, StopReason
from ..trajectory import Turn
from .cached_generation import CachedGeneration
from .chat_format import ChatFormat
from .contexts import History, contexts_for
from .environment_pool import CallOutcome, EnvironmentPool, Instance
from .episode import Episode
from .failures import MISTAKES, raise_if_too_many_failed
from .generation import generate_responses
from .limits import EpisodeLimits
from .message_environments import MessageEnvironments
from .observations import (
    CHARACTERS_PER_TOKEN,
    check_observation,
    check_step_result,
    cut_message,
    number_of_characters,
)
from .output import rollout_output
from .settings import RolloutSettings
from .tasks import Tasks, seeds_for
from .turn_ends import TurnEnds


if TYPE_CHECKING:
    from trl import GRPOTrainer


RETRY_PAUSE = 0.1  # seconds before the first retry of a reset; four times as many before each further one


class MultiTurnRollout:
    """
    Plays one episode of an environment for each prompt, with the trainer's policy. It is a rollout function of TRL:
    pass it as `rollout_func` to [`SeeUPOTrainer`] or to a stock [`~trl.GRPOTrainer`].

    Environments reset and step at the same time, in threads (or on one event loop, where `reset` and `step` are
    coroutines), and are reused: at the end of an episode they go back to a pool.

    An option that is not given is as the trainer says: its argument of the same name, see [`SeeUPOConfig`]. For a
    trainer that has none (a stock `GRPOConfig`), the defaults of [`~seeupo_trl.rollout.settings.RolloutSettings`]
    hold, which are the same. `math.inf` sets no limit.

    Args:
        environment_factory (`Callable[[], MultiTurnEnvironment]`):
            A [`~seeupo_trl.envs.MultiTurnEnvironment`] class, or anything callable that returns an instance
            (`functools.partial(BfclEnvironment, tools="brief")`).
        tasks (`Dataset` or `Iterable[dict]`, *optional*):
            The dataset rows, for trainers that hand a rollout function nothing but prompts, as [`~trl.GRPOTrainer`]
            does. A row is looked up by its `prompt`, so different rows need different prompts. Give the rows of the
            evaluation dataset too. Not needed with [`SeeUPOTrainer`].
        history (`str` or `Callable`, *optional*):
            What the policy is shown of earlier turns. `"append"`: everything as it was. `"strip_reasoning"`: without
            the reasoning of the turns before the last user message, as the chat templates of reasoning models do. Or a
            function that takes the messages so far (`list[dict]`, the opening ones included) and returns those to
            show, rendered with the tokenizer's own chat template. Each turn is trained on in the exact context it was
            sampled from. Anything but `"append"` needs [`SeeUPOTrainer`].
        max_turns (`int`, *optional*):
            Most assistant messages in an episode.
        max_context_length (`int`, *optional*):
            Most tokens of context and response together, in place of the model's number of positions; never more than
            vLLM takes. The length of one response is limited by the trainer's `max_completion_length`; a vLLM server
            takes no context that leaves less room than that.
        max_concurrent_envs (`int`, *optional*):
            Most environments that exist at once on a process; further episodes begin when others end. Without a limit
            all episodes of a batch play at once.
        env_timeout (`float`, *optional*):
            Seconds a `reset` or a `step` may take.
        env_reset_retries (`int`, *optional*):
            How often a `reset` that raised or took too long is tried again, each time with another environment.
        max_env_failure_rate (`float`, *optional*):
            Largest fraction of the episodes of a batch, over all processes, that may end by a fault of their
            environment.
        max_observation_tokens (`int`, *optional*):
            Longer messages from `step` are cut to so many tokens, with a note at the cut. The opening messages are
            never cut.
        stop_strings (`Sequence[str]`, *optional*):
            Texts that end a turn, besides the end of a message: as soon as a response contains one (`"</search>"`),
            the environment reads the message up to and including it. The turn keeps the tokens that were sampled, up
            to the one that completes the text. Those in the trainer's `generation_kwargs` (`stop_strings`, vLLM's
            `stop`) end turns, too.
        stop_token_ids (`Sequence[int]`, *optional*):
            Tokens that end a turn, besides those that end a message. The environment reads the text of such a token,
            unless it is a special one.

    Calling it with `(prompts, trainer)` returns a dict of lists with one item per prompt:

    - `prompt_ids`: tokens of the opening conversation.
    - `completion_ids`: everything after it up to the end of the last action, or one end-of-sequence token if there was
      no action. Where a context was rewritten, what it does not share with the turn before stands for the whole.
    - `env_mask`: 1 for tokens of the policy, 0 for tokens of the environment.
    - `logprobs`: log-probabilities of the completion under the sampler, 0.0 at environment tokens; `None` where the
      backend reports none.
    - `trajectories`: [`~seeupo_trl.trajectory.Trajectory`], with the turns, the conversation and the reward.
    - `environment_reward`: return of the episode, `None` after a fault of the environment. Read it with the reward
      function [`environment_reward`].
    - `stop_reason`: a [`~seeupo_trl.envs.StopReason`] as a string.

    A fault of an environment (an exception, no answer in time, an answer that is none) ends its episode without a
    reward, with stop reason `env_error` or `env_timeout` and the text in the trajectory's `info["error"]`. Other
    episodes go on.

    It logs `time/generation` and `time/environments`, the seconds spent in either, and `env/resets_retried` and
    `env/observations_cut`, counts of this process.

    Raises:
        `RuntimeError`:
            On all processes, when more episodes of a batch fail than `max_env_failure_rate` allows, or all of them.

    Example:

    ```python
    trainer = GRPOTrainer(
        model="Qwen/Qwen3-0.6B",
        args=GRPOConfig(max_completion_length=512),
        train_dataset=dataset,
        rollout_func=MultiTurnRollout(MyEnvironment, tasks=dataset),
        reward_funcs=environment_reward,
    )
    ```
    """

    def __init__(
        self,
        environment_factory: Callable[[], MultiTurnEnvironment],
        *,
        tasks: Iterable[dict[str, Any]] | None = None,
        history: History | None = None,
        max_turns: int | None = None,
        max_context_length: int | None = None,
        max_concurrent_envs: int | None = None,
        env_timeout: float | None = None,
        env_reset_retries: int | None = None,
        max_env_failure_rate: float | None = None,
        max_observation_tokens: int | None = None,
        stop_strings: Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
    ):
        if not callable(environment_factory):
            raise TypeError(
                f"environment_factory is a {type(environment_factory).__name__}; give a MultiTurnEnvironment class or "
                "a function without arguments that returns an instance."
            )
        self.environment_factory = environment_factory
        self._options = {
            "history": history,
            "max_turns": max_turns,
            "max_context_length": max_context_length,
            "max_concurrent_envs": max_concurrent_envs,
            "env_timeout": env_timeout,
            "env_reset_retries": env_reset_retries,
            "max_env_failure_rate": max_env_failure_rate,
            "max_observation_tokens": max_observation_tokens,
            "stop_strings": stop_strings,
            "stop_token_ids": stop_token_ids,
        }
        RolloutSettings(**{name: value for name, value in self._options.items() if value is not None})  # checks them
        self._tasks = Tasks(tasks)
        self._environments = MessageEnvironments(environment_factory)
        self._chats: weakref.WeakKeyDictionary[GRPOTrainer, ChatFormat] = weakref.WeakKeyDictionary()

    def close(self) -> None:
        """Close all environments. Happens by itself when the object is deleted and when the interpreter exits."""
        self._environments.close()

    def __call__(self, prompts: list[Any], trainer: "GRPOTrainer") -> dict[str, list[Any] | None]:
        settings = RolloutSettings.of(self._options, vars(trainer.args))
        rows = getattr(trainer, "rollout_inputs", None)  # set by SeeUPOTrainer only
        if rows is None and settings.history != "append":
            raise ValueError(
                f"history={settings.history!r} rewrites contexts, and {type(trainer).__name__} trains on an "
                "episode as one sequence: it would train on contexts that the policy never saw. Use history='append', "
                "or SeeUPOTrainer."
            )
        if trainer not in self._chats:
            self._chats[trainer] = ChatFormat(trainer)
        limits = EpisodeLimits.of(settings, trainer)
        batch = RolloutBatch(self._environments, settings, limits, self._chats[trainer], trainer)
        batch.play(self._tasks.of(prompts) if rows is None else rows)
        return batch.output()


class Environments(Protocol):
    """
    Who plays the episodes of a batch: [`~seeupo_trl.rollout.message_environments.MessageEnvironments`] or
    [`~seeupo_trl.rollout.trl_environments.TrlEnvironments`].

    `take` chooses an instance, `reset` has it begin the episode, in its own thread; `give_back` takes it when the
    episode has ended.
    """

    pool: EnvironmentPool

    def take(self, episode: Episode) -> Instance: ...

    def reset(self, instance: Instance, episode: Episode) -> Any: ...

    def give_back(self, instance: Instance) -> None: ...


class RolloutBatch:
    """
    The episodes of one batch, played together turn by turn.

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

    `episodes` are there once they are played.
    """

    def __init__(
        self,
        environments: Environments,
        settings: RolloutSettings,
        limits: EpisodeLimits,
        chat: ChatFormat,
        trainer: "GRPOTrainer",
    ):
        self.episodes: list[Episode] = []
        self._environments = environments
        self._settings = settings
        self._limits = limits
        self._chat = chat
        self._contexts = contexts_for(settings.history, chat)
        self._ends = TurnEnds.of(settings, trainer, chat.tokenizer, chat.end_of_message)
        self._trainer = trainer
        self._counts: Counter = Counter()

    def play(self, tasks: list[dict[str, Any]]) -> None:
        """Play one episode for each task to its end. A collective operation."""
        seeds = seeds_for(self._trainer, len(tasks))
        self.episodes = [Episode(key, *pair) for key, pair in enumerate(zip(tasks, seeds, strict=True))]
        waiting, playing = deque(self.episodes), []
        # parameters do not change during a rollout, so what was computed for one turn serves the next
        cache = CachedGeneration(self._trainer) if CachedGeneration.supports(self._trainer) else None
        while True:
            playing = [episode for episode in playing if episode.active]
            while waiting and len(playing) < self._settings.max_concurrent_envs:
                room = min(len(waiting), self._settings.max_concurrent_envs - len(playing))
                starting = [waiting.popleft() for _ in range(int(room))]
                self._begin(starting)
                playing += [episode for episode in starting if episode.active]
            start = time.perf_counter()
            responses = generate_responses(playing, self._trainer, cache, self._ends)
            self._counts["time/generation"] += time.perf_counter() - start
            if responses is None:
                return
            for episode, (action_ids, logps) in zip(playing, responses, strict=True):
                self._act(episode, action_ids, logps)
            self._step([episode for episode in playing if episode.active])
            if cache is not None:
                cache.forget(episode.key for episode in playing if not episode.active)

    def output(self) -> dict[str, list[Any] | None]:
        """What TRL takes from a rollout function. A collective operation, which raises if too many episodes failed."""
        raise_if_too_many_failed(self.episodes, self._settings.max_env_failure_rate, self._trainer)
        metrics = self._trainer._metrics["train" if self._trainer.model.training else "eval"]
        for name in ("time/generation", "time/environments", "env/resets_retried", "env/observations_cut"):
            metrics[name].append(float(self._counts[name]))
        return rollout_output(self.episodes, self._trainer, self._chat.tokenizer.eos_token_id)

    def call(self, calls: list[tuple[Instance, Callable[[], Any]]]) -> list[CallOutcome]:
        """Have environments do something, all at the same time and each within `env_timeout`."""
        start = time.perf_counter()
        timeout = self._settings.env_timeout
        outcomes = self._environments.pool.call(calls, None if timeout == math.inf else timeout)
        self._counts["time/environments"] += time.perf_counter() - start
        return outcomes

    def fail(self, episode: Episode, error: Exception) -> None:
        """End an episode whose environment failed. The environment does not play again."""
        self._environments.pool.discard(episode.instance)
        episode.fail(error)

    def _begin(self, episodes: list[Episode]) -> None:
        """Begin episodes, and try those whose environment fails again with another one."""
        failed: list[tuple[Episode, Exception]] = []
        for attempt in range(self._settings.env_reset_retries + 1):
            if attempt:
                time.sleep(RETRY_PAUSE * 4 ** (attempt - 1))
                self._counts["env/resets_retried"] += len(episodes)
            failed = self._reset(episodes)
            episodes = [episode for episode, _ in failed]
            if not episodes:
                return
        for episode, error in failed:
            episode.fail(error)

    def _reset(self, episodes: list[Episode]) -> list[tuple[Episode, Exception]]:
        """Have an environment begin each episode, and return those in which that failed."""
        for episode in episodes:
            episode.instance = self._environments.take(episode)
        outcomes = self.call([(e.instance, partial(self._environments.reset, e.instance, e)) for e in episodes])
        failed = []
        for episode, outcome in zip(episodes, outcomes, strict=True):
            try:
                episode.open(check_observation(outcome.value()))
                self._open_context(episode)
            except MISTAKES:
                raise
            except Exception as error:
                self._environments.pool.discard(episode.instance)
                failed.append((episode, error))
        return failed

    def _open_context(self, episode: Episode) -> None:
        characters = sum(number_of_characters(message) for message in episode.observation.messages)
        if characters > self._limits.max_context_length * CHARACTERS_PER_TOKEN:
            self._end(episode, StopReason.context_overflow)  # without tokenising it
            return
        episode.context_ids = self._contexts.first(episode)
        if len(episode.context_ids) > self._limits.longest_context:
            self._end(episode, StopReason.context_overflow)

    def _act(self, episode: Episode, action_ids: list[int], logps: list[float] | None) -> None:
        """Take the policy's response as its message. One that was cut ends the episode: no environment reads it."""
        limit, reason = self._limits.length_of(episode)
        room = limit - len(episode.context_ids)
        overflow = len(action_ids) > room
        if overflow:
            action_ids = action_ids[: int(room)]
            logps = None if logps is None else logps[: int(room)]
        message: dict[str, Any] = {}
        if action_ids:
            message = self._chat.parse(action_ids, episode.context_ids, episode.observation.tools)
            message = self._ends.trimmed(message)
            episode.act(Turn(episode.context_ids, action_ids, logps), message)
        is_whole = self._ends.are_in(action_ids) and not overflow
        episode.stopped_early = is_whole and action_ids[-1] not in self._chat.eos_token_ids
        if not is_whole and not (self._limits.executes_truncated_calls and "tool_calls" in message):
            at_limit = len(action_ids) == room
            self._end(episode, reason if at_limit else StopReason.response_truncated)
        elif message.get("tool_calls") and len(episode.turns) > self._limits.max_tool_calling_iterations:
            self._end(episode, StopReason.max_turns)

    def _step(self, episodes: list[Episode]) -> None:
        """Hand the policy's messages to the environments, and build the next contexts."""
        outcomes = self.call([(e.instance, partial(e.environment.step, e.last_message)) for e in episodes])
        for episode, outcome in zip(episodes, outcomes, strict=True):
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
                    self._environments.give_back(episode.instance)

    def _go_on(self, episode: Episode) -> None:
        """Build the next context, if the episode may have another turn."""
        if len(episode.turns) >= self._limits.max_turns:
            episode.stop_reason = StopReason.max_turns
            return
        episode.context_ids = self._contexts.next(episode)
        if not self._limits.leave_room(episode):
            _, episode.stop_reason = self._limits.length_of(episode)

    def _cut(self, result: StepResult) -> StepResult:
        limit = self._settings.max_observation_tokens
        if limit != math.inf:
            for message in result.messages:
                self._counts["env/observations_cut"] += cut_message(message, limit, self._chat.tokenizer)
        return result

    def _end(self, episode: Episode, stop_reason: StopReason) -> None:
        episode.stop_reason = stop_reason
        self._environments.give_back(episode.instance)


def environment_reward(environment_reward: list[float | None], **kwargs: Any) -> list[float | None]:
    """
    Reward function that reads the return of the episodes which [`MultiTurnRollout`] played.

    Args:
        environment_reward (`list[float]`):
            Returns of the episodes; `None` where the environment failed, which TRL leaves out of the group's mean.
        kwargs (`Any`):
            Everything else TRL passes to reward functions; not used.
    """
    return environment_reward
