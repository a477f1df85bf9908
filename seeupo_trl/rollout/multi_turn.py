"""
Rollouts: environments and the policy play episodes together, turn by turn, for a whole batch at once.

Tokens are the truth. The chat template renders the opening conversation once; from there on a context grows by the
tokens the policy generated (never tokenised again) and by the rendering of the environment's new messages, unless
`history` says otherwise. Each turn keeps the exact context it was sampled from, and that is what is trained on.

Templates that rewrite history when messages are appended (Qwen3 drops earlier reasoning) cannot be continued that way;
for those TRL's training template is used instead, which keeps the history as it was.

Generation goes through the trainer's own backend (transformers, continuous batching, vLLM) with the trainer's sampling
settings. It is a collective operation in some setups (ZeRO-3, vLLM), therefore all processes generate equally often:
one whose episodes have ended generates a throw-away row until all are done.

An environment may raise, hang, or return garbage; none of that reaches the policy. See [`MultiTurnRollout`].
"""

import json
import logging
import math
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object

from ..envs.base import MultiTurnEnvironment, StepResult, StopReason
from ..trajectory import Turn
from .cached_generation import CachedGeneration
from .chat_format import ChatFormat, RewritingTemplateError, shared_length
from .contexts import Contexts, History, HistoryError, contexts_for
from .environment_pool import CallOutcome, EnvironmentPool, NotAnEnvironmentError
from .episode import Episode, describe, shorten
from .observations import CHARACTERS_PER_TOKEN, check_observation, check_step_result, copied, cut_to_tokens
from .settings import RolloutSettings


if TYPE_CHECKING:
    from trl import GRPOTrainer


logger = logging.getLogger(__name__)


Message = dict[str, Any]

# Errors that are the script's, not an environment's.
MISTAKES = (NotAnEnvironmentError, RewritingTemplateError, HistoryError)
RETRY_PAUSE = 0.1  # seconds before the first retry of a reset; four times as many before each further one


