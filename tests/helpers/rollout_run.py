"""
One of two processes of `test_rollout_on_two_processes.py`: plays the scenarios, and notes how often it generates.

`accelerate launch --config_file CONFIG rollout_run.py OUTPUT`
"""

import json
import sys
from pathlib import Path

import torch
from byte_tokenizer import byte_tokenizer, forced_end, tiny_model
from datasets import Dataset
from talk import Fragile, row, user
from tiny import ON_CPU
from trl import GRPOConfig, GRPOTrainer

from seeupo_trl.rollout import MultiTurnRollout, environment_reward


# for each process, the number of replies and the fault of each of its environments; whether on vLLM; options
SCENARIOS = {
    "ragged": ([[0, 0], [3, 1]], [[None, None], [None, None]], False, {}),
    "ragged, vLLM": ([[0, 0], [3, 1]], [[None, None], [None, None]], True, {}),
    "waves": ([[0, 0], [3, 1]], [[None, None], [None, None]], False, {"max_concurrent_envs": 1}),
    "one fails": ([[0, 0], [1, 0]], [["reset", "step"], [None, None]], False, {}),
    "one fails too often": ([[0, 0], [1, 0]], [["reset", "step"], [None, None]], False, {"max_env_failure_rate": 0.4}),
    "all fail": ([[0, 0], [0, 0]], [["reset", "reset"], ["step", "step"]], False, {}),
}


def play(trainer, lengths, faults, vllm, options):
    generate, calls = trainer._generate_single_turn, []

    def counted(prompts, *args):
        calls.append(len(prompts))
        torch.distributed.barrier()  # stands for the collectives of ZeRO-3: hangs unless all processes come
        trainer.use_vllm = False
        completion_ids, _ = generate(prompts, *args)
        trainer.use_vllm = vllm
        return completion_ids, [[-1.0] * len(ids) for ids in completion_ids] if vllm else None

    trainer._generate_single_turn = counted
    trainer.use_vllm = vllm
    trainer.rollout_inputs = [
        row(*[[user("Go on.")]] * n, fails_in=fault) for n, fault in zip(lengths, faults, strict=True)
    ]
    try:
        output = MultiTurnRollout(Fragile, **options)([None] * 2, trainer)
        found = {"turns": [len(t.turns) for t in output["trajectories"]], "stop": output["stop_reason"]}
    except RuntimeError as error:
        found = {"error": str(error)}
    trainer._generate_single_turn = generate
    return {**found, "calls": calls}


def main() -> None:
    tokenizer = byte_tokenizer("qwen2_5")
    trainer = GRPOTrainer(
        model=tiny_model(tokenizer),
        args=GRPOConfig(
            output_dir=sys.argv[1],
            num_generations=2,
            per_device_train_batch_size=2,
            max_completion_length=4,
            generation_kwargs=forced_end(),
            **ON_CPU,
        ),
        train_dataset=Dataset.from_list([row(number=i) for i in range(4)]),
        processing_class=tokenizer,
        reward_funcs=environment_reward,
        rollout_func=lambda *args: None,
    )
    assert trainer.accelerator.num_processes == 2
    rank = trainer.accelerator.process_index
    found = {
        name: play(trainer, lengths[rank], faults[rank], vllm, options)
        for name, (lengths, faults, vllm, options) in SCENARIOS.items()
    }
    Path(sys.argv[1], f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
