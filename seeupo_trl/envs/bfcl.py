"""
BFCL v4 multi-turn (the Berkeley Function Calling Leaderboard) as an environment.

A task is a conversation of several *user turns*. In each one the policy calls functions of simulated services, step by
step, until it answers without a call; then the next user turn comes. After every user turn the official checks compare
the services' state and the results of the calls with those of the ground truth.

The protocol is the official one of function-calling models: no system prompt but the tools, 20 steps a user turn. It
departs from it where the constructor's options say so, and in two details:
- a call whose arguments are not a JSON object is answered with an error, instead of ending the user turn;
- an episode in which a user turn needs more than 20 steps fails, also when it is the last user turn.

`bfcl-eval` must be installed without its dependencies: `pip install --no-deps bfcl-eval==2026.3.23` and
`pip install mpmath==1.3.0`.
"""

import json
import random
from typing import TYPE_CHECKING, Any, Literal

from .base import MultiTurnEnvironment, Observation, StepResult
from .bfcl_backend import Services, check_user_turn, load_entries, load_function_docs, to_tool_schema


if TYPE_CHECKING:
    from datasets import Dataset


CATEGORIES = ("multi_turn_base", "multi_turn_miss_param", "multi_turn_long_context")
SPLITS = {"train": slice(0, 100), "test": slice(100, 200), "all": slice(0, 200)}


