"""What [`SeeUPOTrainer`] makes of what it is given: what plays the episodes, rewards, arguments, the dataset."""

import inspect
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from itertools import count
from typing import Any

from datasets import Dataset, IterableDataset
from torch import nn
from torch.optim import Optimizer
from transformers import EarlyStoppingCallback
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
from trl.data_utils import is_conversational

from .envs.tools import content_of, text_content_of
from .rollout import MultiTurnRollout, environment_reward
from .rollout.checks import checked_rollout
from .rollout.observations import mended, plain_message
from .rollout.output import REPORTED
from .rollout.settings import DefaultTurns
from .rollout.trl_environments import ToolRollout, rollout_for
from .scoring.deterministic import noise_rates
from .seeupo_config import SeeUPOConfig, steps_in_backward


logger = logging.getLogger(__name__)

_BRINGS_ITS_OWN_TOOLS = (
    "A `MultiTurnEnvironment` is driven by `MultiTurnRollout` and brings its own tools (in `Observation.tools`): pass "
    "it without `rollout_func` and `tools`."
)


@dataclass(frozen=True)
class Rollout:
    """
    What plays the episodes of a run.

    Args:
        rollout_func (`Callable`, *optional*), environment_factory (`Callable` or `dict`, *optional*):
            What TRL's trainer is constructed with.
        tool_rollout ([`~seeupo_trl.rollout.trl_environments.ToolRollout`], *optional*):
            What plays TRL environments, in place of TRL's own loop.
        brings_reward (`bool`, *optional*, defaults to `False`):
            Whether the episodes have a reward of their environment, for [`~seeupo_trl.environment_reward`].
        close (`Callable`, *optional*):
            Closes the environments that were made for the trainer.
    """

    rollout_func: Callable | None = None
    environment_factory: Callable | dict[str, Callable] | None = None
    tool_rollout: ToolRollout | None = None
    brings_reward: bool = False
    close: Callable[[], None] = lambda: None

    @property
    def plays_ahead(self) -> MultiTurnRollout | ToolRollout | None:
        """What can play a batch ahead: it plays environments, and is no subclass with a way of its own."""
        rollout = self.rollout_func.args[0] if self.brings_reward else self.tool_rollout
        ways = MultiTurnRollout.__call__, ToolRollout.__call__
        return rollout if type(rollout).__call__ in ways else None


def choose_rollout(
    environment_factory: Callable | dict[str, Callable] | None,
    rollout_func: Callable | None,
    tools: list[Callable] | None,
) -> Rollout:
    """
    What plays the episodes, of what the trainer was given.

    Args:
        environment_factory (`Callable` or `dict[str, Callable]`, *optional*), rollout_func (`Callable`, *optional*):
            Arguments of [`SeeUPOTrainer`].
        tools (`list[Callable]`, *optional*):
            The same.

    Raises:
        `ValueError`:
            Where a [`MultiTurnEnvironment`] comes with a rollout function or tools.
    """
    rollout = None if environment_factory is None else rollout_for(environment_factory, tools or [])
    if isinstance(rollout, MultiTurnRollout):
        if rollout_func is not None or tools:
            rollout.close()
            raise ValueError(_BRINGS_ITS_OWN_TOOLS)
        return Rollout(partial(checked_rollout, rollout), brings_reward=True, close=rollout.close)
    if rollout_func is not None:
        brings_reward = isinstance(rollout_func, MultiTurnRollout)
        return Rollout(partial(checked_rollout, rollout_func), environment_factory, brings_reward=brings_reward)
    if rollout is not None:
        factory = rollout.factory_for_trl
        return Rollout(environment_factory=factory, tool_rollout=rollout, close=rollout.close)
    return Rollout()


