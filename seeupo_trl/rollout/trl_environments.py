"""
The rollout of TRL environments: what [`~trl.GRPOTrainer`] does with its `environment_factory`, as episodes of
[`~seeupo_trl.rollout.multi_turn`].

Trajectories are those of TRL's own tool loop (trl 1.15 and 1.16). Limits mean what they mean there: an episode may use
`max_completion_length` tokens in all, results of tools included, and at most `max_tool_calling_iterations` of its
messages have their calls executed. A result that does not fit is taken back, and the episode ends before it.

What is added: environments run at the same time under a time limit; one that fails costs its episode and not the run;
processes generate equally often, which TRL's loop does not see to (with ZeRO-3 it waits for ever when episodes differ
in length).
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ..envs.base import MultiTurnEnvironment
from ..envs.tools import EMPTY_PROMPT, ToolEnvironment
from .batch import RolloutBatch
from .chat_format import ChatFormat
from .chats import Chats
from .environment_pool import EnvironmentPool, Instance
from .episode import Episode
from .failures import MISTAKES
from .limits import EpisodeLimits
from .lock_step import call
from .multi_turn import MultiTurnRollout
from .observations import copied
from .random_state import RandomState
from .schedule import play
from .settings import DefaultSeconds, RolloutSettings


if TYPE_CHECKING:
    from trl import GRPOTrainer


class ToolRollout:
    """
    Plays the episodes of TRL environments. [`SeeUPOTrainer`] makes one from its `environment_factory`.

    Instances are made when a batch needs more of a kind than there are, and are reset again and again. Those that have
    played a batch are left as they are until the next one, for the reward functions to look at; so there are as many
    as episodes, and `max_concurrent_envs` only says how many play at once.

    Args:
        factories (`dict[str | None, Callable]`):
            Factories of TRL environments by name, which a row has in its column `environment`; `{None: factory}` if
            there is one for all rows.
        tools (`Sequence[Callable]`, *optional*, defaults to `()`):
            Further tools for all of them.

    The dict that a call returns has three more lists than that of [`MultiTurnRollout`]: `environments` (the instances
    that played), `prompts` (the opening conversations) and `tool_calls` (numbers of calls and of failed ones).
    `environment_reward` is what the environment's `get_reward` says, and 0 if it has none.

    Raises:
        `ValueError`:
            When a row names an environment that there is not.
    """

    def __init__(self, factories: dict[str | None, Callable[[], Any]], tools: Sequence[Callable] = ()):
        self.factories = factories
        self._environments = TrlEnvironments(factories, tools)
        self._chats = Chats(_chat_format)

    @property
    def factory_for_trl(self) -> Callable[[], Any] | dict[str, Callable[[], Any]]:
        """What TRL makes one environment of each kind with, to look at its methods; the rollout plays with it, too."""
        factories = {name: partial(self._first_of, name) for name in self.factories}
        return factories.get(None, factories)

    def _first_of(self, name: str | None) -> Any:
        first = self._environments.first_of(name)
        _ = first.schemas  # raises where a tool is not documented
        return first.environment

    def plays_messages(self, name: str | None) -> bool:
        """Whether a factory makes a [`MultiTurnEnvironment`], rather than a TRL environment of tools."""
        factory = self.factories[name]
        if isinstance(factory, type):
            return issubclass(factory, MultiTurnEnvironment)
        return isinstance(self._environments.first_of(name).environment, MultiTurnEnvironment)

    def of_messages(self, name: str | None) -> MultiTurnRollout:
        """The rollout of a factory of [`MultiTurnEnvironment`]s, which plays with the one that was made here, too."""
        rollout = MultiTurnRollout(self.factories[name])
        first = self._environments.lend(name)
        if first is not None:
            first.environment = first.environment.environment
            rollout.environments.begin_with(first, self._environments.pool)
        return rollout

    def with_its_rewards(self, reward_funcs: list[Any]) -> list[Any]:
        """
        TRL's reward functions, the last of which call `get_reward`, one for each class that has it: in place of those,
        functions that read what `get_reward` returned at the end of the episode.
        """
        firsts = [self._environments.first_of(name) for name in self.factories]
        owners = list(dict.fromkeys(type(first.environment) for first in firsts if first.owns_reward))
        start = len(reward_funcs) - len(owners)
        owned = [partial(_reward_of, *pair) for pair in zip(owners, reward_funcs[start:], strict=True)]
        return [*reward_funcs[:start], *owned]

    def close(self) -> None:
        """Close all environments."""
        self._environments.close()

    def __call__(self, prompts: list[Any], trainer: "GRPOTrainer") -> dict[str, list[Any] | None]:
        batch = self.prepare(trainer.rollout_inputs, trainer)
        play(batch)
        return batch.output()

    def prepare(self, rows: list[dict[str, Any]], trainer: "GRPOTrainer", steps_ahead: int = 0) -> "ToolBatch":
        """A batch that is ready to be played, as that of [`MultiTurnRollout`]. A collective operation."""
        settings = RolloutSettings.from_arguments(trainer.args)
        if isinstance(settings.env_timeout, DefaultSeconds):  # TRL's loop has no such limit
            settings = replace(settings, env_timeout=math.inf)
        limits = replace(
            EpisodeLimits.of(settings, trainer),
            max_turns=math.inf,
            max_episode_tokens=trainer.max_completion_length,
            max_tool_calling_iterations=trainer.max_tool_calling_iterations,
            executes_truncated_calls=True,
        )
        event_loop = trainer.async_loop if trainer._has_async_funcs else None
        cast = Cast(self._environments, rows, event_loop)
        try:
            cast.make_missing(settings.call_timeout)
            chat = self._chats.of(trainer, in_thread=bool(steps_ahead))
            batch = ToolBatch(cast, settings, limits, chat, trainer, steps_ahead)
            batch.prepare(rows)
        except BaseException:
            cast.release()
            raise
        return batch


def _chat_format(trainer: "GRPOTrainer") -> ChatFormat:
    chat = ChatFormat(trainer)
    chat.chat_template = trainer.chat_template  # chosen by TRL, for tools
    return chat


class ToolBatch(RolloutBatch):
    """A batch of TRL environments, which say at its end what their episodes are worth."""

    environments: "Cast"

    def output(self) -> dict[str, list[Any] | None]:
        try:
            self._score()
        finally:
            self.environments.release()
        for episode in self.episodes:
            _clean_messages(episode, self._limits)
        output = super().output()
        for index, episode in enumerate(self.episodes):
            if _ends_unanswered(episode, self._limits):
                _append_to_completion(output, index, episode.context_ids[episode.opening_length :])
        return output | self.environments.columns(self.episodes)

    def _score(self) -> None:
        """Have the environments say what their episodes are worth; one that cannot has failed."""
        together: list[tuple[Episode, Callable[[], Any]]] = []
        with self.shared_state:
            for episode in self.episodes:
                if episode.error is not None or not episode.environment.owns_reward:
                    continue
                reward, is_alone = self._watched(episode, episode.environment.reward, self._random_state)
                if is_alone:
                    self._take_rewards([(episode, reward)])
                else:
                    together.append((episode, reward))
            while together:
                most = int(min(len(together), self.settings.max_concurrent_envs))
                self._take_rewards(together[:most])
                del together[:most]

    def _take_rewards(self, calls: list[tuple[Episode, Callable[[], Any]]]) -> None:
        """Compute rewards at the same time."""
        outcomes = call(self, [(episode.instance, reward) for episode, reward in calls])
        for (episode, _), outcome in zip(calls, outcomes, strict=True):
            try:
                episode.reward = outcome.value()
            except MISTAKES:
                raise
            except Exception as error:
                if outcome.is_stuck:
                    self._gave_up(self._random_state)
                self.fail(episode, error)

    @property
    def _random_state(self) -> RandomState:
        return self.environments.pool.random_state_of_rewards


class TrlEnvironments:
    """
    TRL environments by kind, as message-level ones: those that no batch plays with, and how others are made.

    Args:
        factories (`dict[str | None, Callable]`):
            Factories by kind, see [`ToolRollout`].
        tools (`Sequence[Callable]`):
            Further tools for all of them.
    """

    def __init__(self, factories: dict[str | None, Callable[[], Any]], tools: Sequence[Callable]):
        self.pool = EnvironmentPool()
        self._factories = {kind: partial(ToolEnvironment, make, tools=tools) for kind, make in factories.items()}
        self._firsts: dict[str | None, ToolEnvironment] = {}
        self._idle: dict[str | None, deque[Instance]] = {kind: deque() for kind in factories}

    @property
    def are_named(self) -> bool:
        """Whether rows name their environment, rather than having one for all."""
        return None not in self._factories

    def first_of(self, kind: str | None) -> ToolEnvironment:
        """The instance that was made first of its kind."""
        if kind not in self._firsts:
            instance = self.new_instance(kind)
            (outcome,) = self.pool.call([(instance, instance.made)], None)
            if outcome.error is not None:
                self.pool.discard(instance)
            self._firsts[kind] = outcome.value()
            self._idle[kind].append(instance)
        return self._firsts[kind]

    def kind_of(self, row: dict[str, Any]) -> str | None:
        """
        The kind that a row asks for.

        Raises:
            `ValueError`:
                When it names an environment that there is not.
        """
        kind = row.get("environment") if self.are_named else None
        if kind not in self._factories:
            raise ValueError(
                f"A row has `environment={kind!r}`, which is not among the environments passed to "
                f"`environment_factory`: {', '.join(map(repr, self._factories))}."
            )
        return kind

    def new_instance(self, kind: str | None) -> Instance:
        """One more of a kind."""
        return self.pool.new_instance(self._factories[kind])

    def lend(self, kind: str | None) -> Instance | None:
        """The first of a kind that no batch plays with, if there is one."""
        return self._idle[kind].popleft() if self._idle[kind] else None

    def take_back(self, kind: str | None, instance: Instance) -> None:
        """Lend an instance first again."""
        self._idle[kind].appendleft(instance)

    def close(self) -> None:
        """Close all instances."""
        self.pool.close()
        self._firsts.clear()
        self._idle = {kind: deque() for kind in self._factories}


class Cast:
    """
    Who plays the episodes of a batch: an instance for each, until the batch has been scored. The n-th episode of a
    kind is played by the n-th idle instance of it, so who plays what depends on nothing but the batches.

    Args:
        environments ([`TrlEnvironments`]):
            The instances.
        rows (`list[dict]`):
            Dataset rows, one for each episode.
        event_loop (`asyncio.AbstractEventLoop`, *optional*):
            Where tools that are coroutines run.
    """

    def __init__(self, environments: TrlEnvironments, rows: list[dict[str, Any]], event_loop: Any = None):
        self.pool = environments.pool
        self._environments = environments
        self._event_loop = event_loop
        self._kinds = [environments.kind_of(row) for row in rows]
        self._instances = [environments.lend(kind) for kind in self._kinds]

    def make_missing(self, timeout: float | None) -> None:
        """
        Make the instances that are missing one after another, as TRL does: a factory may count. What fails is tried
        again when its episode begins, and so are all that come after one which took longer than `timeout` seconds.
        """
        for number, kind in enumerate(self._kinds):
            if self._instances[number] is not None:
                continue
            instance = self._environments.new_instance(kind)
            (outcome,) = self.pool.call([(instance, instance.made)], timeout)
            if outcome.error is None:
                self._instances[number] = instance
            else:
                self.pool.discard(instance)
            if outcome.is_stuck:
                return

    def take(self, episode: Episode) -> Instance:
        """Who plays an episode; another one where that has failed."""
        instance = self._instances[episode.key]
        if instance not in self.pool:
            instance = self._instances[episode.key] = self._environments.new_instance(self._kinds[episode.key])
        return instance

    def reset(self, instance: Instance, episode: Episode) -> Any:
        """Begin an episode, and return what `reset` does. Runs in the instance's thread."""
        environment = instance.made()
        environment.event_loop = self._event_loop
        task = copied(episode.task)
        if self._environments.are_named:
            del task["environment"]
        return environment.reset(**task)

    def give_back(self, instance: Instance) -> None:
        """Nothing to do: it stays with its episode until the batch has been scored."""

    def release(self) -> None:
        """The instances that have not failed may play another batch. Until then they stay as they are."""
        for kind, instance in zip(reversed(self._kinds), reversed(self._instances), strict=True):
            if instance in self.pool:
                self._environments.take_back(kind, instance)
        self._instances = [None] * len(self._kinds)

    def columns(self, episodes: list[Episode]) -> dict[str, list[Any]]:
        """What [`ToolRollout`] returns beside the columns of [`MultiTurnRollout`]."""
        environments, prompts, tool_calls = [], [], []
        for episode in episodes:
            played = episode.environment
            if played is None:  # none could be made
                environments.append(self._environments.first_of(self._kinds[episode.key]).environment)
                prompts.append(episode.task.get("prompt", EMPTY_PROMPT))
                tool_calls.append((0, 0))
            else:
                environments.append(played.environment)
                prompts.append(played.prompt)
                tool_calls.append((played.calls, played.failures))
        return {"environments": environments, "prompts": prompts, "tool_calls": tool_calls}


