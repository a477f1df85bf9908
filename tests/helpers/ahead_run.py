"""
Runs that may play the next batch while this one is updated, with a sampler that has a copy of the model. As a script
it is one of two processes of `test_rollouts_ahead.py`:
`accelerate launch --config_file CONFIG ahead_run.py OUTPUT MODEL`.
"""

import copy
import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from tiny import ON_CPU, tiny_tokenizer
from transformers import Qwen3ForCausalLM

from seeupo_trl import MultiTurnEnvironment, Observation, SeeUPOConfig, SeeUPOTrainer, StepResult
from seeupo_trl.rollout.sampler import Response


MOST_TOKENS = 6


class Pays(MultiTurnEnvironment):
    """Two turns; pays for what its seed and the words say."""

    def reset(self, number, seed, **task):
        self.number, self.seed, self.num_steps = number, seed, 0
        return Observation([{"role": "user", "content": f"w{number} w1"}], info={"seed": seed})

    def step(self, message):
        self.num_steps += 1
        reward = (sum(map(ord, message["content"])) + self.seed) % 17 / 16
        return StepResult(
            [{"role": "user", "content": f"w{self.number + 1}"}], reward=reward, terminated=self.num_steps == 2
        )


class Apart:
    """Answers with a copy of the policy as it is now, the last request first; a response depends on its seed alone."""

    is_independent = True

    def __init__(self, trainer, ends):
        policy = trainer.accelerator.unwrap_model(trainer.model)
        with torch.random.fork_rng(devices=[]):
            self.model = Qwen3ForCausalLM(copy.deepcopy(policy.config)).to(policy.dtype)
        self.model.load_state_dict(policy.state_dict())
        self.model.eval()
        self.ends, self.temperature = ends, trainer.args.temperature
        self.pending, self.is_closed = [], False

    def submit(self, request):
        self.pending.append(request)

    def poll(self, timeout):
        return [self.response(self.pending.pop())] if self.pending else []

    @torch.no_grad()
    def response(self, request):
        generator = torch.Generator().manual_seed(request.seed)
        ids, logps = list(request.context_ids), []
        for position in range(MOST_TOKENS):
            logits = self.logits(ids) / self.temperature
            token = int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
            if position == MOST_TOKENS - 1:
                token = self.ends.token_ids[0]
            ids.append(token)
            logps.append(logits.log_softmax(-1)[token].item())
            if token in self.ends.token_ids:
                break
        return Response(request.key, ids[len(request.context_ids) :], logps)

    def logits(self, ids):
        return self.model(torch.tensor([ids])).logits[0, -1].double()

    def forget(self, key):
        self.pending = [request for request in self.pending if request.key != key]

    def close(self):
        self.is_closed = True


class Trainer(SeeUPOTrainer):
    """Samples apart, and keeps what each iteration trains on."""

    sampler_class = Apart

    def rollout_sampler(self, ends, settings):
        sampler = self.sampler_class(self, ends)
        self.samplers = [*vars(self).get("samplers", []), sampler]
        return sampler

    def select_episodes(self, episodes):
        turns = [[(turn.context_ids, turn.action_ids) for turn in t.turns] for t in episodes.trajectories]
        logps = [[turn.sampling_logps for turn in t.turns] for t in episodes.trajectories]
        rewards = [trajectory.reward for trajectory in episodes.trajectories]
        seeds = [trajectory.info["seed"] for trajectory in episodes.trajectories]
        numbers = [row["number"] for row in episodes.rows]
        batch = {"numbers": numbers, "seeds": seeds, "turns": turns, "logps": logps, "rewards": rewards}
        self.batches = [*vars(self).get("batches", []), batch]
        return episodes

    def staleness(self):
        return [entry["rollout/staleness"] for entry in self.state.log_history if "rollout/staleness" in entry]


def make_trainer(model, output_dir, num_tasks=12, trainer_class=Trainer, environment=Pays, **options):
    given = {name: options.pop(name) for name in ("optimizers", "eval_dataset") if name in options}
    rows = [{"prompt": [{"role": "user", "content": f"w{i}"}], "number": i} for i in range(num_tasks)]
    settings = {
        **ON_CPU,
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": MOST_TOKENS,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "rollouts_ahead": 1,
        **options,
    }
    return trainer_class(
        model,
        args=SeeUPOConfig(**settings),
        train_dataset=Dataset.from_list(rows),
        environment_factory=environment,
        processing_class=tiny_tokenizer(),
        **given,
    )


def main() -> None:
    output, model = sys.argv[1:]
    # groups of 2 in batches of 1 a process: each lies on both
    trainer = make_trainer(model, output, per_device_train_batch_size=1)
    trainer.train()
    found = {"batches": trainer.batches, "staleness": trainer.staleness()}
    found["parameters"] = sum(p.double().abs().sum().item() for p in trainer.model.parameters())
    Path(output, f"rank{trainer.accelerator.process_index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
