"""
One process of `test_distributed.py`: trains on fixed, unkind rollouts and saves the model.

`accelerate launch [--config_file CONFIG] distributed_run.py MODEL OUTPUT '{"beta": 0.1}'`
"""

import json
import random
import sys

import deepspeed.ops
import torch
from datasets import Dataset

from seeupo_trl import SeeUPOConfig, SeeUPOTrainer


GROUP_SIZE = 2
NUM_PROMPTS = 4
# The first half of the trajectories is the first process's when there are two: it plays single turns only while the
# other plays up to five; in the second iteration its groups have no variance; in the third it has no model token.
TURNS = [[1, 1, 1, 1, 5, 3, 4, 5], [2, 3, 1, 2, 1, 4, 2, 1], [0, 0, 0, 0, 3, 1, 2, 2]]
REWARDS = [[0, 1, 2, 0, 1, 0, 3, 1], [1, 1, 2, 2, 0, 3, 1, 0], [0, 1, 0, 2, 1, 3, 0, 1]]


def fixed_rollouts(prompts, trainer):
    step = trainer.state.global_step
    first = trainer.accelerator.process_index * len(prompts)
    output = {"prompt_ids": [], "completion_ids": [], "logprobs": None, "env_mask": [], "outcome": []}
    for index in range(first, first + len(prompts)):
        prompt_ids = [30 + (7 * (index // GROUP_SIZE) + k) % 60 for k in range(4)]
        rng = random.Random(100 * step + index)
        completion_ids, env_mask = [rng.randint(30, 89)], [0]
        for _ in range(TURNS[step][index]):
            action = [rng.randint(30, 89) for _ in range(rng.randint(1, 5))]
            completion_ids += [*action, rng.randint(30, 89)]
            env_mask += [1] * len(action) + [0]
        output["prompt_ids"].append(prompt_ids)
        output["completion_ids"].append(completion_ids)
        output["env_mask"].append(env_mask)
        output["outcome"].append(float(REWARDS[step][index]))
    return output


def outcome_reward(completions, outcome, **kwargs):
    return outcome


def main() -> None:
    model, output, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    # compiling this kernel takes a minute and it changes nothing here: gloo is used without it
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_num_threads(1)
    lora = options.pop("lora", False)
    peft_config = None
    if lora:
        from peft import LoraConfig

        peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    num_processes = int(options.pop("num_processes"))
    args = SeeUPOConfig(
        **{
            "output_dir": output,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": NUM_PROMPTS * GROUP_SIZE // (2 * num_processes),
            "num_generations": GROUP_SIZE,
            "max_steps": len(TURNS),
            "optim": "sgd",
            "learning_rate": 0.01,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 1.0,
            "gradient_checkpointing": False,
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            **options,
        }
    )
    trainer = SeeUPOTrainer(
        model=model,
        reward_funcs=outcome_reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": [f"w{i}" for i in range(NUM_PROMPTS * len(TURNS))]}),
        rollout_func=fixed_rollouts,
        peft_config=peft_config,
    )
    trainer.train()
    trainer.save_model(f"{output}/final")
    if trainer.accelerator.is_main_process:
        with open(f"{output}/logs.json", "w") as file:
            json.dump(trainer.state.log_history, file)
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