def rollout_for(
    environment_factory: Callable[[], Any] | dict[str, Callable[[], Any]], tools: Sequence[Callable]
) -> ToolRollout | MultiTurnRollout:
    """
    The rollout of a factory of TRL environments, of several by name, or of one of [`MultiTurnEnvironment`]s.

    Raises:
        `TypeError`:
            When there is something else than a factory.
        `ValueError`:
            When one of several factories makes a [`MultiTurnEnvironment`].
    """
    is_dict = isinstance(environment_factory, dict)
    factories = environment_factory if is_dict else {None: environment_factory}
    for name, factory in factories.items():
        if not callable(factory):
            given = f"environment_factory[{name!r}]" if is_dict else "environment_factory"
            raise TypeError(
                f"`{given}` is a {type(factory).__name__}; give a class, or a function without arguments that returns "
                "an instance."
            )
    rollout = ToolRollout(factories, tools)
    for name, factory in rollout.factories.items():
        if not rollout.plays_messages(name):
            continue
        if is_dict:
            rollout.close()
            raise ValueError(
                f"`environment_factory[{name!r}]` is {factory!r}, which makes a MultiTurnEnvironment. A dict takes "
                "TRL environments only; give one MultiTurnEnvironment that chooses by the row's columns in `reset`."
            )
        return rollout.of_messages(name)
    return rollout