class MultiTurnRollout:
    """
    Plays one episode of an environment for each prompt, with the trainer's policy. It is a rollout function of TRL:
    pass it as `rollout_func` to [`SeeUPOTrainer`] or to a stock [`~trl.GRPOTrainer`].

    Environments reset and step at the same time, in threads (or on one event loop, where `reset` and `step` are
    coroutines), and are reused: at the end of an episode they go back to a pool.

    The options below default to the trainer's arguments of the same name; for a trainer that has none (a stock
    `GRPOConfig`), to the defaults given here. `math.inf` sets no limit.

    Args:
        environment_factory (`Callable[[], MultiTurnEnvironment]`):
            A [`~seeupo_trl.envs.MultiTurnEnvironment`] class, or anything callable that returns an instance
            (`functools.partial(BfclEnvironment, tools="brief")`).
        tasks (`Dataset` or `Iterable[dict]`, *optional*):
            The dataset rows, for trainers that hand a rollout function nothing but prompts, as [`~trl.GRPOTrainer`]
            does. A row is looked up by its `prompt`, so different rows need different prompts. Give the rows of the
            evaluation dataset too. Not needed with [`SeeUPOTrainer`].
        history (`str` or `Callable`, *optional*, defaults to `"append"`):
            What the policy is shown of earlier turns. `"append"`: everything as it was. `"strip_reasoning"`: without
            the reasoning of the turns before the last user message, as the chat templates of reasoning models do. Or a
            function that takes the messages so far (`list[dict]`, the opening ones included) and returns those to
            show, rendered with the tokenizer's own chat template. Each turn is trained on in the exact context it was
            sampled from. Anything but `"append"` needs [`SeeUPOTrainer`].
        max_turns (`int`, *optional*, defaults to `10`):
            Most assistant messages in an episode.
        max_context_length (`int`, *optional*):
            Most tokens of context and response together. Defaults to the model's number of positions, and is never
            more than a vLLM engine takes. The length of one response is limited by the trainer's
            `max_completion_length`; a vLLM server takes no context that leaves less room than that.
        max_concurrent_envs (`int`, *optional*):
            Most environments that exist at once on a process; further episodes begin when others end. Defaults to no
            limit: all episodes of a batch play at once.
        env_timeout (`float`, *optional*, defaults to `120.0`):
            Seconds a `reset` or a `step` may take.
        env_reset_retries (`int`, *optional*, defaults to `2`):
            How often a `reset` that raised or took too long is tried again, each time with another environment.
        max_env_failure_rate (`float`, *optional*, defaults to `0.5`):
            Largest fraction of the episodes of a batch, over all processes, that may end by a fault of their
            environment.
        max_observation_tokens (`int`, *optional*, defaults to `32768`):
            Longer messages from `step` are cut to so many tokens, with a note at the cut. The opening messages are
            never cut.

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
    ):
        if not callable(environment_factory):
            raise TypeError(
                f"environment_factory is a {type(environment_factory).__name__}; give a MultiTurnEnvironment class or "
                "a function without arguments that returns an instance."
            )
        self.environment_factory = environment_factory
        self._given = {
            "history": history,
            "max_turns": max_turns,
            "max_context_length": max_context_length,
            "max_concurrent_envs": max_concurrent_envs,
            "env_timeout": env_timeout,
            "env_reset_retries": env_reset_retries,
            "max_env_failure_rate": max_env_failure_rate,
            "max_observation_tokens": max_observation_tokens,
        }
        RolloutSettings(**{name: value for name, value in self._given.items() if value is not None})  # checks them
        self._tasks = None if tasks is None else _index_by_prompt(tasks)
        self._pool = EnvironmentPool(environment_factory)
        self._chat: ChatFormat | None = None
        self._contexts: Contexts | None = None
        self._chat_trainer: weakref.ref | None = None
        self._counts: Counter = Counter()

    def close(self) -> None:
        """Close all environments. Happens by itself when the object is deleted and when the interpreter exits."""
        self._pool.close()

    def __call__(self, prompts: list[Any], trainer: "GRPOTrainer") -> dict[str, list[Any] | None]:
        self._prepare_for(trainer)
        self._counts.clear()
        episodes = [Episode(key, task) for key, task in enumerate(self._rows(prompts, trainer))]
        waiting, playing = deque(episodes), []
        # parameters do not change during a rollout, so what was computed for one turn serves the next
        cache = CachedGeneration(trainer) if CachedGeneration.supports(trainer) else None
        while True:
            playing = [episode for episode in playing if episode.active]
            while waiting and len(playing) < self._settings.max_concurrent_envs:
                room = min(len(waiting), self._settings.max_concurrent_envs - len(playing))
                starting = [waiting.popleft() for _ in range(int(room))]
                self._begin(starting)
                playing += [episode for episode in starting if episode.active]
            start = time.perf_counter()
            responses = _generate(playing, trainer, cache)
            self._counts["time/generation"] += time.perf_counter() - start
            if responses is None:
                break
            for episode, (action_ids, logps) in zip(playing, responses, strict=True):
                self._take_action(episode, action_ids, logps, trainer.eos_token_ids)
            self._step([episode for episode in playing if episode.active])
            if cache is not None:
                cache.forget(episode.key for episode in playing if not episode.active)

        self._finish(episodes)
        _raise_if_too_many_failed(episodes, self._settings.max_env_failure_rate, trainer)
        metrics = trainer._metrics["train" if trainer.model.training else "eval"]
        for name in ("time/generation", "time/environments", "env/resets_retried", "env/observations_cut"):
            metrics[name].append(float(self._counts[name]))
        return self._collect(episodes, trainer)

    def _prepare_for(self, trainer: "GRPOTrainer") -> None:
        self._settings = RolloutSettings.of(self._given, trainer)
        if self._chat_trainer is None or self._chat_trainer() is not trainer:
            self._chat = ChatFormat(trainer)
            self._contexts = contexts_for(self._settings.history, self._chat)
            self._chat_trainer = weakref.ref(trainer)
        if self._settings.history != "append" and getattr(trainer, "rollout_inputs", None) is None:
            raise ValueError(
                f"history={self._settings.history!r} rewrites contexts, and {type(trainer).__name__} trains on an "
                "episode as one sequence: it would train on contexts that the policy never saw. Use history='append', "
                "or SeeUPOTrainer."
            )

    def _rows(self, prompts: list[Any], trainer: "GRPOTrainer") -> list[dict[str, Any]]:
        rows = getattr(trainer, "rollout_inputs", None)  # set by SeeUPOTrainer only
        if rows is not None:
            return rows
        if self._tasks is None:
            raise ValueError(
                f"{type(trainer).__name__} hands a rollout function nothing but prompts, and environments need whole "
                "dataset rows: pass the dataset as `MultiTurnRollout(..., tasks=dataset)`, or use SeeUPOTrainer."
            )
        missing = [prompt for prompt in prompts if _prompt_key(prompt) not in self._tasks]
        if missing:
            raise ValueError(
                f"No row of `tasks` has this prompt: {shorten(missing[0])}. `tasks` must hold the rows of every "
                "dataset the trainer reads, the evaluation dataset included."
            )
        return [self._tasks[_prompt_key(prompt)] for prompt in prompts]

    # ---- Environments ----

    def _call(self, functions: list[Callable[[], Any]]) -> list[CallOutcome]:
        start = time.perf_counter()
        timeout = self._settings.env_timeout
        outcomes = self._pool.call(functions, None if timeout == math.inf else timeout)
        self._counts["time/environments"] += time.perf_counter() - start
        return outcomes

    def _begin(self, episodes: list[Episode]) -> None:
        """Reset an environment for each episode, and try those that fail again with another one."""
        errors: dict[int, Exception] = {}
        for attempt in range(self._settings.env_reset_retries + 1):
            if attempt:
                time.sleep(RETRY_PAUSE * 4 ** (attempt - 1))
                self._counts["env/resets_retried"] += len(episodes)
            # a call that comes back late must find nothing of the next attempt, so each has a seat of its own
            seats: list[list[MultiTurnEnvironment]] = [[] for _ in episodes]
            outcomes = self._call([partial(self._reset, *pair) for pair in zip(episodes, seats, strict=True)])
            errors = {}
            for episode, seat, outcome in zip(episodes, seats, outcomes, strict=True):
                episode.environment = episode.player = next(iter(seat), None)
                try:
                    episode.begin(check_observation(outcome.value()))
                    self._open_context(episode)
                except MISTAKES:
                    raise
                except Exception as error:
                    errors[episode.key] = error
                    self._drop_environment(episode, outcome, seat)
            episodes = [episode for episode in episodes if episode.key in errors]
            if not episodes:
                return
        for episode in episodes:
            episode.fail(errors[episode.key])

    def _reset(self, episode: Episode, seat: list[MultiTurnEnvironment]) -> Any:
        environment = self._pool.take()
        seat.append(environment)
        return environment.reset(**copied(episode.task))

    def _open_context(self, episode: Episode) -> None:
        limit = self._settings.max_context_length
        characters = sum(len(message.get("content") or "") for message in episode.observation.messages)
        if characters > limit * CHARACTERS_PER_TOKEN:
            self._end(episode, StopReason.context_overflow)  # without tokenising it
            return
        episode.context_ids = self._contexts.first(episode)
        if len(episode.context_ids) > self._settings.longest_context:
            self._end(episode, StopReason.context_overflow)

    def _step(self, episodes: list[Episode]) -> None:
        """Hand the policy's messages to the environments, and build the next contexts."""
        outcomes = self._call([partial(episode.environment.step, episode.last_message) for episode in episodes])
        for episode, outcome in zip(episodes, outcomes, strict=True):
            try:
                episode.answer(self._cut(check_step_result(outcome.value())))
                if episode.active and len(episode.turns) >= self._settings.max_turns:
                    episode.stop_reason = StopReason.max_turns
                if episode.active:
                    episode.context_ids = self._contexts.next(episode)
                    if not self._has_room(episode):
                        episode.stop_reason = self._limit(episode)[1]
            except MISTAKES:
                raise
            except Exception as error:
                self._drop_environment(episode, outcome, [episode.environment])
                episode.fail(error)
            else:
                if not episode.active:
                    self._end(episode, episode.stop_reason)

    def _finish(self, episodes: list[Episode]) -> None:
        """Called when all episodes of the batch have ended."""

    def _end(self, episode: Episode, stop_reason: StopReason) -> None:
        episode.stop_reason = stop_reason
        if episode.environment is not None:
            self._pool.give_back(episode.environment)
            episode.environment = None

    def _drop_environment(self, episode: Episode, outcome: CallOutcome, seat: list[MultiTurnEnvironment]) -> None:
        episode.environment = None
        if outcome.is_stuck:
            outcome.when_it_returns(lambda: [self._pool.discard(environment) for environment in seat])
        else:
            for environment in seat:
                self._pool.discard(environment)

    def _cut(self, result: StepResult) -> StepResult:
        for message in result.messages:
            text = message.get("content")
            if text and isinstance(text, str) and self._settings.max_observation_tokens != math.inf:
                message["content"] = cut_to_tokens(text, self._settings.max_observation_tokens, self._chat.tokenizer)
                self._counts["env/observations_cut"] += message["content"] is not text
        return result

    # ---- Tokens ----

    def _limit(self, episode: Episode) -> tuple[float, StopReason]:
        """Most tokens of context and response together, and what an episode that reaches them ends with."""
        return self._settings.max_context_length, StopReason.context_overflow

    def _has_room(self, episode: Episode) -> bool:
        """Whether a response fits behind the context."""
        length = len(episode.context_ids)
        return length <= self._settings.longest_context and length < self._limit(episode)[0]

    def _reads_unfinished(self, episode: Episode) -> bool:
        """Whether the environment gets to read a response that was cut."""
        return False

    def _take_action(
        self, episode: Episode, action_ids: list[int], logps: list[float] | None, eos_token_ids: list[int]
    ) -> None:
        limit, reason = self._limit(episode)
        room = limit - len(episode.context_ids)
        overflow = len(action_ids) > room
        if overflow:
            action_ids = action_ids[: int(room)]
            logps = None if logps is None else logps[: int(room)]
        ended = bool(action_ids) and action_ids[-1] in eos_token_ids and not overflow
        if action_ids:
            message = self._chat.parse(action_ids, episode.context_ids, episode.observation.tools)
            episode.act(Turn(episode.context_ids, action_ids, logps), message)
        if not ended and not self._reads_unfinished(episode):
            at_limit = len(action_ids) == room
            self._end(episode, reason if at_limit else StopReason.response_truncated)

    def _collect(self, episodes: list[Episode], trainer: "GRPOTrainer") -> dict[str, list[Any] | None]:
        output: dict[str, list[Any] | None] = {
            key: [] for key in ("prompt_ids", "completion_ids", "env_mask", "logprobs")
        }
        for episode in episodes:
            sequence = _join_turns(episode, filler_id=self._chat.tokenizer.eos_token_id)
            for key, value in zip(("prompt_ids", "completion_ids", "env_mask", "logprobs"), sequence, strict=True):
                output[key].append(value)
        if not trainer.use_vllm:
            output["logprobs"] = None
        output["trajectories"] = [episode.trajectory() for episode in episodes]
        output["environment_reward"] = [trajectory.reward for trajectory in output["trajectories"]]
        output["stop_reason"] = [episode.stop_reason.value for episode in episodes]
        return output


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


