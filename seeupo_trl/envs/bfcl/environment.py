"""
BFCL v4 multi-turn (the Berkeley Function Calling Leaderboard) as an environment.

A task is a conversation of several *user turns*. In each one the policy calls functions of simulated services, step by
step, until it answers without a call; then the next user turn comes. After every user turn the official checks compare
the services' state and the results of the calls with those of the ground truth.

The protocol is by default the official one of function-calling models that are prompted with text (`QwenFCHandler`):
no system prompt but the tools (the same text with `tools="raw"`), 20 steps a user turn. The functions held back in
`miss_func` arrive as documents in a user message, at the user turn the task names, while the list of tools stays as it
was; a call of them works all along, as in the official executor. It departs from the official protocol where the
constructor's options say so, and in a few details:
- a call whose arguments are not a JSON object is answered with an error, instead of ending the user turn;
- text is never evaluated or rewritten: the official executor runs names and argument names as Python code, and edits
  strings that look like calls (`"sort (x)"`), of which the ground truth has none;
- a call that would do an absurd amount of work, or put a directory into itself, is answered with an error, see
  `limits.py`;
- a result of more than `MAX_RESULT_CHARACTERS` is shown cut, and what cannot be encoded as UTF-8 is shown escaped.

The score is the one of the official `multi_turn_checker`, see `checks.py`.

`bfcl-eval` must be installed without its dependencies: `pip install --no-deps bfcl-eval==2026.3.23` and
`pip install mpmath==1.3.0`.
"""

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..base import MultiTurnEnvironment, Observation, StepResult
from ..plain import parsed_json
from .checks import TrajectoryCheck
from .data import (
    TOOL_DETAILS,
    category_names,
    category_of,
    check_option,
    function_docs,
    load_entries,
    load_entry,
    split_numbers,
    to_tool_schema,
    user_messages,
)
from .partial_credit import share_of_calls_right
from .services import Call, Services, ground_truth


if TYPE_CHECKING:
    from datasets import Dataset


# The longest result of a ground-truth call has 32,000 characters.
MAX_RESULT_CHARACTERS = 200_000
# with reward="calls", what a user turn that does not pass earns at most, of what one that passes earns
PARTIAL_REWARD = 0.5


@dataclass(frozen=True)
class Limits:
    """Limits of a protocol, see [`BfclEnvironment`]."""

    max_steps_per_turn: int | None
    max_messages: int | None


PROTOCOLS = {
    "official": Limits(max_steps_per_turn=20, max_messages=None),
    "paper": Limits(max_steps_per_turn=None, max_messages=10),
}


