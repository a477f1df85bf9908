"""What a short GRPO script is made of: settings, prompts, a reward, and a look at what training did."""

import torch
from datasets import Dataset
from tiny import ON_CPU

from seeupo_trl import SeeUPOConfig


PROMPTS = [f"w{i} w{i + 1}" for i in range(8)]
CONVERSATIONS = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]


def settings(directory, **overrides):
    """Two prompts in groups of two an iteration, short completions, steps large enough to see."""
    return {
        **ON_CPU,
        "output_dir": str(directory),
        "learning_rate": 1e-2,
        "max_steps": 2,
        "max_completion_length": 6,
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        **overrides,
    }


def config(directory, **overrides):
    return SeeUPOConfig(**settings(directory, **overrides))


def small_tokens(completion_ids, **kwargs):
    """Different for almost any two completions, so that there is always something to learn."""
    return [-sum(ids) / len(ids) for ids in completion_ids]


def text_dataset(**columns):
    return Dataset.from_dict({"prompt": PROMPTS, **columns})


def chat_dataset(**columns):
    return Dataset.from_dict({"prompt": CONVERSATIONS, **columns})


def parameters_of(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def moved(trainer, before):
    """Names of the parameters that are no longer what they were."""
    now = parameters_of(trainer)
    return {name for name in before if not torch.equal(before[name], now[name])}


def logged(trainer, key):
    """The values of a metric over the run, in order."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]