class BfclEnvironment(MultiTurnEnvironment):
    """
    One BFCL v4 multi-turn conversation, with the official checks as the reward.

    The opening messages are the first user turn's; the tools are the functions of the services the task involves. When
    the episode ends, or at any step before, the trajectory's `info` has `success` (`bool`, all user turns passed),
    `turns_passed` (`list[bool]`, one for each user turn that has ended) and `failure` (`str` or `None`, what the
    checks said at the first user turn that failed).

    Args:
        reward (`str`, *optional*, defaults to `"success"`):
            `"success"`: `success_reward` if every user turn passes, else 0, the official score. `"fraction"`:
            `success_reward` times the fraction of user turns that pass, each paid when its user turn ends.
        success_reward (`float`, *optional*, defaults to `1.0`):
            Reward of a solved task. The paper's code uses 1.5.
        tools (`str`, *optional*, defaults to `"full"`):
            How much of the functions' documents the policy is shown. `"full"`: everything, as the official protocol.
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
        max_steps_per_turn (`int`, *optional*, defaults to `20`):
            Most assistant messages with calls in a user turn; one more fails the task. 20 is official.
    """

    def __init__(
        self,
        *,
        reward: Literal["success", "fraction"] = "success",
        success_reward: float = 1.0,
        tools: Literal["full", "trimmed", "brief"] = "full",
        tool_list: Literal["classes", "needed"] = "classes",
        distractors: int = 0,
        max_user_turns: int | None = None,
        max_steps_per_turn: int = 20,
    ):
        _check_option("reward", reward, ("success", "fraction"))
        _check_option("tools", tools, ("full", "trimmed", "brief"))
        _check_option("tool_list", tool_list, ("classes", "needed"))
        if max_user_turns is not None and max_user_turns < 1:
            raise ValueError(f"max_user_turns is {max_user_turns}; give at least 1, or None for all user turns.")
        self.reward = reward
        self.success_reward = success_reward
        self.tools = tools
        self.tool_list = tool_list
        self.distractors = distractors
        self.max_user_turns = max_user_turns
        self.max_steps_per_turn = max_steps_per_turn

    def reset(self, id: str, **task: Any) -> Observation:
        """
        Begin the conversation of a task.

        Args:
            id (`str`):
                Id of the task, such as `"multi_turn_base_0"`.
            task (`Any`):
                Other columns of the dataset; not used.
        """
        category = id.rsplit("_", 1)[0]
        _check_option("The category of the task id", category, CATEGORIES)
        self._entry = load_entries(category)[id]
        self._user_turns = self._entry["question"][: self.max_user_turns]
        self._model = Services(self._entry)
        self._truth = Services(self._entry)
        self._model_results: list[str] = []
        self._turns_passed: list[bool] = []
        self._failure: str | None = None
        self._calls = self._steps = 0
        return Observation(messages=self._user_messages(), tools=self._tool_schemas())

    def step(self, message: dict[str, Any]) -> StepResult:
        """
        Run the calls of an assistant message, or end the user turn if there are none.

        Args:
            message (`dict`):
                The assistant message.
        """
        calls = message.get("tool_calls")
        if not calls:
            return self._end_user_turn()
        self._steps += 1
        if self._steps > self.max_steps_per_turn:
            self._failure = self._failure or f"More than {self.max_steps_per_turn} steps in turn {self._turn}"
            return StepResult([], truncated=True, info=self._info())
        return StepResult([self._run(call) for call in calls], info=self._info())

    @property
    def _turn(self) -> int:
        return len(self._turns_passed)

    def ground_truth_calls(self) -> list[dict[str, Any]]:
        """The ground truth of the current user turn, as `tool_calls` of an assistant message."""
        calls = [self._truth.parse_call(call) for call in self._entry["ground_truth"][self._turn]]
        return [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls]

    def _run(self, call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        name, arguments = function["name"], function["arguments"]
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                pass
        if isinstance(arguments, dict):
            result = self._model.call(name, arguments)
        else:
            result = f"Error during execution: the arguments of {name} must be a JSON object"
        self._calls += 1
        self._model_results.append(result)
        return {"role": "tool", "name": name, "content": result}

    def _end_user_turn(self) -> StepResult:
        calls = [self._truth.parse_call(call) for call in self._entry["ground_truth"][self._turn]]
        truth_results = [self._truth.call(name, arguments) for name, arguments in calls]
        failure = check_user_turn(
            self._model, self._truth, self._model_results, truth_results, self._calls, self._turn
        )
        self._failure = self._failure or failure
        self._turns_passed.append(failure is None)
        self._calls = self._steps = 0

        terminated = self._turn == len(self._user_turns)
        if self.reward == "fraction":
            reward = self.success_reward * (failure is None) / len(self._user_turns)
        else:
            reward = self.success_reward * (terminated and all(self._turns_passed))
        messages = [] if terminated else self._user_messages()
        return StepResult(messages, reward=reward, terminated=terminated, info=self._info())

    def _info(self) -> dict[str, Any]:
        finished = self._turn == len(self._user_turns)
        return {
            "success": finished and all(self._turns_passed),
            "turns_passed": list(self._turns_passed),
            "failure": self._failure,
        }

    def _user_messages(self) -> list[dict[str, Any]]:
        return [dict(message) for message in self._user_turns[self._turn]]

    def _tool_schemas(self) -> list[dict[str, Any]]:
        docs = [doc for name in self._entry["involved_classes"] for doc in load_function_docs(name)]
        if self.tool_list == "needed":
            played = self._entry["ground_truth"][: len(self._user_turns)]
            shown = {self._truth.parse_call(call)[0] for calls in played for call in calls}
            others = sorted({doc["name"] for doc in docs} - shown)
            random.Random(self._entry["id"]).shuffle(others)
            shown.update(others[: self.distractors])
            docs = [doc for doc in docs if doc["name"] in shown]
        return [to_tool_schema(doc, self.tools) for doc in docs]


def _check_option(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}.")


def load_bfcl(category: str = "multi_turn_base", split: Literal["train", "test", "all"] = "train") -> "Dataset":
    """
    The tasks of a BFCL v4 multi-turn category, one row each.

    Args:
        category (`str`, *optional*, defaults to `"multi_turn_base"`):
            `"multi_turn_base"`, `"multi_turn_miss_param"` or `"multi_turn_long_context"`.
        split (`str`, *optional*, defaults to `"train"`):
            `"train"` (tasks 0 to 99) or `"test"` (100 to 199), the split of the paper, or `"all"`. It is a shift of
            domain: files and vehicles in train, trading and travel in test.

    Returns:
        `Dataset` with the columns `prompt` (the messages of the first user turn), `id` and `category`. Each message of
        `prompt` also carries the task's `id`: two tasks open with the same words, and a stock `GRPOTrainer` hands a
        rollout function nothing but prompts to tell tasks apart.
    """
    from datasets import Dataset

    _check_option("category", category, CATEGORIES)
    _check_option("split", split, tuple(SPLITS))
    entries = list(load_entries(category).values())[SPLITS[split]]
    return Dataset.from_list(
        [
            {
                "prompt": [{**message, "id": entry["id"]} for message in entry["question"][0]],
                "id": entry["id"],
                "category": category,
            }
            for entry in entries
        ]
    )


def ground_truth_messages(
    id: str, environment: BfclEnvironment | None = None, *, one_call_a_message: bool = False, closing: str = "Done."
) -> list[dict[str, Any]]:
    """
    A perfect conversation: the ground truth played through the environment. Material for a supervised warm-up.

    Args:
        id (`str`):
            Id of the task.
        environment ([`BfclEnvironment`], *optional*):
            Environment to play in, for its options (`max_user_turns`). The tools that go with the conversation are
            `environment.reset(id=id).tools`.
        one_call_a_message (`bool`, *optional*, defaults to `False`):
            Write one assistant message for each call, instead of one with all the calls of a user turn.
        closing (`str`, *optional*, defaults to `"Done."`):
            The assistant's answer at the end of a user turn.

    Returns:
        `list[dict]`: chat messages of the roles user, assistant (with `tool_calls`) and tool.
    """
    environment = environment or BfclEnvironment()
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