class BfclEnvironment(MultiTurnEnvironment):
    """
    One BFCL v4 multi-turn conversation, with the official checks as the reward.

    The opening messages are the first user turn's; the tools are the functions of the services the task involves. When
    the episode ends, or at any step before, the trajectory's `info` has `category` (`str`, its official name),
    `success` (`bool`, all user turns passed), `turns_passed` (`list[bool]`, one for each user turn that has been
    checked) and `failure` (`str` or `None`, what the checks said at the first user turn that failed).

    An episode that reaches a limit ends with the calls of that message (`truncated`). In its last user turn it is
    checked as it is, and may pass; before, the task fails. So does the official harness.

    Args:
        protocol (`str`, *optional*, defaults to `"official"`):
            Limits by name. `"official"`: the 21st assistant message with calls in a user turn ends the episode.
            `"paper"`: the 10th assistant message of the episode ends it.
        reward (`str`, *optional*, defaults to `"success"`):
            `"success"`: `success_reward` if every user turn passes, else 0, the official score. `"fraction"`:
            `success_reward` times the fraction of user turns that pass, each paid when its user turn ends. `"calls"`:
            as `"fraction"`, and a user turn that ends without passing earns half of its part, times the share of its
            calls that are right ([`~seeupo_trl.envs.bfcl.partial_credit.share_of_calls_right`]).
        success_reward (`float`, *optional*, defaults to `1.0`):
            Reward of a solved task. The paper's code uses 1.5.
        tools (`str`, *optional*, defaults to `"full"`):
            How much of the functions' documents the policy is shown, as tools and in the message of `miss_func`.
            `"raw"`: everything, as BFCL writes it and as the official harness shows it, for chat templates that print
            a tool as it is (Qwen). `"full"`: everything, as JSON schemas that all chat templates understand.
            `"trimmed"`: without the `response` field (about two thirds of the tokens). `"brief"`: also without the
            sentences on the service, which are the same for all its functions.
        tool_list (`str`, *optional*, defaults to `"classes"`):
            `"classes"`: all functions of the services involved, the official protocol. `"needed"`: only those of the
            ground truth and `distractors` others, for small models. The functions not listed stay callable.
        distractors (`int`, *optional*, defaults to `0`):
            With `tool_list="needed"`, how many functions of the same services to add; the choice depends on nothing
            but the task's id.
        max_user_turns (`int`, *optional*):
            Play only the first user turns; the task is solved when those pass. `None` plays all of them, the official
            protocol.
        max_steps_per_turn (`int`, *optional*):
            Most assistant messages with calls in a user turn; one more ends the episode. `None`: as `protocol` says.
        max_messages (`int`, *optional*):
            Most assistant messages in an episode. `None`: as `protocol` says.
    """

    def __init__(
        self,
        *,
        protocol: Literal["official", "paper"] = "official",
        reward: Literal["success", "fraction", "calls"] = "success",
        success_reward: float = 1.0,
        tools: Literal["raw", "full", "trimmed", "brief"] = "full",
        tool_list: Literal["classes", "needed"] = "classes",
        distractors: int = 0,
        max_user_turns: int | None = None,
        max_steps_per_turn: int | None = None,
        max_messages: int | None = None,
    ):
        check_option("protocol", protocol, tuple(PROTOCOLS))
        check_option("reward", reward, ("success", "fraction", "calls"))
        check_option("tools", tools, TOOL_DETAILS)
        check_option("tool_list", tool_list, ("classes", "needed"))
        limits = {
            "max_user_turns": max_user_turns,
            "max_steps_per_turn": max_steps_per_turn,
            "max_messages": max_messages,
        }
        for name, limit in limits.items():
            if limit is not None and limit < 1:
                raise ValueError(f"{name} is {limit}; give at least 1, or None for the protocol's.")
        if distractors < 0:
            raise ValueError(f"distractors is {distractors}; give the number of functions to add, 0 or more.")
        named = PROTOCOLS[protocol]
        self.reward = reward
        self.success_reward = success_reward
        self.tools = tools
        self.tool_list = tool_list
        self.distractors = distractors
        self.max_user_turns = max_user_turns
        self.max_steps_per_turn = named.max_steps_per_turn if max_steps_per_turn is None else max_steps_per_turn
        self.max_messages = named.max_messages if max_messages is None else max_messages

    def reset(self, id: str, **task: Any) -> Observation:
        """
        Begin the conversation of a task.

        Args:
            id (`str`):
                Id of the task, such as `"multi_turn_base_0"`.
            task (`Any`):
                Other columns of the dataset; not used.
        """
        self._entry = load_entry(id)
        self._truth_calls = ground_truth(id)[: self.max_user_turns]
        self._services = Services(self._entry)
        self._check = TrajectoryCheck(id)
        self._turns_passed: list[bool] = []
        self._failure: str | None = None
        self._steps: list[list[Call]] = []
        self._messages = self._messages_with_calls = 0
        return Observation(messages=self._user_messages(), tools=self._tool_schemas())

    def step(self, message: dict[str, Any]) -> StepResult:
        """
        Run the calls of an assistant message, or end the user turn if there are none.

        Args:
            message (`dict`):
                The assistant message.
        """
        self._messages += 1
        calls = message.get("tool_calls")
        if calls:
            self._messages_with_calls += 1
            result = StepResult(self._run(calls), info=self._info())
        else:
            result = self._end_user_turn()
        limit = None if result.terminated else self._limit_reached()
        return result if limit is None else self._cut(result, limit)

    @property
    def _turn(self) -> int:
        return len(self._turns_passed)

    def ground_truth_calls(self) -> list[dict[str, Any]]:
        """The ground truth of the current user turn, as `tool_calls` of an assistant message."""
        calls = copy.deepcopy(self._truth_calls[self._turn])
        return [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls]

    def _run(self, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
        results, made = [], []
        for call in calls:
            function = call.get("function", call)  # some chat formats write calls without the wrapper
            name, arguments = function["name"], function["arguments"]
            if isinstance(arguments, str):
                try:
                    arguments = parsed_json(arguments)
                except ValueError:
                    pass
            if isinstance(arguments, dict):
                made.append((name, arguments))
                result = self._services.call(name, arguments)
            else:
                result = f"Error during execution: the arguments of {name} must be a JSON object"
            results.append({"role": "tool", "name": _shown(name), "content": _shown(result)})
        if made:
            self._steps.append(made)
        return results

    def _end_user_turn(self) -> StepResult:
        failure = self._check.end_user_turn(self._steps)
        earned = float(failure is None)
        if self.reward == "calls" and failure is not None:
            made = [call for step in self._steps for call in step]
            earned = PARTIAL_REWARD * share_of_calls_right(made, self._truth_calls[self._turn])
        self._failure = self._failure or failure
        self._turns_passed.append(failure is None)
        self._steps = []
        self._messages_with_calls = 0
        terminated = self._turn == len(self._truth_calls)
        if self.reward == "success":
            reward = self.success_reward * (terminated and all(self._turns_passed))
        else:
            reward = self.success_reward * earned / len(self._truth_calls)
        messages = [] if terminated else self._user_messages()
        return StepResult(messages, reward=reward, terminated=terminated, info=self._info())

    def _limit_reached(self) -> str | None:
        if self.max_steps_per_turn is not None and self._messages_with_calls > self.max_steps_per_turn:
            return f"More than {self.max_steps_per_turn} steps in turn {self._turn}"
        if self.max_messages is not None and self._messages >= self.max_messages:
            return f"No end within {self.max_messages} assistant messages, in turn {self._turn}"
        return None

    def _cut(self, result: StepResult, limit: str) -> StepResult:
        reward = result.reward
        if self._messages_with_calls and self._turn == len(self._truth_calls) - 1:
            reward += self._end_user_turn().reward
        else:
            self._failure = self._failure or limit
        return StepResult([], reward=reward, truncated=True, info=self._info())

    def _info(self) -> dict[str, Any]:
        finished = self._turn == len(self._truth_calls)
        return {
            "category": category_of(self._entry),
            "success": finished and all(self._turns_passed),
            "turns_passed": list(self._turns_passed),
            "failure": self._failure,
        }

    def _user_messages(self) -> list[dict[str, Any]]:
        return user_messages(self._entry, self._turn, self.tools)

    def _tool_schemas(self) -> list[dict[str, Any]]:
        docs = function_docs(self._entry)
        if self.tool_list == "needed":
            needed = {name for calls in self._truth_calls for name, _ in calls}
            others = sorted({doc["name"] for doc in docs} - needed)
            random.Random(self._entry["id"]).shuffle(others)
            shown = needed.union(others[: self.distractors])
            docs = [doc for doc in docs if doc["name"] in shown]
        return [to_tool_schema(doc, self.tools) for doc in docs]


def _shown(text: str) -> str:
    """Text as a message may hold it: models can write lone surrogates, which tokenizers refuse."""
    left_out = len(text) - MAX_RESULT_CHARACTERS
    if left_out > 0:
        text = f"{text[:MAX_RESULT_CHARACTERS]}... ({left_out} more characters)"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def load_bfcl(
    category: str | Sequence[str] = "multi_turn_base",
    split: Literal["train", "test", "all"] = "train",
    *,
    split_scheme: Literal["paper", "stratified"] = "paper",
    seed: int = 0,
) -> "Dataset":
    """
    The tasks of BFCL v4 multi-turn categories, one row each.

    Args:
        category (`str` or `list[str]`, *optional*, defaults to `"multi_turn_base"`):
            `"multi_turn_base"`, `"multi_turn_miss_func"`, `"multi_turn_miss_param"` or `"multi_turn_long_context"`,
            with or without `multi_turn_`; several of them in a list, whose rows follow one another; or `"all"`.
        split (`str`, *optional*, defaults to `"train"`):
            `"train"` or `"test"`, 100 tasks of a category each, or `"all"`.
        split_scheme (`str`, *optional*, defaults to `"paper"`):
            `"paper"`: tasks 0 to 99 for training, 100 to 199 for the test. It is a shift of domain: files and
            vehicles in train, trading and travel in test. `"stratified"`: half of the tasks of every combination of
            services (one more or less where their number is odd), drawn at random. Either way the variants of a task
            in different categories are on the same side.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the stratified split.

    Returns:
        `Dataset` with the columns `prompt` (the messages of the first user turn), `id` and `category`. Each message of
        `prompt` also carries the task's `id`: two tasks open with the same words, and a stock `GRPOTrainer` hands a
        rollout function nothing but prompts to tell tasks apart.
    """
    from datasets import Dataset

    names = category_names(category)
    numbers = split_numbers(split, split_scheme, seed)
    rows = []
    for name in names:
        entries = list(load_entries(name).values())
        for entry in (entries[number] for number in numbers):
            prompt = [{**message, "id": entry["id"]} for message in entry["question"][0]]
            rows.append({"prompt": prompt, "id": entry["id"], "category": name})
    return Dataset.from_list(rows)


def ground_truth_messages(
    id: str, environment: BfclEnvironment | None = None, *, one_call_a_message: bool = False, closing: str = "Done."
) -> list[dict[str, Any]]:
    """
    A perfect conversation: the ground truth played through the environment. Material for a supervised warm-up.

    Args:
        id (`str`):
            Id of the task.
        environment ([`BfclEnvironment`], *optional*):
            Environment to play in, for its options (`max_user_turns`); limits of messages and steps do not count. The
            tools that go with the conversation are `environment.reset(id=id).tools`.
        one_call_a_message (`bool`, *optional*, defaults to `False`):
            Write one assistant message for each call, instead of one with all the calls of a user turn.
        closing (`str`, *optional*, defaults to `"Done."`):
            The assistant's answer at the end of a user turn.

    Returns:
        `list[dict]`: chat messages of the roles user, assistant (with `tool_calls`) and tool.
    """
    environment = copy.copy(environment or BfclEnvironment())
    environment.max_messages = environment.max_steps_per_turn = None
    messages = list(environment.reset(id=id).messages)
    done = False
    while not done:
        calls = environment.ground_truth_calls()
        for batch in [[call] for call in calls] if one_call_a_message else [calls] if calls else []:
            messages.append({"role": "assistant", "content": "", "tool_calls": batch})
            messages += environment.step(messages[-1]).messages
        messages.append({"role": "assistant", "content": closing})
        result = environment.step(messages[-1])
        messages += result.messages
        done = result.terminated
    if not result.info["success"]:
        raise RuntimeError(f"The ground truth of {id} does not pass the checks: {result.info['failure']}.")
    return messages
