"""A short run on two groups of two episodes, whose turns are given and whose options are free."""

import torch
from datasets import Dataset
from tiny import load_tiny_model, tiny_tokenizer

from seeupo_trl import SeeUPOConfig, SeeUPOTrainer


NUM_PROMPTS, GROUP = 2, 2


def episode(prompt: str, turns: int, seed: int) -> tuple[list[int], list[int], list[int]]:
    """Prompt, completion and mask of an episode with two model tokens and one environment token a turn."""
    prompt_ids = tiny_tokenizer()(prompt)["input_ids"]
    completion = [30 + (7 * seed + 3 * position) % 50 for position in range(3 * turns)]
    return prompt_ids, completion, [1, 1, 0] * turns


def rollout(prompts, trainer, turns=(2, 1, 3, 2)):
    episodes = [episode(prompt, turns[i], i) for i, prompt in enumerate(prompts)]
    prompt_ids, completion_ids, env_mask = map(list, zip(*episodes, strict=True))
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None, "env_mask": env_mask}


def rewards(completion_ids, **kwargs):
    return [float(index % 3) for index in range(len(completion_ids))]


def make_trainer(tiny_dir, tmp_path, rollout_func=rollout, reward_funcs=rewards, train_dataset=None, **options):
    defaults = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": NUM_PROMPTS * GROUP,
        "num_generations": GROUP,
        "max_steps": 1,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "save_strategy": "no",
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
    }
    if train_dataset is None:
        train_dataset = Dataset.from_dict({"prompt": [f"w{i}" for i in range(4)]})
    return SeeUPOTrainer(
        model=load_tiny_model(tiny_dir),
        args=SeeUPOConfig(**{**defaults, **options}),
        train_dataset=train_dataset,
        processing_class=tiny_tokenizer(),
        reward_funcs=reward_funcs,
        rollout_func=rollout_func,
    )


def parameters(trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in trainer.model.parameters()])
