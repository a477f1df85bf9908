"""
What of [`~trl.GRPOTrainer`] a script may override or change, decided name by name (written against trl 1.15 and 1.16).

A script either does here what it did there, or stops with a sentence that says why. `tests/trainer/test_extending.py`
fails when a new TRL adds a method or an attribute that nobody has decided on.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import chain
from typing import Any

from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer

from .rollout.episode import shorten
from .rollout.settings import values_of
from .seeupo_config import LOSS_TYPES, SeeUPOConfig
from .update.loss import LossSettings


_SURROGATE_HOOK = "`turn_surrogate(ratios, weights, actions, settings)` returns what is maximised of each action"

# Methods that the update never calls, with what to override in their place.
REFUSED_METHODS = {
    "_compute_loss": f"The update makes its loss turn by turn. Override `turn_surrogate`: {_SURROGATE_HOOK}.",
    "compute_loss": f"The update makes its loss turn by turn. Override `turn_surrogate`: {_SURROGATE_HOOK}.",
    "_get_per_token_logps_and_entropies": (
        "The update scores turns on trees of tokens. To change the loss of their log-probabilities, override "
        f"`turn_surrogate`: {_SURROGATE_HOOK}, and `actions.new` holds the log-probabilities of its tokens."
    ),
    "get_high_entropy_mask": "A surrogate of whole turns has no mask of tokens.",
    "get_off_policy_mask": f"Override `turn_surrogate`: {_SURROGATE_HOOK}; return 0 for an action to leave out.",
    "get_gamma_weights": f"Override `turn_surrogate`: {_SURROGATE_HOOK}.",
}

# Methods that only TRL's own loop over tool calls uses. Here it does not play environments of `environment_factory`.
TOOL_LOOP_METHODS = dict.fromkeys(
    ("_tokenize_prompts", "_get_tool_suffix_ids", "_tool_call_loop"),
    "The environments of `environment_factory` are played by SeeUPO's own rollout. Pass `tools=` without an "
    "`environment_factory`, or a `rollout_func`, to play episodes in another way.",
)

# Methods that SeeUPOTrainer has in place of these classes' own, which are not called.
REPLACED_METHODS = {
    GRPOTrainer: ("training_step", "_prepare_inputs", "_get_train_sampler"),
    Trainer: ("training_step",),
}

# Methods that are called as in GRPO.
CALLED_METHODS = {
    "_set_signature_columns_if_needed",
    "get_train_dataloader",
    "_get_train_sampler",
    "_get_eval_sampler",
    "get_eval_dataloader",
    "training_step",
    "_prepare_inputs",
    "_log_completion_extra",
    "_log_metric",
    "_calculate_rewards",
    "_generate_single_turn",
    "_generate",
    "_generate_and_score_completions",
    "prediction_step",
    "log",
    "_save_checkpoint",
    "_load_optimizer_and_scheduler",
}

# Attributes of the loss and of the batch that are read anew in every iteration, so that a callback may change them.
READ_ATTRIBUTES = {
    "beta",
    "epsilon_low",
    "epsilon_high",
    "entropy_coef",
    "loss_type",
    "multi_objective_aggregation",
    "num_generations_eval",
    "off_policy_mask_threshold",
    "reward_weights",
    "router_aux_loss_coef",
    "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min",
    "vllm_importance_sampling_correction",
    "vllm_importance_sampling_mode",
}

# Attributes that are read when the trainer is made: changing one in a run raises.
FIXED_ATTRIBUTES = {
    "aux_loss_enabled",
    "importance_sampling_level",
    "max_completion_length",
    "num_iterations",
    "pad_to_multiple_of",
    "ref_model",
    "rollout_func",
    "scale_rewards",
    "temperature",
    "top_entropy_quantile",
    "use_adaptive_entropy",
}

# Attributes that order the prompts, which is done when training begins: changing one in a run raises.
ORDER_ATTRIBUTES = {
    "num_generations",
    "shuffle_dataset",
}

# Fields of `trainer.args` that are read when the trainer is made: changing one in a run raises. All others that SeeUPO
# adds are read in every iteration; those that TRL copies into attributes (`beta`, ...) are changed there.
FIXED_ARGUMENTS = {
    "cast_lm_head_to_fp32",
    "gradient_accumulation_steps",
    "max_tokens_per_microbatch",
    "num_iterations",
    "packing",
    "rollouts_ahead",
    "save_trajectories",
    "scale_rewards",
    "steps_per_generation",
    "zero_variance",
}

# Fields that only scripts read, never a trainer.
SCRIPT_ARGUMENTS = {"do_eval", "do_predict", "do_train", "resume_from_checkpoint"}

# Attributes of generation, tools, rewards and logs, and TRL's own state: used by TRL's code alone, as in GRPO.
TRL_ATTRIBUTES = {
    "chat_template",
    "chat_template_kwargs",
    "continuous_batching_config",
    "environment_factories",
    "environments",
    "eos_token_ids",
    "generation_config",
    "generation_kwargs",
    "log_completions",
    "log_multimodal",
    "log_unique_prompts",
    "mask_truncated_completions",
    "max_tool_calling_iterations",
    "min_p",
    "num_completions_to_print",
    "repetition_penalty",
    "reward_func_names",
    "reward_funcs",
    "reward_processing_classes",
    "tools",
    "top_k",
    "top_p",
    "use_transformers_continuous_batching",
    "use_vllm",
    "vllm_gpu_memory_utilization",
    "vllm_mode",
    "vllm_tensor_parallel_size",
}


OwnMethods = dict[type, dict[str, Any]]


def own_methods(base: type) -> OwnMethods:
    """
    The methods that [`check_overrides`] may refuse, of a class and each of its bases as they are now. Those that were
    put into a class before are left out.
    """
    names = {*REFUSED_METHODS, *TOOL_LOOP_METHODS, *chain(*REPLACED_METHODS.values())}
    return {
        owner: {name: method for name, method in vars(owner).items() if name in names and _is_own(method, owner)}
        for owner in base.__mro__
    }


def _is_own(method: Any, owner: type) -> bool:
    """
    Whether a method is of its class's library, with all that is wrapped around it. `functools.wraps` copies the
    `__module__`; in which module a function was written, its globals say.
    """
    libraries = {owner.__module__.partition(".")[0], "trl", "transformers", "accelerate", "torch"}
    while method is not None:
        function = getattr(method, "__func__", method)  # of a static or a class method
        written_in = getattr(function, "__globals__", {}).get("__name__", "")
        if written_in.partition(".")[0] not in libraries:
            return False
        method = getattr(method, "__wrapped__", None)
    return True


def check_overrides(trainer: GRPOTrainer, own: OwnMethods, plays_tools: bool) -> None:
    """
    Refuse methods that would never be called: those that a subclass overrides, and those that were put into a trainer
    or into one of its classes. Wrappers that only time a call are among them.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            The trainer.
        own (`dict[type, dict[str, Any]]`):
            What [`own_methods`] returned when [`SeeUPOTrainer`] was defined.
        plays_tools (`bool`):
            Whether SeeUPO's own rollout plays TRL environments, in place of TRL's loop.

    Raises:
        `TypeError`:
            With the name of the method and what to do instead.
    """
    refused = REFUSED_METHODS | (TOOL_LOOP_METHODS if plays_tools else {})
    for name, advice in refused.items():
        change = _change_of(name, trainer, own)
        if change is not None:
            raise TypeError(f"{change}, which SeeUPOTrainer does not call in training. {advice}")
    classes = type(trainer).__mro__
    # a mixin that stands behind Trainer is not called in GRPO either
    for owner in classes[classes.index(next(iter(own))) : classes.index(Trainer) + 1]:
        stands_for = owner if owner in own else GRPOTrainer if issubclass(owner, GRPOTrainer) else Trainer
        names = REPLACED_METHODS.get(stands_for, ())
        for name in names:
            if vars(owner).get(name) is not own.get(owner, {}).get(name):
                raise TypeError(
                    f"`{name}` of {owner.__name__} is not called by SeeUPOTrainer, which has its own. Put yours into "
                    f"SeeUPOTrainer, or override `{name}` in a subclass of it or in a mixin that stands before it."
                )


def _change_of(name: str, trainer: GRPOTrainer, own: OwnMethods) -> str | None:
    """What a script put before TRL's method of that name. What stands behind it is not called in GRPO either."""
    if name in vars(trainer):
        return f"`{name}` of this trainer was replaced"
    for owner in type(trainer).__mro__:
        if name not in vars(owner):
            continue
        if owner not in own:
            return f"{owner.__name__} overrides `{name}`"
        if vars(owner)[name] is not own[owner].get(name):
            return f"`{name}` of {owner.__name__} was replaced"
        if issubclass(GRPOTrainer, owner):
            return None
    return None