def _reward_of(
    environment_class: type,
    get_reward: Callable,
    /,  # columns of the dataset may have these names
    environments: list[Any],
    environment_reward: list[float | None] | None = None,
    **kwargs: Any,
) -> Any:
    if environment_reward is None:  # not called by the trainer
        return get_reward(environments=environments)
    pairs = zip(environments, environment_reward, strict=True)
    return [reward if type(environment) is environment_class else None for environment, reward in pairs]


def _clean_messages(episode: Episode, limits: EpisodeLimits) -> None:
    """Leave what TRL has: no marks of malformed calls, no results that did not fit."""
    for message in episode.messages:
        message.pop("parse_error", None)
    while _ends_with_result(episode) and not _ends_unanswered(episode, limits):
        episode.messages.pop()


def _ends_unanswered(episode: Episode, limits: EpisodeLimits) -> bool:
    """Whether the episode's last result filled its budget of tokens to the last one: TRL counts it in."""
    fills_budget = len(episode.context_ids) == episode.opening_length + limits.max_episode_tokens
    return episode.error is None and fills_budget and _ends_with_result(episode)


def _ends_with_result(episode: Episode) -> bool:
    return bool(episode.messages) and episode.messages[-1]["role"] != "assistant"


def _append_to_completion(output: dict[str, list[Any] | None], index: int, completion_ids: list[int]) -> None:
    """Make a completion as long as `completion_ids`, by tokens that are none of the policy's."""
    missing = len(completion_ids) - len(output["completion_ids"][index])
    output["completion_ids"][index] = completion_ids
    output["env_mask"][index] += [0] * missing
    if output["logprobs"] is not None:
        output["logprobs"][index] += [0.0] * missing