def readable_tool(tool: Callable, reads_images: Callable[[], bool]) -> Callable:
    """
    A tool for TRL's own loop, whose results any policy can read as those of an environment's tools: a list is JSON,
    unless it is a content in parts, and then if there are images that the policy cannot see; all text can be encoded;
    and a result without text is an error of the call and not the end of the run.

    Args:
        tool (`Callable`):
            A function or a coroutine function. A callable object is left as it is.
        reads_images (`Callable[[], bool]`):
            Whether the policy reads images, too, asked when the tool was called.
    """
    if not inspect.isroutine(tool):
        return tool

    def readable(result: Any) -> str | list:
        return mended(content_of(result) if reads_images() else text_content_of(result))

    @wraps(tool)
    def call(*args, **kwargs):
        return readable(tool(*args, **kwargs))

    @wraps(tool)
    async def call_later(*args, **kwargs):
        return readable(await tool(*args, **kwargs))

    return call_later if inspect.iscoroutinefunction(tool) else call


def arguments_for_trl(args: SeeUPOConfig, uses_tools: bool) -> SeeUPOConfig:
    """
    The arguments with which TRL's trainer runs underneath, see [`SeeUPOConfig.for_one_step_per_iteration`].

    Args:
        args ([`SeeUPOConfig`]):
            What the user gave; left as it is.
        uses_tools (`bool`):
            Whether the policy calls tools, whose rounds a given `max_turns` limits where TRL's own option does not.
    """
    trainer_args = args.for_one_step_per_iteration()
    limits_tools = args.max_turns is not None and not isinstance(args.max_turns, DefaultTurns)
    if uses_tools and args.max_tool_calling_iterations is None and limits_tools:
        trainer_args.max_tool_calling_iterations = args.max_turns - 1
    return trainer_args


def with_environment_reward(reward_funcs: Any, args: SeeUPOConfig, is_rollout_func: bool = False) -> list:
    """
    Reward functions with the environment's own reward among them: the last one, at weight 1 where none is given.

    Args:
        reward_funcs (`Any`), args ([`SeeUPOConfig`]):
            Arguments of the trainer; `reward_weights` of `args` is completed.
        is_rollout_func (`bool`, *optional*, defaults to `False`):
            Whether the environment is that of a `rollout_func`, whose reward TRL's trainer would not add: that is
            worth a warning.

    Raises:
        `ValueError`:
            When there are more or fewer weights than rewards.
    """
    reward_funcs = [] if reward_funcs is None else reward_funcs
    reward_funcs = list(reward_funcs) if isinstance(reward_funcs, list) else [reward_funcs]
    if environment_reward not in reward_funcs:
        if reward_funcs and is_rollout_func:
            logger.warning(
                "`reward_funcs` does not have `environment_reward`, so the reward of MultiTurnRollout's environment "
                "is added as the last one (GRPOTrainer would leave it out). Add `seeupo_trl.environment_reward` to "
                "them if you want it, with the weight 0 in `reward_weights` if not."
            )
        reward_funcs.append(environment_reward)
        weights = args.reward_weights
        if weights is not None and len(weights) not in (len(reward_funcs) - 1, len(reward_funcs)):
            raise ValueError(
                f"`reward_weights` has {len(weights)} weights for {len(reward_funcs) - 1} reward functions and the "
                "environment's own reward, which comes last. Give one for each reward function, and then the "
                "environment's is 1, or one more for it."
            )
        if weights is not None and len(weights) < len(reward_funcs):
            args.reward_weights = [*weights, 1.0]
    return reward_funcs


def with_environment_processor(processing_classes: Any, reward_funcs: list) -> Any:
    """
    Tokenizers of reward models, one for each reward function as TRL takes them, where the environment's reward was
    added: it needs none.
    """
    is_list = isinstance(processing_classes, list)
    given = processing_classes if is_list else [processing_classes]
    if processing_classes is None or len(given) != len(reward_funcs) - 1 or reward_funcs[-1] is not environment_reward:
        return processing_classes
    return [*given, None]


def distinct_names(names: list[str]) -> list[str]:
    """Names of reward functions, of which those that come again get a number: metrics and files go by name."""
    distinct = []
    for name in names:
        numbered = (name if number == 1 else f"{name}_{number}" for number in count(1))
        distinct.append(next(candidate for candidate in numbered if candidate not in distinct))
    renamed = [new for new, name in zip(distinct, names, strict=True) if new != name]
    if renamed:
        warnings.warn(
            f"Several reward functions have the same name; in metrics and files they are called {', '.join(distinct)} "
            "(GRPOTrainer logs the mean of both under one name). Give each a `__name__` of its own.",
            stacklevel=3,
        )
    return distinct