@contextmanager
def no_advice_on_ratio_level() -> Iterator[None]:
    """
    While a [`~trl.GRPOTrainer`] is constructed: keep back its warnings that with some values of `loss_type` another
    `importance_sampling_level`, or another `loss_type` with this one, is meant. They speak of TRL's own losses.
    """

    def is_of_another_matter(record: logging.LogRecord) -> bool:
        return "`importance_sampling_level" not in record.getMessage()

    logger = logging.getLogger(GRPOTrainer.__module__)
    logger.addFilter(is_of_another_matter)
    try:
        yield
    finally:
        logger.removeFilter(is_of_another_matter)


class FixedValues:
    """
    Values that a run may not change, because nothing would read them again.

    Args:
        read (`Callable[[], dict[str, Any]]`):
            Returns the present values by the names under which they are set.
        since (`str`), advice (`str`):
            What has read them, and where to set them.
    """

    def __init__(self, read: Callable[[], dict[str, Any]], since: str, advice: str):
        self._read = read
        self._since = since
        self._advice = advice
        self._values = read()

    def check(self) -> None:
        """
        Raises:
            `ValueError`:
                Where one has changed since they were read.
        """
        for name, value in self._read().items():
            before = self._values[name]
            if value is not before and not _equal(value, before):
                change = f"from {shorten(repr(before))} to {shorten(repr(value))}"
                raise ValueError(
                    f"`{name}` was changed {change} after {self._since}, which is too late: it is read only once. "
                    f"{self._advice}"
                )


