"""
Peak memory of one training step: GRPOTrainer beside SeeUPOTrainer, on the same eight episodes in one micro-batch.

    python benchmarks/peak_memory.py        # two minutes on a CPU

Each trainer runs in a process of its own, on fixed rollouts (nothing is generated); what is printed is the growth of
the process's peak resident memory during `train()`. The model is Qwen3-shaped with random weights.
"""

import argparse
import random
import resource
import subprocess
import sys
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from seeupo_trl import SeeUPOConfig, SeeUPOTrainer


TRAINERS = {"GRPOTrainer": None, "SeeUPOTrainer, rows": "rows", "SeeUPOTrainer, trees": "tree"}
VOCABULARY, PROMPT, ACTION, OBSERVATION, TURNS, EPISODES = 32_000, 1080, 24, 16, 10, 8


def fixed_rollouts(prompts, trainer):
    rng = random.Random(0)

    def tokens(count):
        return [rng.randrange(1, VOCABULARY) for _ in range(count)]

    prompt_ids = tokens(PROMPT)
    return {
        "prompt_ids": [prompt_ids] * len(prompts),
        "completion_ids": [tokens(TURNS * (ACTION + OBSERVATION)) for _ in prompts],
        "env_mask": [([1] * ACTION + [0] * OBSERVATION) * TURNS for _ in prompts],
        "logprobs": None,
    }


def ascending_reward(prompts, **kwargs):
    return [float(index) for index in range(len(prompts))]


def measure(packing: str | None, output_dir: str) -> None:
    torch.set_num_threads(1)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=4096,
    )
    settings = {
        "output_dir": output_dir,
        "per_device_train_batch_size": EPISODES,
        "num_generations": EPISODES,
        "max_steps": 1,
        "optim": "sgd",
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    vocabulary = {"<pad>": 0, "<eos>": 1, "a": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="a")), pad_token="<pad>", eos_token="<eos>"
    )
    trainer_class, args = GRPOTrainer, None
    if packing is None:
        args = GRPOConfig(**settings, loss_type="grpo", importance_sampling_level="sequence")
    else:
        trainer_class, args = SeeUPOTrainer, SeeUPOConfig(**settings, packing=packing)
    trainer = trainer_class(
        model=Qwen3ForCausalLM(config),
        reward_funcs=ascending_reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * EPISODES}),
        processing_class=tokenizer,
        rollout_func=fixed_rollouts,
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trainer.train()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak {(after - before) // 1024}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", choices=TRAINERS, help="measure one trainer in this process")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each trainer; the median is printed")
    options = parser.parse_args()
    if options.measure:
        with tempfile.TemporaryDirectory() as directory:
            measure(TRAINERS[options.measure], directory)
        return
    peaks = {name: [] for name in TRAINERS}
    for _ in range(options.repeats):
        for name in TRAINERS:
            command = [sys.executable, __file__, "--measure", name]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            peaks[name].append(int(output.split("peak ")[1]))
    medians = {name: sorted(values)[len(values) // 2] for name, values in peaks.items()}
    print("| trainer | peak MiB | of GRPOTrainer |\n|---|---:|---:|")
    for name, peak in medians.items():
        print(f"| {name} | {peak:,} | {peak / medians['GRPOTrainer']:.2f} |")


if __name__ == "__main__":
    main()