def placeholder_dataset(args: SeeUPOConfig) -> Dataset:
    """As many empty prompts as an iteration takes, for environments that bring their own tasks."""
    if args.max_steps <= 0:
        raise ValueError(
            "Without a `train_dataset` (the environment brings the tasks), `max_steps` must be set to a positive "
            f"number of iterations; got {args.max_steps}."
        )
    rows = args.generation_batch_size // args.num_generations
    if args.rollouts_ahead:  # only a batch of the same epoch is played ahead
        rows *= args.max_steps
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": ""}]] * rows})


def check_dataset(dataset: Any, batch_size: int, group_size: int) -> None:
    """Refuse a dataset that has fewer rows than an iteration takes: a batch of completions in groups."""
    needed = batch_size // group_size
    if isinstance(dataset, Dataset) and len(dataset) < needed:
        raise ValueError(
            f"The training dataset has {len(dataset)} rows, but one iteration takes {needed} prompts (a generation "
            f"batch of {batch_size} completions in groups of {group_size}). Give more rows, "
            "or lower `per_device_train_batch_size`, `gradient_accumulation_steps` or `steps_per_generation`."
        )


def check_columns(*datasets: Any) -> None:
    """
    Refuse columns that have the names of what environments report to reward functions, which would take their place.

    Args:
        datasets (`Dataset`, `IterableDataset`, `list[dict]` or `dict`, *optional*):
            Training and evaluation datasets, or rows. The columns of an `IterableDataset` may be unknown, and those of
            other classes are: their rows are checked when they are played.
    """
    for dataset in datasets:
        if isinstance(dataset, dict):
            check_columns(*dataset.values())
            continue
        names: set[str] = set()
        if isinstance(dataset, (Dataset, IterableDataset)):
            names.update(dataset.column_names or ())
        elif isinstance(dataset, list):
            names.update(*dataset)
        taken = [name for name in REPORTED if name in names]
        if taken:
            raise ValueError(
                f"The dataset has a column `{taken[0]}`; with environments, reward functions get what became of the "
                "episode under that name. Rename the column (`dataset.rename_column`)."
            )


def check_reward_models(reward_funcs: list[Any], names: list[str], prompts: list[Any]) -> None:
    """Refuse a reward model where prompts are texts and episodes messages: TRL writes both as one conversation."""
    models = [name for name, func in zip(names, reward_funcs, strict=True) if isinstance(func, nn.Module)]
    if models and not is_conversational({"prompt": prompts[0]}):
        raise ValueError(
            f"The reward model '{models[0]}' reads conversations, of the prompt and the messages of an episode, and "
            "the dataset's prompts are texts. Make them messages: `[{'role': 'user', 'content': text}]`."
        )


def check_rollouts_ahead(args: SeeUPOConfig, rollout: Rollout, dataset: Any) -> None:
    """Refuse to play a batch ahead that cannot be, or where there is never a next one to play."""
    if not args.rollouts_ahead:
        return
    if rollout.plays_ahead is None:
        raise ValueError(
            "`rollouts_ahead=1` works with environments (`environment_factory`, `MultiTurnRollout`), not with single "
            "turns, tools alone or a rollout function of your own. Leave it at 0."
        )
    batches = len(dataset) * args.num_generations // args.generation_batch_size if isinstance(dataset, Dataset) else 2
    if batches < 2:
        raise ValueError(
            "`rollouts_ahead=1` plays the next batch of the same epoch, and the training dataset has rows for one "
            "batch only. Give more rows (`concatenate_datasets([dataset] * 100)`)."
        )


def check_limits(args: SeeUPOConfig) -> None:
    """
    Refuse a limit that the loop of TRL environments does not have.

    Args:
        args ([`SeeUPOConfig`]):
            Configuration of the trainer.

    Raises:
        `ValueError`:
            When `max_episode_tokens` is set.
    """
    if args.max_episode_tokens is not None:
        raise ValueError(
            f"`max_episode_tokens={args.max_episode_tokens}` has no effect on TRL environments, whose episodes may "
            "use `max_completion_length` tokens in all. Set that instead."
        )


