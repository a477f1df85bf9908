"""
One of two processes of `test_trl_environments_on_two_processes.py`: plays and trains, and notes what happened.

`accelerate launch --config_file CONFIG tool_rollout_run.py OUTPUT`
"""

import json
import sys
from pathlib import Path

import torch
from byte_tokenizer import byte_tokenizer, tiny_model
from datasets import Dataset
from scripted_tools import END, ScriptedSeeUPO, call
from tiny import ON_CPU
from tool_environments import Unreliable

from seeupo_trl import SeeUPOConfig


# by process and row
FAULTS = {"ragged": [[None, None], [None, None]], "one fails": [["reset", "reward"], [None, None]]}
LENGTHS = [[0, 0], [3, 1]]


class Lockstep(ScriptedSeeUPO):
    """Calls a tool as often as the prompt says."""

    def _generate_single_turn(self, prompt_ids, *args):
        self.calls.append(len(prompt_ids))
        torch.distributed.barrier()  # stands for the collectives of ZeRO-3: hangs unless all processes come
        return super()._generate_single_turn(prompt_ids, *args)

    def respond(self, context):
        text = self.processing_class.decode(context)
        if "Play" not in text:
            return END  # a throw-away row
        left = int(text.split("Play ")[1].split(".")[0]) - text.count("<|im_start|>assistant") + 1
        return (call("increment", step=1) if left > 0 else "So.") + END


def task(length):
    return {"prompt": [{"role": "user", "content": f"Play {length}."}]}


def play(trainer, lengths, faults):
    trainer.generated, trainer.calls = [], []
    trainer._metrics["train"].clear()
    rows = [{**task(length), "fault": fault} for length, fault in zip(lengths, faults, strict=True)]
    trainer._generate_and_score_completions(rows)
    return {
        "turns": [len(t.turns) for t in trainer._batch.trajectories],
        "calls": list(trainer.calls),
        "stop": [t.stop_reason.value for t in trainer._batch.trajectories],
        "value": [environment.value for environment in trainer.environments],
        "frequency": list(trainer._metrics["train"]["tools/call_frequency"]),
        "reward": list(trainer._metrics["train"]["rewards/Unreliable/mean"]),
    }


def main() -> None:
    tokenizer = byte_tokenizer("qwen2_5")
    trainer = Lockstep(
        model=tiny_model(tokenizer),
        args=SeeUPOConfig(
            output_dir=sys.argv[1],
            num_generations=2,
            max_steps=1,
            max_completion_length=500,
            per_device_train_batch_size=2,
            env_reset_retries=0,
            learning_rate=1e-2,
            **ON_CPU,
        ),
        train_dataset=Dataset.from_list([task(0), task(3)]),
        processing_class=tokenizer,
        environment_factory=Unreliable,
    )
    rank = trainer.accelerator.process_index
    assert trainer.accelerator.num_processes == 2
    trainer.model.train()
    found = {name: play(trainer, LENGTHS[rank], faults[rank]) for name, faults in FAULTS.items()}
    trainer.train()
    found["parameters"] = sum(parameter.double().abs().sum().item() for parameter in trainer.model.parameters())
    Path(sys.argv[1], f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
