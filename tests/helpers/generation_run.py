"""
One process of `test_cached_generation.py` and `test_transformers_sampler.py`: in a rollout, generates with and without
keys and values kept from turn to turn, and by single requests.

`accelerate launch --config_file CONFIG generation_run.py OUTPUT MODEL`
"""

import json
import random
import sys
from pathlib import Path

import deepspeed.ops
import torch
from datasets import Dataset
from tiny import ON_CPU
from trl import GRPOConfig, GRPOTrainer

from seeupo_trl.rollout.cached_generation import CachedGeneration
from seeupo_trl.rollout.sampler import Request
from seeupo_trl.rollout.transformers_sampler import TransformersSampler
from seeupo_trl.rollout.turn_ends import TurnEnds


# Prompts and numbers of turns of each process's episodes: one process has few, and sits idle in the end.
PROMPTS = [[(12, 1), (12, 1)], [(130, 3), (130, 2), (50, 4), (9, 2)]]


def play(generate, episodes, rounds, eos_token_id):
    """Responses by turn and episode. All processes generate equally often, with throw-away rows where need be."""
    rng = random.Random(0)
    contexts = [[rng.randrange(24, 96) for _ in range(length)] for length, _ in episodes]
    played = []
    for turn in range(rounds):
        keys = [key for key, (_, turns) in enumerate(episodes) if turn < turns]
        responses = generate(keys or [None], [contexts[key] for key in keys] or [[eos_token_id]])
        for key, response in zip(keys, responses, strict=False):
            played.append(response)
            contexts[key] = contexts[key] + response + [rng.randrange(24, 96) for _ in range(rng.choice([1, 5, 30]))]
    return played


def ask(sampler, keys, contexts):
    """Responses to single requests; nothing is asked of a throw-away row."""
    for key, context in zip(keys, contexts, strict=True):
        if key is not None:
            sampler.submit(Request(key, context, seed=key))
    responses = {}
    while found := sampler.poll(None):
        responses.update((response.key, response.action_ids) for response in found)
    return [responses[key] for key in keys if key is not None]


def compare(prompts, trainer):
    """A rollout function that plays the episodes in both ways, and lets the trainer have something else."""
    episodes = PROMPTS[trainer.accelerator.process_index]
    rounds = max(turns for process in PROMPTS for _, turns in process)
    eos = trainer.processing_class.eos_token_id
    found = {}
    for gathered in (True, False):
        trainer.args.ds3_gather_for_generation = gathered
        anew = play(
            lambda keys, contexts: trainer._generate_single_turn(contexts, None, {}, 1)[0], episodes, rounds, eos
        )
        supported = CachedGeneration.supports(trainer)
        kept = play(CachedGeneration(trainer).generate, episodes, rounds, eos)
        found[f"gathered={gathered}"] = {"supported": supported, "anew": anew, "kept": kept}
        reason = TransformersSampler.reason_against(trainer)
        found[f"gathered={gathered}"]["reason"] = reason
        if reason is None:
            sampler = TransformersSampler(trainer, TurnEnds(trainer.processing_class, trainer.eos_token_ids))
            asked = play(lambda keys, contexts: ask(sampler, keys, contexts), episodes, rounds, eos)  # noqa: B023
            sampler.close()
            found[f"gathered={gathered}"]["asked"] = asked
    Path(sys.argv[1], f"rank{trainer.accelerator.process_index}.json").write_text(json.dumps(found))
    return {"prompt_ids": [[30]] * len(prompts), "completion_ids": [[31, 32]] * len(prompts), "logprobs": None}


def main() -> None:
    # compiling this kernel takes a minute and it changes nothing here: gloo is used without it
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_num_threads(1)
    trainer = GRPOTrainer(
        model=sys.argv[2],
        args=GRPOConfig(
            output_dir=sys.argv[1],
            max_steps=1,
            num_generations=2,
            per_device_train_batch_size=2,
            max_completion_length=7,
            generation_kwargs={"do_sample": False},
            model_init_kwargs={"dtype": "float32"},
            **ON_CPU,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["w1"] * 4}),
        reward_funcs=lambda completions, **kwargs: [float(index) for index in range(len(completions))],
        rollout_func=compare,
    )
    trainer.train()


if __name__ == "__main__":
    main()
