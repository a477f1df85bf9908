"""
The rollout of TRL environments: what [`~trl.GRPOTrainer`] does with its `environment_factory`, as a
[`~seeupo_trl.MultiTurnRollout`].

Trajectories are those of TRL's own tool loop (trl 1.15 and 1.16). Limits mean what they mean there: an episode may use
`max_completion_length` tokens in all, results of tools included, and at most `max_tool_calling_iterations` of its
messages have their calls executed. A result that does not fit is taken back, and the episode ends before it.

What is added: environments run at the same time under a time limit; one that fails costs its episode and not the run;
processes generate equally often, which TRL's loop does not see to (with ZeRO-3 it waits for ever when episodes differ
in length).
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ..envs.base import MultiTurnEnvironment, StopReason
from ..envs.tools import EMPTY_PROMPT, ToolEnvironment
from .environment_pool import EnvironmentPool
from .episode import Episode
from .multi_turn import MultiTurnRollout
from .observations import copied


if TYPE_CHECKING:
    from trl import GRPOTrainer


class ToolRollout(MultiTurnRollout):
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
        super().__init__(ToolEnvironment, max_turns=math.inf)
        self.factories = factories
        self._pool = _Players({name: partial(ToolEnvironment, make, tools=tools) for name, make in factories.items()})
        self._max_iterations: float = math.inf
        self._max_completion_length: float = math.inf

    @property
    def factory_for_trl(self) -> Callable[[], Any] | dict[str, Callable[[], Any]]:
        """What TRL makes one environment of each kind with, to look at its methods; the rollout plays with it, too."""
        factories = {name: partial(self._first_of, name) for name in self.factories}
        return factories.get(None, factories)

    def _first_of(self, name: str | None) -> Any:
        player = self._pool.first_of(name)
        _ = player.schemas  # raises where a tool is not documented
        return player.environment

    def plays_messages(self, name: str | None) -> bool:
        """Whether a factory makes a [`MultiTurnEnvironment`], rather than a TRL environment of tools."""
        factory = self.factories[name]
        if isinstance(factory, type):
            return issubclass(factory, MultiTurnEnvironment)
        environment = self._pool.first_of(name).environment
        if not isinstance(environment, MultiTurnEnvironment):
            return False
        environment.close()
        return True

    def with_its_rewards(self, reward_funcs: list[Any]) -> list[Any]:
        """
        TRL's reward functions, the last of which call `get_reward`, one for each class that has it: in place of those,
        functions that read what `get_reward` returned at the end of the episode.
        """
        players = [self._pool.first_of(name) for name in self.factories]
        owners = list(dict.fromkeys(type(player.environment) for player in players if player.owns_reward))
        start = len(reward_funcs) - len(owners)
        owned = [partial(_reward_of, *pair) for pair in zip(owners, reward_funcs[start:], strict=True)]
        return [*reward_funcs[:start], *owned]

    def __call__(self, prompts: list[Any], trainer: "GRPOTrainer") -> dict[str, list[Any] | None]:
        self._max_iterations = trainer.max_tool_calling_iterations
        self._max_completion_length = trainer.max_completion_length
        self._pool.seat([self._name_in(row) for row in self._rows(prompts, trainer)])
        return super().__call__(prompts, trainer)

    def _name_in(self, row: dict[str, Any]) -> str | None:
        if None in self.factories:
            return None
        name = row.get("environment")
        if name not in self.factories:
            raise ValueError(
                f"A row has `environment={name!r}`, which is not among the environments passed to "
                f"`environment_factory`: {', '.join(map(repr, self.factories))}."
            )
        return name

    def _prepare_for(self, trainer: "GRPOTrainer") -> None:
        super()._prepare_for(trainer)
        self._chat.chat_template = trainer.chat_template  # chosen by TRL, for tools
        self._pool.event_loop = trainer.async_loop if trainer._has_async_funcs else None

    # ---- Environments ----

    def _reset(self, episode: Episode, seat: list[MultiTurnEnvironment]) -> Any:
        player = self._pool.take_seat(episode.key)
        seat.append(player)
        task = copied(episode.task)
        if None not in self.factories:
            del task["environment"]
        return player.reset(**task)

    def _step(self, episodes: list[Episode]) -> None:
        for episode in episodes:
            if len(episode.turns) > self._max_iterations and episode.messages[-1].get("tool_calls"):
                self._end(episode, StopReason.max_turns)
        super()._step([episode for episode in episodes if episode.active])

    def _finish(self, episodes: list[Episode]) -> None:
        played = [episode for episode in episodes if episode.error is None]
        owners = [episode for episode in played if episode.player.owns_reward]
        for episode, outcome in zip(owners, self._call([e.player.reward for e in owners]), strict=True):
            try:
                episode.reward = outcome.value()
            except Exception as error:
                self._drop_environment(episode, outcome, [episode.player])
                episode.fail(error)
        for episode in played:
            if episode.error is None:
                self._pool.leave_seat(episode.key, episode.player)

    # ---- Tokens ----

    def _limit(self, episode: Episode) -> tuple[float, StopReason]:
        limit, reason = super()._limit(episode)
        budget = self._prompt_length(episode) + self._max_completion_length
        return (budget, StopReason.response_truncated) if budget < limit else (limit, reason)

    def _has_room(self, episode: Episode) -> bool:
        # TRL asks for one more response when a result fills the budget to its last token, and keeps none of it
        limit, reason = self._limit(episode)
        fills_budget = len(episode.context_ids) == limit and reason == StopReason.response_truncated
        if fills_budget and limit <= self._settings.longest_context:
            return True
        return super()._has_room(episode)

    def _reads_unfinished(self, episode: Episode) -> bool:
        return bool(episode.messages) and "tool_calls" in episode.messages[-1]

    def _ends_unanswered(self, episode: Episode) -> bool:
        fills_budget = len(episode.context_ids) == self._prompt_length(episode) + self._max_completion_length
        return episode.error is None and fills_budget and _ends_with_result(episode)

    @staticmethod
    def _prompt_length(episode: Episode) -> int:
        return len(episode.turns[0].context_ids if episode.turns else episode.context_ids)

    def _collect(self, episodes: list[Episode], trainer: "GRPOTrainer") -> dict[str, list[Any] | None]:
        for episode in episodes:
            for message in episode.messages:
                message.pop("parse_error", None)
            while not self._ends_unanswered(episode) and _ends_with_result(episode):
                episode.messages.pop()  # it did not fit
        output = super()._collect(episodes, trainer)
        for index, episode in enumerate(episodes):
            if self._ends_unanswered(episode):
                _append_to_completion(output, index, episode.context_ids[self._prompt_length(episode) :])
        players = [episode.player for episode in episodes]
        output["environments"] = [
            (player or self._pool.first_of(self._name_in(episode.task))).environment
            for player, episode in zip(players, episodes, strict=True)
        ]
        output["prompts"] = [
            player.prompt if player is not None else episode.task.get("prompt", EMPTY_PROMPT)
            for player, episode in zip(players, episodes, strict=True)
        ]
        output["tool_calls"] = [(0, 0) if player is None else (player.calls, player.failures) for player in players]
        return output


def tool_rollout_for(
    environment_factory: Callable[[], Any] | dict[str, Callable[[], Any]], tools: Sequence[Callable]
) -> ToolRollout | None:
    """
    The rollout of a factory of TRL environments, or of several by name; `None` if it makes [`MultiTurnEnvironment`]s.

    Raises:
        `ValueError`:
            When one of several factories makes a [`MultiTurnEnvironment`].
    """
    is_dict = isinstance(environment_factory, dict)
    rollout = ToolRollout(environment_factory if is_dict else {None: environment_factory}, tools)
    for name, factory in rollout.factories.items():
        if not rollout.plays_messages(name):
            continue
        if is_dict:
            raise ValueError(
                f"`environment_factory[{name!r}]` is {factory!r}, which makes a MultiTurnEnvironment. A dict takes "
                "TRL environments only; give one MultiTurnEnvironment that chooses by the row's columns in `reset`."
            )
        rollout.close()
        return None
    return rollout


def _reward_of(
    environment_class: type,
    get_reward: Callable,
    environments: list[Any],
    environment_reward: list[float | None] | None = None,
    **kwargs: Any,
) -> Any:
    if environment_reward is None:  # not called by the trainer
        return get_reward(environments=environments)
    pairs = zip(environments, environment_reward, strict=True)
    return [reward if type(environment) is environment_class else None for environment, reward in pairs]


def _ends_with_result(episode: Episode) -> bool:
    return bool(episode.messages) and episode.messages[-1]["role"] != "assistant"


def _append_to_completion(output: dict[str, list[Any] | None], index: int, completion_ids: list[int]) -> None:
    """Make a completion as long as `completion_ids`, by tokens that are none of the policy's."""
    missing = len(completion_ids) - len(output["completion_ids"][index])
    output["completion_ids"][index] = completion_ids
    output["env_mask"][index] += [0] * missing
    if output["logprobs"] is not None:
        output["logprobs"][index] += [0.0] * missing


