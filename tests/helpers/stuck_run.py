"""
Plays an environment that hangs in its step and in its end, and comes to its own end: `python stuck_run.py OUTPUT`.
"""

import sys
import time

from byte_tokenizer import byte_tokenizer, forced_end, tiny_model
from datasets import Dataset
from talk import Talk, row
from tiny import ON_CPU

from seeupo_trl import MultiTurnRollout, SeeUPOConfig, SeeUPOTrainer


class Stuck(Talk):
    def reset(self, deed=None, **task):
        self.deed = deed
        return super().reset(**task)

    def step(self, message):
        if self.deed == "hang":
            time.sleep(30)
        return super().step(message)

    def close(self):
        if self.deed == "hang":
            time.sleep(1000)


trainer = SeeUPOTrainer(
    model=tiny_model(byte_tokenizer("qwen2_5")),
    args=SeeUPOConfig(
        sys.argv[1],
        num_generations=2,
        per_device_train_batch_size=2,
        max_completion_length=4,
        generation_kwargs=forced_end(),
        **ON_CPU,
    ),
    train_dataset=Dataset.from_list([row()]),
    processing_class=byte_tokenizer("qwen2_5"),
    environment_factory=Stuck,
)
trainer.rollout_inputs = [row(deed="hang"), row(deed=None)]
print(MultiTurnRollout(Stuck, env_timeout=1)([None] * 2, trainer)["stop_reason"], flush=True)