def check_optimizer(optimizer: Optimizer | None) -> None:
    """Refuse an optimizer of the user's own that steps each layer during the backward pass."""
    name = type(optimizer).__name__
    if isinstance(optimizer, LayerWiseDummyOptimizer) or type(optimizer).__module__.startswith("lomo_optim"):
        raise ValueError(steps_in_backward(f"The optimizer `{name}`"))


def check_best_metric(args: SeeUPOConfig, eval_dataset: Any, callbacks: list[Any], own_evaluation: bool) -> None:
    """
    Refuse to judge models by a loss that is the same whatever they do: the first one would be the best of all.

    Args:
        args ([`SeeUPOConfig`]), eval_dataset (`Any`), callbacks (`list`):
            Arguments of the trainer.
        own_evaluation (`bool`):
            Whether the trainer is of a subclass that evaluates in its own way, and may have a loss of its own: a
            warning is enough.

    Raises:
        `ValueError`:
            Where a run evaluates, and that loss chooses a model, sets the learning rate or ends the run.
    """
    names = eval_dataset if isinstance(eval_dataset, dict) else ()
    if str(args.metric_for_best_model).removeprefix("eval_") not in ("loss", *(f"{name}_loss" for name in names)):
        return
    follows = args.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
    stops = any(isinstance(callback, EarlyStoppingCallback) for callback in callbacks)
    is_read = args.load_best_model_at_end or args.save_strategy == SaveStrategy.BEST or follows or stops
    if args.eval_strategy == IntervalStrategy.NO or not is_read:
        return
    message = (
        f"`metric_for_best_model` is {args.metric_for_best_model!r} (the loss is the default where the best model is "
        "kept or the learning rate follows a metric). The loss of an evaluation says nothing here: it is 0 whatever "
        "the policy does, or `beta` times the KL. Give another metric when the configuration is made: "
        '`metric_for_best_model="eval_reward"`'
        + (', with `lr_scheduler_kwargs={"mode": "max"}` because more of it is better.' if follows else ".")
    )
    if not own_evaluation:
        raise ValueError(message)
    warnings.warn(message, stacklevel=3)


def check_noise(args: SeeUPOConfig) -> None:
    """Warn where noise is added in training that the sampled tokens have not seen."""
    if args.neftune_noise_alpha is not None:
        warnings.warn(
            f"`neftune_noise_alpha={args.neftune_noise_alpha}` draws new noise in every forward pass, so ratios "
            "differ from 1 before anything is updated, and many leave the clipping range. Leave it unset.",
            stacklevel=3,
        )


def check_dropout(model: nn.Module) -> None:
    """Warn where a model leaves out other activations in every forward pass of the update."""
    for path, module in model.named_modules():
        for name, rate in noise_rates(module).items():
            warnings.warn(
                f"The model has dropout in training (`{path}.{name}` is {rate}, perhaps others), drawn anew in every "
                "forward pass: ratios of all turns but the first one updated, and turn weights, differ from 1 by "
                "chance, and many leave the clipping range. Set the rates to 0: `lora_dropout=0.0` for an adapter, "
                "`disable_dropout=True` for layers, fields such as `attention_dropout` in the model's configuration.",
                stacklevel=3,
            )
            return


def check_resampling(args: SeeUPOConfig, is_vlm: bool, dataset: Any) -> None:
    """
    Refuse to play further tasks of a stream, and with a model that sees: what becomes of images is fixed when a batch
    is made.
    """
    if args.zero_variance != "resample":
        return
    if not isinstance(dataset, Dataset):
        raise ValueError(
            "`zero_variance='resample'` draws further tasks from anywhere in the training dataset, which must be a "
            f"`datasets.Dataset`; got {type(dataset).__name__}."
        )
    if is_vlm:
        raise ValueError("`zero_variance='resample'` does not work with models that take images; leave it at 'keep'.")


def with_plain_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """A dataset row whose prompt has no keys that Arrow filled in: it gives all messages of a column the same ones."""
    prompt = row.get("prompt")
    if not isinstance(prompt, list):
        return row
    return {**row, "prompt": [plain_message(m) if isinstance(m, dict) else m for m in prompt]}
