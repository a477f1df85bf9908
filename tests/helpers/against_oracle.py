"""
The trainer and a naive implementation of Algorithm 1 (see oracle.py), from the same weights on the same rollouts.

Both train with plain SGD; the largest difference between their parameters, relative to the largest distance a
parameter moved, has to stay under `TOLERANCE`.
"""

import copy
from functools import cache

import torch
from datasets import Dataset
from fixed_rollouts import (
    GROUP_SIZE,
    NUM_GROUPS,
    NUM_TRAJECTORIES,
    Episode,
    as_groups,
    outcome_reward,
    ragged_rollouts,
)
from oracle import OracleSettings, seeupo_iteration
from peft import LoraConfig, get_peft_model
from tiny import ON_CPU, load_tiny_model, tiny_tokenizer
from transformers import TrainerCallback

from seeupo_trl import SeeUPOConfig, SeeUPOTrainer, environment_reward
from seeupo_trl.trajectory import Trajectory, Turn
from seeupo_trl.update.steps import assign_minibatches


TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
# Settings that end this far apart cannot be mistaken for one another in float64.
VISIBLE = 1e-3
LEARNING_RATE = 0.002
TEMPERATURE = 0.9
SEED = 42


def load_model(directory: str, dtype=torch.float64, lora: bool = False):
    if not lora:
        return load_tiny_model(directory, dtype)
    model = load_tiny_model(directory)  # in float32, so that the adapter starts from the same values in every dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # PEFT starts it at zero, where half of the adapter gets no gradient
                torch.nn.init.normal_(parameter, std=0.1)
    return model.to(dtype)


class Snapshots(TrainerCallback):
    """Keeps the parameters after every iteration."""

    def __init__(self):
        self.parameters = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.parameters.append({name: p.detach().clone() for name, p in model.named_parameters()})


def train(
    model,
    iterations,
    tmp_path,
    *,
    turns=None,
    step_rewards=None,
    other_rewards=None,
    optimizer=torch.optim.SGD,
    optimizer_kwargs=None,
    lr_lambda=lambda step: 1.0,
    peft_config=None,
    **config,
):
    """
    Train on fixed rollouts through the public interface only, and return the parameters after every iteration.

    Args:
        turns (`list`, *optional*):
            Turns of each trajectory for each iteration, handed over as `trajectories`, not read from the mask.
        step_rewards (`list[list[list[float]]]`, *optional*):
            Rewards after each turn of each trajectory for each iteration, as an environment's.
        other_rewards (`list[list[float | None]]`, *optional*):
            Rewards of a second function for each trajectory for each iteration. It stands before the episodes'.
        peft_config (`PeftConfig`, *optional*):
            Adapter that the trainer creates; the trainer then makes the optimizer as well, from `config`.
    """

    def fixed_rollouts(prompts, trainer):
        step = trainer.state.global_step
        tasks = [step * NUM_GROUPS + i // GROUP_SIZE for i in range(NUM_TRAJECTORIES)]
        assert [prompt[0]["content"] for prompt in prompts] == [f"w{task}" for task in tasks]
        episodes = iterations[step]
        rollouts = {
            "prompt_ids": [episode.prompt_ids for episode in episodes],
            "completion_ids": [episode.completion_ids for episode in episodes],
            "logprobs": None,
            "env_mask": [episode.env_mask for episode in episodes],
            "outcome": [episode.reward for episode in episodes],
        }
        if turns is not None:
            rollouts["trajectories"] = [
                Trajectory([Turn(context, action) for context, action in trajectory]) for trajectory in turns[step]
            ]
        if step_rewards is not None:
            shown = turns[step] if turns is not None else [episode.turns for episode in episodes]
            rollouts["trajectories"] = [
                Trajectory([Turn(*turn, reward=r) for turn, r in zip(played, steps, strict=True)], episode.reward)
                for played, steps, episode in zip(shown, step_rewards[step], episodes, strict=True)
            ]
            rollouts["environment_reward"] = rollouts["outcome"]
        if other_rewards is not None:
            rollouts["other"] = other_rewards[step]
        return rollouts

    def other_reward(completions, other, **kwargs):
        return other

    settings = {
        **ON_CPU,
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": NUM_TRAJECTORIES // 2,
        "num_generations": GROUP_SIZE,
        "max_steps": len(iterations),
        "temperature": TEMPERATURE,
        "max_grad_norm": 0.0,
        "gradient_checkpointing": False,
        "shuffle_dataset": False,
        "seed": SEED,
        "disable_tqdm": True,
        # trl 1.15 loads the reference model in float32 unless it is told
        "model_init_kwargs": {"dtype": next(model.parameters()).dtype},
    }
    optimizers = (None, None)
    if peft_config is None:
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = optimizer(trainable, **(optimizer_kwargs or {"lr": LEARNING_RATE}))
        optimizers = (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda))
    of_episodes = outcome_reward if step_rewards is None else environment_reward
    snapshots = Snapshots()
    SeeUPOTrainer(
        model=model,
        reward_funcs=of_episodes if other_rewards is None else [other_reward, of_episodes],
        args=SeeUPOConfig(**{**settings, **config}),
        train_dataset=Dataset.from_dict(
            {"prompt": [[{"role": "user", "content": f"w{i}"}] for i in range(NUM_GROUPS * len(iterations))]}
        ),
        processing_class=tiny_tokenizer(),
        rollout_func=fixed_rollouts,
        callbacks=[snapshots],
        optimizers=optimizers,
        peft_config=peft_config,
    ).train()
    return snapshots.parameters


