"""
The update's own time in a run of a small model: what the package does around the arithmetic, for many trajectories.

    python benchmarks/update_overhead.py [--trajectories 64 256 1024 4096] [--turns 3] [--profile]

One table, one run: a stock GRPO trainer (GSPO: sequence ratios) and SeeUPO train on the same rollouts of the same
model. Times are CPU seconds of this process on one thread. `host` is what is left of the training step without the
model's forward passes, the backward passes, the optimizer, the rollout and the rewards; `ms a turn` divides it by the
turns of all trajectories.
"""

import argparse
import cProfile
import os
import pstats
import random
import tempfile
from collections import Counter
from contextlib import contextmanager
from time import process_time


os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from seeupo_trl import SeeUPOConfig, SeeUPOTrainer


GROUP_SIZE = 8
VOCABULARY = ["<pad>", "<eos>", *(f"w{i}" for i in range(62))]
WARM_UP = 2  # iterations that are not counted


def build_model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(VOCABULARY),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=16,
            eos_token_id=1,
            pad_token_id=0,
        )
    )


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def make_rollout(trajectories: int, turns: int):
    """A rollout function whose episodes have three tokens a turn and one token between turns; and its reward."""

    def rollout(prompts, trainer):
        rng = random.Random(trainer.state.global_step)
        columns = {"prompt_ids": [], "completion_ids": [], "env_mask": [], "logprobs": None, "outcome": []}
        for _ in range(trajectories // GROUP_SIZE):
            prompt = [rng.randrange(2, 64) for _ in range(4)]
            for _ in range(GROUP_SIZE):
                tokens, mask = [], []
                for turn in range(turns):
                    tokens += [rng.randrange(2, 64) for _ in range(3 + (turn < turns - 1))]
                    mask += [1, 1, 1, *[0] * (turn < turns - 1)]
                columns["prompt_ids"].append(prompt)
                columns["completion_ids"].append(tokens)
                columns["env_mask"].append(mask)
                columns["outcome"].append(rng.random())
        return columns

    return rollout


def outcome_reward(completions, outcome, **kwargs):
    return outcome


class Clock:
    """CPU seconds by name."""

    def __init__(self):
        self.seconds: Counter = Counter()
        self.counting = False

    @contextmanager
    def time(self, name: str):
        start = process_time()
        try:
            yield
        finally:
            if self.counting:
                self.seconds[name] += process_time() - start

    def wrap(self, owner, attribute: str, name: str) -> None:
        function = getattr(owner, attribute)

        def timed(*args, **kwargs):
            with self.time(name):
                return function(*args, **kwargs)

        setattr(owner, attribute, timed)


def measure(trainer_class: type, trajectories: int, turns: int, iterations: int, profile: bool) -> dict[str, float]:
    """CPU seconds of one iteration's training step, arithmetic and the rest, averaged over some iterations."""
    torch.set_num_threads(1)
    options = {"importance_sampling_level": "sequence", "loss_type": "grpo"} if trainer_class is GRPOTrainer else {}
    config_class = GRPOConfig if trainer_class is GRPOTrainer else SeeUPOConfig
    with tempfile.TemporaryDirectory() as directory:
        args = config_class(
            output_dir=directory,
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
            logging_steps=10**6,
            save_strategy="no",
            gradient_checkpointing=False,
            per_device_train_batch_size=trajectories,
            num_generations=GROUP_SIZE,
            max_completion_length=8,
            max_steps=WARM_UP + iterations,
            **options,
        )
        trainer = trainer_class(
            build_model(),
            reward_funcs=outcome_reward,
            args=args,
            train_dataset=Dataset.from_dict({"prompt": ["w0"] * (trajectories // GROUP_SIZE)}),
            processing_class=tokenizer(),
            rollout_func=make_rollout(trajectories, turns),
        )
        clock = Clock()
        clock.wrap(trainer.model, "forward", "arithmetic")
        clock.wrap(trainer.accelerator, "backward", "arithmetic")
        clock.wrap(trainer, "_prepare_inputs", "rollout")
        clock.wrap(trainer, "training_step", "step")
        profiler = cProfile.Profile()
        create_optimizer = trainer.create_optimizer

        def watched_optimizer(*args, **kwargs):
            optimizer = create_optimizer(*args, **kwargs)
            clock.wrap(trainer.optimizer, "step", "optimizer")
            return optimizer

        trainer.create_optimizer = watched_optimizer
        step = trainer.training_step

        def counted(*args, **kwargs):
            clock.counting = trainer.state.global_step >= WARM_UP
            if profile and clock.counting:
                profiler.enable()
            try:
                return step(*args, **kwargs)
            finally:
                profiler.disable()

        trainer.training_step = counted
        trainer.train()
    if profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
    seconds = {name: value / iterations for name, value in clock.seconds.items()}
    update = seconds["step"] - seconds["rollout"]
    inside = 0.0 if trainer_class is GRPOTrainer else seconds["optimizer"] * (turns - 1) / turns
    return {
        "step": seconds["step"] + seconds["optimizer"] - inside,
        "update": update + seconds["optimizer"] - inside,
        "host": update - seconds["arithmetic"] - inside,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="print where SeeUPO's time goes")
    args = parser.parse_args()
    print(f"{args.turns} turns of 3 tokens, {args.iterations} iterations, CPU seconds of one iteration\n")
    print(
        "| trajectories | stock step | SeeUPO step | ratio | stock update | SeeUPO update | ratio | host, ms a turn |"
    )
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for trajectories in args.trajectories:
        stock = measure(GRPOTrainer, trajectories, args.turns, args.iterations, profile=False)
        ours = measure(SeeUPOTrainer, trajectories, args.turns, args.iterations, args.profile)
        a_turn = 1000 * ours["host"] / (trajectories * args.turns)
        print(
            f"| {trajectories} "
            f"| {stock['step']:.4f} | {ours['step']:.4f} | {ours['step'] / stock['step']:.2f} "
            f"| {stock['update']:.4f} | {ours['update']:.4f} | {ours['update'] / stock['update']:.2f} "
            f"| {a_turn:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
