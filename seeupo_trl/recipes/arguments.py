"""
What each script in `examples/` asks for besides the trainer's and the model's arguments, and which values cannot be.

Nothing here needs torch: `seeupo-trl train bfcl --help` comes at once.
"""

import json
import math
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, get_args, get_type_hints

from ..envs.plain import is_number, is_whole


def _require(arguments: Any, least: float, *names: str) -> None:
    """
    Raise a `ValueError` for an argument that is smaller, not finite, or no number of its field's type; `None` is one
    that is not given.
    """
    hints = get_type_hints(type(arguments))
    for name in names:
        value, counts = getattr(arguments, name), hints[name] is not float
        if value is None and NoneType in get_args(hints[name]):
            continue
        if not (is_whole if counts else is_number)(value):
            raise ValueError(f"--{name} must be a {'whole ' if counts else ''}number; got {value!r}.")
        if not (least <= value and math.isfinite(value)):
            needed = "a finite number" if least == -math.inf else f"at least {least}"
            raise ValueError(f"--{name} must be {needed}; got {value}.")


@dataclass
class BfclArguments:
    """
    Arguments of the task.

    Args:
        category (`str`, *optional*, defaults to `"multi_turn_base"`):
            Category of BFCL v4 multi-turn (`"base"`, `"miss_func"`, `"miss_param"`, `"long_context"`), several of them
            with commas between, or `"all"`.
        split_scheme (`str`, *optional*, defaults to `"paper"`):
            How tasks are split into training and test: `"paper"`, the first and the second half, or `"stratified"` by
            the services involved.
        split_seed (`int`, *optional*, defaults to `0`):
            Seed of the stratified split.
        protocol (`str`, *optional*, defaults to `"official"`):
            Limits of an episode: `"official"`, 20 steps a user turn, or `"paper"`, 10 assistant messages.
        tools (`str`, *optional*, defaults to `"full"`):
            How much of the functions' documents the policy sees: `"raw"`, `"full"`, `"trimmed"` or `"brief"`.
        tool_list (`str`, *optional*, defaults to `"classes"`):
            `"classes"`: all functions of the services involved. `"needed"`: those of the ground truth and
            `distractors` others.
        distractors (`int`, *optional*, defaults to `0`):
            See `tool_list`.
        max_user_turns (`int`, *optional*):
            Play only the first user turns of a task.
        reward (`str`, *optional*, defaults to `"success"`):
            `"success"`, the official score, `"fraction"` of the user turns that pass, or `"calls"`: that, and
            something for single calls that are right.
        success_reward (`float`, *optional*, defaults to `1.0`):
            Reward of a solved task.
        max_task_tokens (`int`, *optional*):
            Leave out tasks whose ground-truth conversation is longer.
        held_out_tasks (`int`, *optional*, defaults to `0`):
            Tasks of the training split that are kept for evaluation, before and after training. 0 evaluates nothing.
        test_tasks (`int`, *optional*):
            Tasks of the test split that are evaluated beside them; by default as many.
        warmup_steps_sft (`int`, *optional*, defaults to `0`):
            Supervised steps on ground-truth conversations of training tasks before reinforcement learning. The
            result is kept in `cache_dir`.
        warmup_learning_rate (`float`, *optional*, defaults to `3e-4`):
            Learning rate of the warm-up.
        trained_layers (`int`, *optional*):
            Train only this many of the model's last layers, in the warm-up and after it: less work and memory on a
            CPU. By default the whole model is trained.
        cache_dir (`str`, *optional*):
            Where converted and warmed-up models are kept. Defaults to `$SEEUPO_TRL_CACHE`, else
            `~/.cache/seeupo_trl`.
    """

    category: str = field(default="multi_turn_base", metadata={"help": "Categories, or 'all'."})
    split_scheme: str = field(default="paper", metadata={"help": "Training and test: 'paper' or 'stratified'."})
    split_seed: int = field(default=0, metadata={"help": "Seed of the stratified split."})
    protocol: str = field(default="official", metadata={"help": "Limits of an episode: 'official' or 'paper'."})
    tools: str = field(default="full", metadata={"help": "Documents shown: 'raw', 'full', 'trimmed' or 'brief'."})
    tool_list: str = field(default="classes", metadata={"help": "Functions shown: 'classes' or 'needed'."})
    distractors: int = field(default=0, metadata={"help": "With tool_list 'needed', how many others to add."})
    max_user_turns: int | None = field(default=None, metadata={"help": "Play only the first user turns."})
    reward: str = field(default="success", metadata={"help": "'success', 'fraction' of user turns, or 'calls', too."})
    success_reward: float = field(default=1.0, metadata={"help": "Reward of a solved task."})
    max_task_tokens: int | None = field(default=None, metadata={"help": "Leave out tasks with longer ground truth."})
    held_out_tasks: int = field(default=0, metadata={"help": "Tasks kept for evaluation before and after."})
    test_tasks: int | None = field(default=None, metadata={"help": "Tasks of the test split evaluated, too."})
    warmup_steps_sft: int = field(default=0, metadata={"help": "Supervised steps before reinforcement learning."})
    warmup_learning_rate: float = field(default=3e-4, metadata={"help": "Learning rate of the warm-up."})
    trained_layers: int | None = field(default=None, metadata={"help": "Train only this many of the last layers."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where converted and warmed-up models are kept."})

    def __post_init__(self):
        _require(self, 0, "distractors", "held_out_tasks", "test_tasks", "warmup_steps_sft", "warmup_learning_rate")
        _require(self, 1, "max_user_turns", "max_task_tokens", "trained_layers")
        _require(self, -math.inf, "success_reward")


@dataclass
class EvaluationArguments:
    """
    Arguments of the evaluation.

    Args:
        categories (`list[str]`, *optional*, defaults to `["multi_turn_base"]`):
            Categories of BFCL v4, see [`~seeupo_trl.envs.bfcl.load_bfcl`].
        split (`str`, *optional*, defaults to `"test"`):
            `"train"`, `"test"` or `"all"`.
        num_tasks (`int`, *optional*):
            Play this many tasks of each category, evenly spread over the split. `None` plays all.
        protocol (`str`, *optional*, defaults to `"official"`):
            Limits of an episode: `"official"`, 20 steps a user turn, or `"paper"`, 10 assistant messages. `max_turns`
            ends an episode, too.
        tools, tool_list, distractors, max_user_turns:
            Departures from the official protocol for small models, see [`~seeupo_trl.envs.bfcl.BfclEnvironment`].
        cache_dir (`str`, *optional*):
            Where the converted model of the demonstration is kept. Defaults to `$SEEUPO_TRL_CACHE`, else
            `~/.cache/seeupo_trl`.
    """

    categories: list[str] = field(
        default_factory=lambda: ["multi_turn_base"], metadata={"help": "Categories of BFCL v4."}
    )
    split: str = field(default="test", metadata={"help": "'train', 'test' or 'all'."})
    num_tasks: int | None = field(default=None, metadata={"help": "Tasks of each category. Unset: all."})
    protocol: str = field(default="official", metadata={"help": "Limits of an episode: 'official' or 'paper'."})
    tools: str = field(default="full", metadata={"help": "Documents shown: 'full', 'trimmed' or 'brief'."})
    tool_list: str = field(default="classes", metadata={"help": "Functions shown: 'classes' or 'needed'."})
    distractors: int = field(default=0, metadata={"help": "With tool_list 'needed', how many others to add."})
    max_user_turns: int | None = field(default=None, metadata={"help": "Play only the first user turns."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where the demonstration's model is kept."})

    def __post_init__(self):
        _require(self, 0, "distractors")
        _require(self, 1, "num_tasks", "max_user_turns")


@dataclass
class AppWorldArguments:
    """
    Arguments of the task.

    Args:
        appworld_python (`str`, *optional*):
            Python interpreter of AppWorld's virtual environment. Defaults to `$SEEUPO_APPWORLD_PYTHON`.
        appworld_root (`str`, *optional*):
            Directory that AppWorld's data was downloaded to. Defaults to `$APPWORLD_ROOT`.
        num_servers (`int`, *optional*, defaults to `32`):
            Most AppWorld servers of each training process. Not less than `max_concurrent_envs`.
        split (`str`, *optional*, defaults to `"train"`):
            Tasks to train on.
        held_out_split (`str`, *optional*, defaults to `"dev"`):
            Tasks to evaluate on.
        held_out_tasks (`int`, *optional*, defaults to `0`):
            How many of those are evaluated, before and after training. 0 evaluates nothing.
        success_reward (`float`, *optional*, defaults to `1.5`):
            Reward of a solved task.
        partial_reward (`float`, *optional*, defaults to `0.5`):
            Factor of the fraction of passed tests in the reward of any other.
        max_observation_chars (`int`, *optional*, defaults to `20000`):
            Most characters of output shown to the model.
        execution_timeout (`int`, *optional*, defaults to `60`):
            Seconds after which the model's code is interrupted.
        keep_outputs (`str`, *optional*):
            Directory where what AppWorld writes about each episode is kept.
    """

    appworld_python: str | None = field(default=None, metadata={"help": "Python of AppWorld's environment."})
    appworld_root: str | None = field(default=None, metadata={"help": "Where AppWorld's data is."})
    num_servers: int = field(default=32, metadata={"help": "Most AppWorld servers of each process."})
    split: str = field(default="train", metadata={"help": "Tasks to train on."})
    held_out_split: str = field(default="dev", metadata={"help": "Tasks to evaluate on."})
    held_out_tasks: int = field(default=0, metadata={"help": "How many of those, before and after training."})
    success_reward: float = field(default=1.5, metadata={"help": "Reward of a solved task."})
    partial_reward: float = field(default=0.5, metadata={"help": "Factor of the passed tests in any other reward."})
    max_observation_chars: int = field(default=20_000, metadata={"help": "Most characters of output shown."})
    execution_timeout: int = field(default=60, metadata={"help": "Seconds until the model's code is interrupted."})
    keep_outputs: str | None = field(default=None, metadata={"help": "Where AppWorld's files of episodes are kept."})

    def __post_init__(self):
        _require(self, 0, "held_out_tasks")
        _require(self, 1, "num_servers", "max_observation_chars", "execution_timeout")
        _require(self, -math.inf, "success_reward", "partial_reward")


@dataclass
class OpenEnvArguments:
    """
    Arguments of the game that is served by OpenEnv.

    Args:
        url (`str`, *optional*):
            URL of a server of the game that is running already. By default one is started, for as long as the training
            takes.
        interface (`str`, *optional*, defaults to `"messages"`):
            How the policy plays: `"messages"`, it writes a number; `"tools"`, it calls a function.
        serve (`int`, *optional*):
            Only serve the game, on this port.
        cache_dir (`str`, *optional*):
            Where the converted model of the demonstration is kept. Defaults to `$SEEUPO_TRL_CACHE`, else
            `~/.cache/seeupo_trl`.
    """

    url: str | None = field(default=None, metadata={"help": "URL of a server that is running already."})
    interface: str = field(
        default="messages", metadata={"help": "How the policy plays.", "choices": ["messages", "tools"]}
    )
    serve: int | None = field(default=None, metadata={"help": "Only serve the game, on this port."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where the demonstration's model is kept."})

    def __post_init__(self):
        if self.interface not in ("messages", "tools"):
            raise ValueError(f"--interface must be 'messages' or 'tools'; got {self.interface!r}.")


@dataclass
class TextArenaArguments:
    """
    Arguments of the game.

    Args:
        game (`str`, *optional*, defaults to `"FrozenLake-v0"`):
            Id of a single-player game, see [`~seeupo_trl.envs.textarena.load_textarena`].
        game_options (`str`, *optional*, defaults to `"{}"`):
            Arguments of the game as JSON, in place of those of its id.
        train_games (`int`, *optional*, defaults to `1000`):
            Seeds from 0 on to train on.
        held_out_tasks (`int`, *optional*, defaults to `0`):
            How many of the seeds after those are evaluated, before and after training. 0 evaluates nothing.
        success_reward (`float`, *optional*, defaults to `1.0`):
            Smallest reward of a game that counts as a success.
        cache_dir (`str`, *optional*):
            Where the converted model of the demonstration is kept. Defaults to `$SEEUPO_TRL_CACHE`, else
            `~/.cache/seeupo_trl`.
    """

    game: str = field(default="FrozenLake-v0", metadata={"help": "Id of a single-player game."})
    game_options: str = field(default="{}", metadata={"help": "Arguments of the game as JSON."})
    train_games: int = field(default=1000, metadata={"help": "Seeds from 0 on to train on."})
    held_out_tasks: int = field(default=0, metadata={"help": "Seeds after those, evaluated before and after."})
    success_reward: float = field(default=1.0, metadata={"help": "Smallest reward that counts as a success."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where the demonstration's model is kept."})

    def __post_init__(self):
        _require(self, 0, "held_out_tasks")
        _require(self, 1, "train_games")
        _require(self, -math.inf, "success_reward")
        try:
            options = json.loads(self.game_options)
        except json.JSONDecodeError as error:
            raise ValueError(f"--game_options is {self.game_options!r}, which is not JSON: {error}.") from error
        if not isinstance(options, dict):
            raise ValueError(f'--game_options must be a JSON object, as {{"size": 4}}; got {self.game_options!r}.')