def run_oracle(
    model, groups_per_iteration, lr_lambda=lambda step: 1.0, num_minibatches=1, step_rewards=None, **settings
):
    """Every iteration of the naive implementation, in float64, from `model` (left untouched)."""
    policy = copy.deepcopy(model).double()
    reference = copy.deepcopy(policy)
    results = []
    for step, groups in enumerate(groups_per_iteration):
        step_settings = OracleSettings(
            lr=LEARNING_RATE * lr_lambda(step),
            temperature=TEMPERATURE,
            # Any partition is right; the trainer's is the one its documented rule draws.
            minibatches=tuple(assign_minibatches(NUM_TRAJECTORIES, num_minibatches, SEED, step)),
            **settings,
        )
        steps = None if step_rewards is None else step_rewards[step]
        results.append(seeupo_iteration(policy, groups, step_settings, ref_model=reference, step_rewards=steps))
    return results


def parameters_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def relative_error(actual, expected, start) -> float:
    """Largest difference of two sets of parameters, in units of the largest distance from the start."""
    difference = max((actual[name].double() - expected[name]).abs().max().item() for name in expected)
    distance = max((expected[name] - start[name].double()).abs().max().item() for name in expected)
    return difference / distance


@cache
def oracle_on_ragged(directory, lora=False, **settings):
    """Final parameters of the oracle on the ragged rollouts, for given settings; each is computed once."""
    results = run_oracle(load_model(directory, lora=lora), map(as_groups, ragged_rollouts()), **settings)
    return results[-1].parameters


def assert_matches_oracle(directory, iterations, tmp_path, turns=None, config=None, **settings):
    """Compare after every iteration; `config` is for the trainer alone. Returns the oracle's results."""
    model = load_model(directory)
    start = parameters_of(model)
    groups = [as_groups(episodes) for episodes in iterations]
    if turns is not None:
        rewritten = [
            [Episode([], [], [], new, episode.reward) for episode, new in zip(episodes, step_turns, strict=True)]
            for episodes, step_turns in zip(iterations, turns, strict=True)
        ]
        groups = [as_groups(episodes) for episodes in rewritten]
    results = run_oracle(model, groups, **settings)
    trained = train(model, iterations, tmp_path, turns=turns, **(config or {}), **settings)
    for step, (parameters, result) in enumerate(zip(trained, results, strict=True)):
        error = relative_error(parameters, result.parameters, start)
        assert error < TOLERANCE[torch.float64], f"after iteration {step}"
    return results
