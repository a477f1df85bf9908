"""
Rollouts: environments and the policy play episodes together, turn by turn, for a whole batch at once.

Tokens are the truth. The chat template renders the opening conversation once; from there on a context only grows, by
the tokens the policy generated (never tokenised again) and by the rendering of the environment's new messages. So each
turn's context begins with the previous turn's context and action, and what is trained on is what was sampled.

Templates that rewrite history when messages are appended (Qwen3 drops earlier reasoning) cannot be continued that way;
for those TRL's training template is used instead, which keeps the history as it was.

Generation goes through the trainer's own backend (transformers, continuous batching, vLLM) with the trainer's sampling
settings. It is a collective operation in some setups (ZeRO-3, vLLM), therefore all processes generate equally often:
one whose episodes have ended generates a throw-away row until all are done.
"""

import copy
import json
import logging
import textwrap
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .buffer import Trajectory, Turn
from .chat_format import ChatFormat
from .envs.base import MultiTurnEnvironment, Observation, StepResult, StopReason


if TYPE_CHECKING:
    from trl import GRPOTrainer


logger = logging.getLogger(__name__)

DEFAULT_MAX_TURNS = 10
MAX_THREADS = 64

Message = dict[str, Any]


class MultiTurnRollout:
    """
    Plays one episode of an environment for each prompt, with the trainer's policy. It is a rollout function of TRL:
    pass it as `rollout_func` to [`SeeUPOTrainer`] or to a stock [`~trl.GRPOTrainer`].

    Environments step at the same time, in threads, and are reused: at the end of a batch they go back to a pool.

    Args:
        environment_factory (`Callable[[], MultiTurnEnvironment]`):
            A [`~seeupo_trl.envs.MultiTurnEnvironment`] class, or anything callable that returns an instance
            (`functools.partial(BfclEnvironment, tools="brief")`).
        tasks (`Dataset` or `Iterable[dict]`, *optional*):
            The dataset rows, for trainers that hand a rollout function nothing but prompts, as [`~trl.GRPOTrainer`]
            does. A row is looked up by its `prompt`, so different rows need different prompts. Give the rows of the
            evaluation dataset too. Not needed with [`SeeUPOTrainer`].
        max_turns (`int`, *optional*):
            Most assistant messages in an episode. Defaults to `max_turns` of the trainer's arguments where they have
            that field (there, `None` is no limit), else to 10.
        max_context_length (`int`, *optional*):
            Most tokens of context and response together. Defaults to `max_context_length` of the trainer's arguments
            where they have that field and it is set, else to the model's number of positions. The length of one
            response is limited by the trainer's `max_completion_length`.

    Calling it with `(prompts, trainer)` returns a dict of lists with one item per prompt:

    - `prompt_ids`: tokens of the opening conversation.
    - `completion_ids`: everything after it up to the end of the last action, or one end-of-sequence token if there was
      no action.
    - `env_mask`: 1 for tokens of the policy, 0 for tokens of the environment.
    - `logprobs`: log-probabilities of the completion under the sampler, 0.0 at environment tokens; `None` where the
      backend reports none.
    - `trajectories`: [`~seeupo_trl.buffer.Trajectory`], with the turns, the conversation and the reward.
    - `environment_reward`: return of the episode, `None` after an environment error. Read it with the reward function
      [`environment_reward`].
    - `stop_reason`: a [`~seeupo_trl.envs.StopReason`] as a string.

    An exception in an environment ends its episode without a reward (`env_error`, with the text in the trajectory's
    `info["error"]`); if every episode of a batch ends like that, a `RuntimeError` is raised.

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
        max_turns: int | None = None,
        max_context_length: int | None = None,
    ):
        if not callable(environment_factory):
            raise TypeError(
                f"environment_factory is a {type(environment_factory).__name__}; give a MultiTurnEnvironment class or "
                "a function without arguments that returns an instance."
            )
        for name, value in (("max_turns", max_turns), ("max_context_length", max_context_length)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; give at least 1, or None for the default.")
        self.environment_factory = environment_factory
        self.max_turns = max_turns
        self.max_context_length = max_context_length
        self._tasks = None if tasks is None else _index_by_prompt(tasks)
        self._chat: ChatFormat | None = None
        self._chat_trainer: weakref.ref | None = None
        self._idle: list[MultiTurnEnvironment] = []
        self._environments: list[MultiTurnEnvironment] = []
        weakref.finalize(self, _close_all, self._environments)

    def close(self) -> None:
        """Close all environments. Happens by itself when the object is deleted and when the interpreter exits."""
        _close_all(self._environments)
        self._environments.clear()
        self._idle.clear()

    def __call__(self, prompts: list[Any], trainer: "GRPOTrainer") -> dict[str, list[Any] | None]:
        if self._chat_trainer is None or self._chat_trainer() is not trainer:
            self._chat = ChatFormat(trainer)
            self._chat_trainer = weakref.ref(trainer)
        max_turns, max_length = self._limits(trainer)
        episodes = [_Episode(task, self._take_environment()) for task in self._rows(prompts, trainer)]

        with ThreadPoolExecutor(min(MAX_THREADS, len(episodes))) as threads:
            list(threads.map(_Episode.reset, episodes))
            for episode in episodes:
                if episode.active:
                    episode.context_ids = self._chat.render(episode.observation)
                    if len(episode.context_ids) >= max_length:
                        episode.stop_reason = StopReason.context_overflow
            while True:
                active = [episode for episode in episodes if episode.active]
                responses = _generate([episode.context_ids for episode in active], trainer)
                if responses is None:
                    break
                for episode, (action_ids, logps) in zip(active, responses, strict=True):
                    self._take_action(episode, action_ids, logps, max_length, trainer.eos_token_ids)
                active = [episode for episode in active if episode.active]
                list(threads.map(_Episode.step, active))
                for episode in active:
                    if episode.active and len(episode.turns) == max_turns:
                        episode.stop_reason = StopReason.max_turns
                    if episode.active:
                        episode.context_ids += self._chat.render_suffix(episode.new_messages, episode.context_ids[-1])
                        if len(episode.context_ids) >= max_length:
                            episode.stop_reason = StopReason.context_overflow

        self._return_environments(episodes)
        _raise_if_all_failed(episodes, trainer)
        return self._collect(episodes, trainer)

    def _limits(self, trainer: "GRPOTrainer") -> tuple[int | None, float]:
        # A stock GRPOConfig has neither field.
        max_turns = self.max_turns or getattr(trainer.args, "max_turns", DEFAULT_MAX_TURNS)
        max_length = self.max_context_length or getattr(trainer.args, "max_context_length", None)
        if max_length is None:
            # State-space models have no such limit.
            max_length = getattr(trainer.model.config.get_text_config(), "max_position_embeddings", None)
        engine_length = trainer.args.vllm_max_model_length if trainer.args.use_vllm else None
        return max_turns, min(max_length or float("inf"), engine_length or float("inf"))

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
                f"No row of `tasks` has this prompt: {_shorten(missing[0])}. `tasks` must hold the rows of every "
                "dataset the trainer reads, the evaluation dataset included."
            )
        return [self._tasks[_prompt_key(prompt)] for prompt in prompts]

    def _take_environment(self) -> MultiTurnEnvironment:
        if self._idle:
            return self._idle.pop()
        environment = self.environment_factory()
        if not isinstance(environment, MultiTurnEnvironment):
            raise TypeError(
                f"environment_factory returned a {type(environment).__name__}; it must return an instance of a "
                "subclass of seeupo_trl.envs.MultiTurnEnvironment."
            )
        self._environments.append(environment)
        return environment

    def _return_environments(self, episodes: list["_Episode"]) -> None:
        for episode in episodes:
            if episode.error is None:
                self._idle.append(episode.environment)
            else:  # whatever state it is in, it does not get another task
                self._environments.remove(episode.environment)
                _close_all([episode.environment])

    def _take_action(
        self,
        episode: "_Episode",
        action_ids: list[int],
        logps: list[float] | None,
        max_length: float,
        eos_token_ids: list[int],
    ) -> None:
        room = max_length - len(episode.context_ids)
        overflow = len(action_ids) > room
        if overflow:
            action_ids = action_ids[: int(room)]
            logps = None if logps is None else logps[: int(room)]
        ended = bool(action_ids) and action_ids[-1] in eos_token_ids and not overflow
        if not ended:
            at_limit = len(action_ids) == room
            episode.stop_reason = StopReason.context_overflow if at_limit else StopReason.response_truncated
        if action_ids:
            message = self._chat.parse(action_ids, episode.context_ids, episode.observation.tools)
            episode.act(Turn(episode.context_ids, action_ids, logps), message)

    def _collect(self, episodes: list["_Episode"], trainer: "GRPOTrainer") -> dict[str, list[Any] | None]:
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


@dataclass
class _Episode:
    """One episode while it is played. `reset` and `step` talk to the environment, and run in a thread."""

    task: dict[str, Any]
    environment: MultiTurnEnvironment
    observation: Observation = field(default_factory=lambda: Observation([]))
    context_ids: list[int] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    new_messages: list[Message] = field(default_factory=list)
    reward: float = 0.0
    info: dict[str, Any] = field(default_factory=dict)
    stop_reason: StopReason | None = None
    error: Exception | None = None

    @property
    def active(self) -> bool:
        return self.stop_reason is None

    def reset(self) -> None:
        try:
            observation = self.environment.reset(**copy.deepcopy(self.task))
            if not isinstance(observation, Observation) or not observation.messages:
                raise TypeError(f"reset() must return an Observation with messages; it returned {observation!r}.")
            self.observation = observation
        except Exception as error:
            self._fail(error)

    def act(self, turn: Turn, message: Message) -> None:
        self.turns.append(turn)
        self.messages.append(message)
        self.context_ids = turn.context_ids + turn.action_ids

    def step(self) -> None:
        try:
            result = self.environment.step(copy.deepcopy(self.messages[-1]))
            if not isinstance(result, StepResult):
                raise TypeError(f"step() must return a StepResult; it returned {result!r}.")
            ended = result.terminated or result.truncated
            if not ended and not result.messages:
                raise ValueError("step() returned no messages although the episode goes on.")
            self.reward += result.reward
            self.info.update(result.info)
        except Exception as error:
            self._fail(error)
        else:
            self.new_messages = result.messages
            self.messages.extend(result.messages)
            self.stop_reason = StopReason.completed if ended else None

    def _fail(self, error: Exception) -> None:
        self.error = error
        self.stop_reason = StopReason.env_error
        self.info["error"] = f"{type(error).__name__}: {error}"
        columns = {name: value for name, value in self.task.items() if name != "prompt"} or self.task
        logger.warning(
            "Environment error in task %s: %s. The episode is left out of training.",
            _shorten(columns),
            self.info["error"],
        )

    def trajectory(self) -> Trajectory:
        return Trajectory(
            turns=self.turns,
            reward=None if self.error is not None else self.reward,
            stop_reason=self.stop_reason,
            messages=self.messages,
            info=self.info,
        )


def _generate(contexts: list[list[int]], trainer: "GRPOTrainer") -> list[tuple[list[int], list[float] | None]] | None:
    """One response for each context, or `None` when no process has any context left. A collective operation."""
    accelerator = trainer.accelerator
    most = int(accelerator.gather(torch.tensor([len(contexts)], device=accelerator.device)).max())
    if most == 0:
        return None
    rows = contexts
    if accelerator.num_processes > 1:
        # vLLM's server and its tensor-parallel groups share out responses as if every process had sent as many rows.
        wanted = most if trainer.use_vllm else max(1, len(contexts))
        rows = contexts + [[trainer.processing_class.eos_token_id]] * (wanted - len(contexts))
    completion_ids, logprobs = trainer._generate_single_turn(rows, None, {}, 1)
    if logprobs is None:
        logprobs = [None] * len(rows)
    return [(list(ids), logps) for ids, logps, _ in zip(completion_ids, logprobs, contexts, strict=False)]


def _join_turns(episode: _Episode, filler_id: int) -> tuple[list[int], list[int], list[int], list[float]]:
    """Prompt, completion, mask (1 = policy) and sampling log-probabilities of an episode as one sequence."""
    if not episode.turns:
        return episode.context_ids or [filler_id], [filler_id], [0], [0.0]
    prompt_ids = episode.turns[0].context_ids
    sequence = list(prompt_ids)
    mask: list[int] = []
    logps: list[float] = []
    for turn in episode.turns:
        gap = turn.context_ids[len(sequence) :]
        sequence += gap + turn.action_ids
        mask += [0] * len(gap) + [1] * len(turn.action_ids)
        logps += [0.0] * len(gap) + (turn.sampling_logps or [0.0] * len(turn.action_ids))
    return prompt_ids, sequence[len(prompt_ids) :], mask, logps


def _raise_if_all_failed(episodes: list[_Episode], trainer: "GRPOTrainer") -> None:
    accelerator = trainer.accelerator
    errors = [episode.error for episode in episodes if episode.error is not None]
    counts = accelerator.gather(torch.tensor([[len(errors), len(episodes)]], device=accelerator.device)).sum(dim=0)
    if counts[0] == counts[1]:
        raise RuntimeError(
            f"All {int(counts[1])} environments of the batch failed. The first error: "
            f"{type(errors[0]).__name__}: {errors[0]}"
        ) from errors[0]


def _index_by_prompt(tasks: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    index: dict[str, dict[str, Any]] = {}
    for row in tasks:
        if index.setdefault(_prompt_key(row["prompt"]), row) != row:
            raise ValueError(
                f"Different rows of `tasks` have the same prompt, so it does not tell them apart: "
                f"{_shorten(row['prompt'])}. Make the prompts different (an extra key in a message is enough)."
            )
    return index


def _prompt_key(prompt: Any) -> str:
    # Arrow fills keys that only some messages have with None.
    if isinstance(prompt, list):
        prompt = [{key: value for key, value in message.items() if value is not None} for message in prompt]
    return json.dumps(prompt, sort_keys=True)


def _shorten(value: Any) -> str:
    return textwrap.shorten(str(value), 200)


def _close_all(environments: list[MultiTurnEnvironment]) -> None:
    for environment in environments:
        try:
            environment.close()
        except Exception as error:
            logger.warning("Could not close %s: %s", type(environment).__name__, error)