def _generate(
    episodes: list[Episode], trainer: "GRPOTrainer", cache: CachedGeneration | None
) -> list[tuple[list[int], list[float] | None]] | None:
    """One response for each episode, or `None` when no process has any episode left. A collective operation."""
    accelerator = trainer.accelerator
    counts = [len(episodes)]
    if accelerator.num_processes > 1:
        counts = accelerator.gather(torch.tensor(counts, device=accelerator.device)).tolist()
    most = max(counts)
    if most == 0:
        return None
    rows, keys = [episode.context_ids for episode in episodes], [episode.key for episode in episodes]
    # vLLM's server and its tensor-parallel groups share out responses as if every process had sent as many rows.
    needed = most if trainer.use_vllm else 1
    if min(counts) < needed:
        # All processes wait for a throw-away row too. The answer to a real context ends like the others'; that to
        # anything else may ramble on to `max_completion_length`.
        shortest = min(gather_object([min(rows, key=len)] if rows else []), key=len)
        missing = needed - len(rows)
        rows += [shortest] * missing
        keys += [None] * missing
    if cache is not None:
        completion_ids, logprobs = cache.generate(keys, rows), None
    else:
        completion_ids, logprobs = trainer._generate_single_turn(rows, None, {}, 1)
    if logprobs is None:
        logprobs = [None] * len(rows)
    return [(list(ids), logps) for ids, logps, _ in zip(completion_ids, logprobs, episodes, strict=False)]