class _Players(EnvironmentPool):
    """
    Environments by name, each kind in a row of seats. The n-th episode of a kind in a batch takes the n-th seat, so it
    depends on nothing but the batch who plays what.
    """

    def __init__(self, factories: dict[str | None, Callable[[], ToolEnvironment]]):
        super().__init__(ToolEnvironment)
        self.factories = factories
        self.event_loop = None
        self._rows: dict[str | None, list[ToolEnvironment | None]] = {name: [] for name in factories}
        self._firsts: dict[str | None, ToolEnvironment] = {}
        self._seats: list[tuple[str | None, int]] = []

    def first_of(self, name: str | None) -> ToolEnvironment:
        """The environment that was made first of its kind."""
        if name not in self._firsts:
            self._firsts[name] = self.factories[name]()
            self._environments.append(self._firsts[name])
            self._rows[name].append(self._firsts[name])
        return self._firsts[name]

    def seat(self, names: list[str | None]) -> None:
        """Give each episode of a batch a seat."""
        counts: Counter = Counter()
        self._seats = []
        for name in names:
            self._seats.append((name, counts[name]))
            counts[name] += 1
        for name, count in counts.items():
            self._rows[name] += [None] * (count - len(self._rows[name]))

    def take_seat(self, key: int) -> ToolEnvironment:
        """The environment of an episode, made where there is none."""
        name, number = self._seats[key]
        player, self._rows[name][number] = self._rows[name][number], None
        if player is None:
            player = self.factories[name]()
            self._environments.append(player)
        player.event_loop = self.event_loop
        return player

    def leave_seat(self, key: int, player: ToolEnvironment) -> None:
        """The batch has ended: the environment of an episode waits for the next one."""
        name, number = self._seats[key]
        self._rows[name][number] = player

    def give_back(self, environment: MultiTurnEnvironment) -> None:
        """Nothing to do: it stays with its episode until the batch has ended."""
