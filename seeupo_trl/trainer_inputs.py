"""What [`SeeUPOTrainer`] makes of the reward functions and the dataset that it is given."""

from typing import Any

from datasets import Dataset

from .rollout.multi_turn import environment_reward
from .seeupo_config import SeeUPOConfig


def with_environment_reward(reward_funcs: Any, args: SeeUPOConfig) -> list:
    """Reward functions with the environment's own reward among them, at weight 1 where it was not given."""
    reward_funcs = [] if reward_funcs is None else reward_funcs
    reward_funcs = list(reward_funcs) if isinstance(reward_funcs, list) else [reward_funcs]
    if environment_reward not in reward_funcs:
        reward_funcs.append(environment_reward)
        if args.reward_weights is not None:
            args.reward_weights = [*args.reward_weights, 1.0]
    return reward_funcs


def placeholder_dataset(args: SeeUPOConfig) -> Dataset:
    """As many empty prompts as an iteration takes, for environments that bring their own tasks."""
    if args.max_steps <= 0:
        raise ValueError(
            "Without a `train_dataset` (the environment brings the tasks), `max_steps` must be set to a positive "
            f"number of iterations; got {args.max_steps}."
        )
    rows = args.generation_batch_size // args.num_generations
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": ""}]] * rows})


def check_dataset(dataset: Any, args: SeeUPOConfig) -> None:
    """Refuse a dataset that has fewer rows than an iteration takes."""
    needed = args.generation_batch_size // args.num_generations
    if isinstance(dataset, Dataset) and len(dataset) < needed:
        raise ValueError(
            f"The training dataset has {len(dataset)} rows, but one iteration takes {needed} prompts (a generation "
            f"batch of {args.generation_batch_size} completions in groups of {args.num_generations}). Give more rows, "
            "or lower `per_device_train_batch_size`, `gradient_accumulation_steps` or `steps_per_generation`."
        )
