"""A small real run for `test_resume.py`: `python killable_run.py MODEL OUTPUT [--resume] [--kill STEP WHERE]`."""

import argparse
import os
import signal

import torch
from datasets import Dataset
from transformers import TrainerCallback

from seeupo_trl import SeeUPOConfig, SeeUPOTrainer


def two_turns(prompts, trainer):
    """Samples two responses with a token of the environment between them; shorter sentences earn more."""
    tokenizer = trainer.processing_class
    prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    question = tokenizer("?")["input_ids"]
    first, _ = trainer._generate_single_turn(prompt_ids, None, {}, 1)
    contexts = [p + a + question for p, a in zip(prompt_ids, first, strict=True)]
    second, _ = trainer._generate_single_turn(contexts, None, {}, 1)
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": [a + question + b for a, b in zip(first, second, strict=True)],
        "logprobs": None,
        "env_mask": [[1] * len(a) + [0] * len(question) + [1] * len(b) for a, b in zip(first, second, strict=True)],
    }


def small_tokens(completion_ids, **kwargs):
    return [-sum(ids) / 100 for ids in completion_ids]


class Killer(TrainerCallback):
    """Kills the process as a machine failure would: at once, without clean-up."""

    def __init__(self, step: int, where: str):
        self.step, self.where, self.optimizer_steps = step, where, 0

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        # two turns, two optimizer steps an iteration: before the second one, a turn has been updated already
        self.optimizer_steps += 1
        if self.where == "inside" and state.global_step == self.step and self.optimizer_steps % 2 == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_begin(self, args, state, control, **kwargs):
        if self.where == "between" and state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--kill", nargs=2)
    parser.add_argument("--cuda", action="store_true", help="on a GPU, with `full_determinism`")
    options = parser.parse_args()
    torch.set_num_threads(1)
    args = SeeUPOConfig(
        output_dir=options.output,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_generations=2,
        max_completion_length=6,
        num_train_epochs=3,
        learning_rate=1e-3,
        weight_decay=0.01,
        beta=0.01,
        update_order="random",
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        bf16=False,
        use_cpu=not options.cuda,
        full_determinism=options.cuda,
        report_to="none",
        logging_steps=1,
    )
    trainer = SeeUPOTrainer(
        model=options.model,
        args=args,
        reward_funcs=small_tokens,
        train_dataset=Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(6)]}),
        rollout_func=two_turns,
        callbacks=[Killer(int(options.kill[0]), options.kill[1])] if options.kill else None,
    )
    trainer.train(resume_from_checkpoint=options.resume or None)
    trainer.save_model(os.path.join(options.output, "final"))


if __name__ == "__main__":
    main()
