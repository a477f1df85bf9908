"""Training runs on vLLM for its tests: environments, settings, and a watch over what reaches the sampler when."""

import gc
from functools import partial

import torch
import vllm
import vllm_on_cpu  # noqa: F401  (changes vLLM before an engine is built)
from datasets import Dataset
from oracle import token_logps
from tiny import ON_CPU
from torch.optim.optimizer import register_optimizer_step_post_hook

from seeupo_trl import MultiTurnEnvironment, Observation, SeeUPOConfig, StepResult


TOLERANCE = 1e-4  # in nats, both in float32
TEMPERATURE = 0.9
FRAME = 5  # tokens of a conversation of one message besides its words


class Chat(MultiTurnEnvironment):
    """Asks `length` times, and pays for digits."""

    def reset(self, length, **task):
        self.left = length
        return Observation([{"role": "user", "content": f"w{length} w1"}])

    def step(self, message):
        self.left -= 1
        words = message["content"].split()
        reward = sum(word.isdigit() for word in words) / 4 + len(words) / 50
        return StepResult([{"role": "user", "content": "w5 w6"}], reward=reward, terminated=self.left == 0)


class Lecture(MultiTurnEnvironment):
    """Says so many words at first, and some more in every step."""

    def reset(self, words, **task):
        return Observation([{"role": "user", "content": " ".join(["w7"] * words)}])

    def step(self, message):
        return StepResult([{"role": "user", "content": "w8 " * 9}])


def digits(completion_ids, **kwargs):
    return [sum(96 <= token < 106 for token in ids) / 4 + len(ids) / 50 for ids in completion_ids]


def the_last_two(messages):
    return messages[-2:]


def chats(*lengths):
    rows = [{"prompt": [{"role": "user", "content": f"w{i}"}], "length": n} for i, n in enumerate(lengths)]
    return Dataset.from_list(rows)


def lectures(*words):
    rows = [{"prompt": [{"role": "user", "content": f"w{i}"}], "words": n} for i, n in enumerate(words)]
    return Dataset.from_list(rows)


def questions():
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": f"w{i} w3"}] for i in range(4)]})


def config(directory, **overrides):
    return SeeUPOConfig(
        **{
            **ON_CPU,
            "output_dir": str(directory),
            "disable_tqdm": True,
            "use_vllm": True,
            "vllm_max_model_length": 256,
            "max_steps": 3,
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 24,
            "temperature": TEMPERATURE,
            "learning_rate": 0.003,
            "lr_scheduler_type": "constant",
            **overrides,
        }
    )


def engine(dtype="float32", base=vllm.LLM):
    """vLLM's engine with what TRL gives no option for."""
    return partial(base, dtype=dtype, enforce_eager=True, kv_cache_memory_bytes=64 * 2**20)


class Watch:
    """
    A trainer under watch.

    `events` has one letter for each push of the weights to the sampler (`s`), call of the sampler (`g`) and optimizer
    step (`u`); `rollouts` has every turn with its log-probabilities under the policy at that time.
    """

    def __init__(self, trainer):
        self.trainer, self.events, self.rollouts, self.pushed = trainer, "", [], []
        self.log(trainer.vllm_generation, "sync_weights", "s")
        self.log(trainer.vllm_generation, "generate", "g")
        walk, generate = trainer.vllm_generation._iter_named_params, trainer._generate

        def watched_walk():
            self.pushed.append([])
            for name, parameter in walk():
                self.pushed[-1].append(name)
                yield name, parameter

        def watched_generate(prompts):
            output = generate(prompts)
            self.rollouts.append([(turn, self.policy(turn)) for t in trainer._batch.trajectories for turn in t.turns])
            return output

        trainer.vllm_generation._iter_named_params = watched_walk
        trainer._generate = watched_generate

    def log(self, owner, name, letter):
        function = getattr(owner, name)

        def logged(*args, **kwargs):
            self.events += letter
            return function(*args, **kwargs)

        setattr(owner, name, logged)

    @torch.no_grad()
    def policy(self, turn, model=None):
        return token_logps(model or self.trainer.model, turn.context_ids, turn.action_ids, TEMPERATURE)

    def train(self):
        def stepped(*args):
            self.events += "u"

        handle = register_optimizer_step_post_hook(stepped)
        try:
            self.trainer.train()
        finally:
            handle.remove()
        return self


def free(trainer):
    trainer.vllm_generation.__dict__.clear()
    trainer.__dict__.clear()
    gc.collect()