def fixed_values(trainer: GRPOTrainer, config: GRPOConfig, given: GRPOConfig) -> FixedValues:
    """
    The values of a [`SeeUPOTrainer`] that it reads only once.

    Args:
        trainer ([`SeeUPOTrainer`]):
            Some of its attributes, and of its arguments.
        config ([`~trl.GRPOConfig`]), given ([`~trl.GRPOConfig`]):
            `trainer.config`, and the configuration that the user has. The trainer works with copies of both.
    """
    # fields of the user's own are the script's to read and to change
    names = [f.name for f in fields(SeeUPOConfig) if f.name not in SCRIPT_ARGUMENTS]

    def named(copied: GRPOConfig, called: str) -> dict[str, Any]:
        values = values_of(copied)
        return {f"{called}.{name}": values.get(name) for name in names}

    def read() -> dict[str, Any]:
        attributes = {f"trainer.{name}": getattr(trainer, name) for name in FIXED_ATTRIBUTES if hasattr(trainer, name)}
        arguments = {f"trainer.args.{name}": getattr(trainer.args, name) for name in FIXED_ARGUMENTS}
        return attributes | arguments | named(config, "trainer.config") | named(given, "args")

    return FixedValues(read, "the trainer was made", "Give it in the configuration, before the trainer is made.")


def fixed_order(trainer: GRPOTrainer) -> FixedValues:
    """The values of a trainer by which the prompts of a run are ordered, which is done when training begins."""

    def read() -> dict[str, Any]:
        return {f"trainer.{name}": getattr(trainer, name) for name in ORDER_ATTRIBUTES}

    return FixedValues(read, "training began", "Set it before `train()`.")


def _equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except Exception:
        return False


def loss_settings(trainer: GRPOTrainer) -> LossSettings:
    """The numbers in the loss as a [`SeeUPOTrainer`] has them now: in its attributes where GRPO has them there."""
    if trainer.loss_type not in LOSS_TYPES:
        raise ValueError(
            f"`trainer.loss_type` was changed to {trainer.loss_type!r}, which is not one of "
            f"{', '.join(map(repr, LOSS_TYPES))}."
        )
    bounds = trainer.vllm_importance_sampling_clip_min, trainer.vllm_importance_sampling_clip_max
    samples_apart = trainer.use_vllm or trainer.args.rollouts_ahead
    corrects = samples_apart and trainer.vllm_importance_sampling_correction
    return replace(
        LossSettings.of(trainer.args),
        epsilon_low=trainer.epsilon_low,
        epsilon_high=trainer.epsilon_high,
        beta=trainer.beta,
        loss_type=trainer.loss_type,
        off_policy_mask_threshold=trainer.off_policy_mask_threshold,
        sampler_correction=(trainer.vllm_importance_sampling_mode, *bounds) if corrects else None,
    )