def _join_turns(episode: Episode, filler_id: int) -> tuple[list[int], list[int], list[int], list[float]]:
    """Prompt, completion, mask (1 = policy) and sampling log-probabilities of an episode as one sequence."""
    if not episode.turns:
        return episode.context_ids or [filler_id], [filler_id], [0], [0.0]
    prompt_ids = episode.turns[0].context_ids
    sequence = list(prompt_ids)
    mask: list[int] = []
    logps: list[float] = []
    before: list[int] = list(prompt_ids)
    for turn in episode.turns:
        gap = turn.context_ids[shared_length(before, turn.context_ids) :]
        sequence += gap + turn.action_ids
        mask += [0] * len(gap) + [1] * len(turn.action_ids)
        logps += [0.0] * len(gap) + (turn.sampling_logps or [0.0] * len(turn.action_ids))
        before = turn.context_ids + turn.action_ids
    return prompt_ids, sequence[len(prompt_ids) :], mask, logps


def _raise_if_too_many_failed(episodes: list[Episode], allowed: float, trainer: "GRPOTrainer") -> None:
    accelerator = trainer.accelerator
    errors = [episode.error for episode in episodes if episode.error is not None]
    counts = accelerator.gather(torch.tensor([[len(errors), len(episodes)]], device=accelerator.device)).sum(dim=0)
    failed, played = counts.tolist()
    if failed == 0 or (failed < played and failed <= allowed * played):
        return
    first = next(filter(None, gather_object([describe(error) for error in errors[:1]] or [None])))
    number = f"All {played}" if failed == played else f"{failed} of {played}"
    raise RuntimeError(
        f"{number} environments of the batch failed. The first error: {first}. Mend the environment, or raise "
        f"max_env_failure_rate ({allowed:g}) if so many failures are to be expected."
    ) from (errors[0] if errors else None)


def _index_by_prompt(tasks: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    index: dict[str, dict[str, Any]] = {}
    for row in tasks:
        if index.setdefault(_prompt_key(row["prompt"]), row) != row:
            raise ValueError(
                f"Different rows of `tasks` have the same prompt, so it does not tell them apart: "
                f"{shorten(row['prompt'])}. Make the prompts different (an extra key in a message is enough)."
            )
    return index


def _prompt_key(prompt: Any) -> str:
    # Arrow fills keys that only some messages have with None.
    if isinstance(prompt, list):
        prompt = [{key: value for key, value in message.items() if value is not None} for message in prompt]
    return json.dumps(prompt, sort_keys=True)
