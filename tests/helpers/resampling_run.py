"""
Runs in which some tasks pay the same for whatever is said. As a script it is one of two processes of
`test_resampling.py`: `accelerate launch --config_file CONFIG resampling_run.py OUTPUT MODEL`.
"""

import json
import sys
from pathlib import Path

from datasets import Dataset
from tiny import ON_CPU, tiny_tokenizer

from seeupo_trl import MultiTurnEnvironment, Observation, SeeUPOConfig, SeeUPOTrainer, StepResult


class Task(MultiTurnEnvironment):
    """Pays for digits; a dull one pays 1, whatever is said."""

    def reset(self, number, dull, **task):
        self.number, self.dull = number, dull
        return Observation([{"role": "user", "content": f"w{number} w1"}], info={"number": number})

    def step(self, message):
        reward = 1.0 if self.dull else len(message["content"]) / 7
        return StepResult([], reward=reward, terminated=True)


def make_trainer(model, output_dir, num_tasks=12, dull=lambda number: number % 3 > 0, reward_funcs=None, **options):
    rows = [{"prompt": [{"role": "user", "content": f"w{i}"}], "number": i, "dull": dull(i)} for i in range(num_tasks)]
    settings = {
        **ON_CPU,
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "generation_kwargs": {"forced_eos_token_id": tiny_tokenizer().eos_token_id},
        "max_steps": 2,
        "logging_steps": 1,
        "zero_variance": "resample",
        "max_resampling_rounds": 6,
        **options,
    }
    return SeeUPOTrainer(
        model, reward_funcs, SeeUPOConfig(**settings), Dataset.from_list(rows), environment_factory=Task
    )


def watched(trainer):
    """What each iteration trains on: task, actions and reward of each episode of this process."""
    batches, select = [], trainer.select_episodes

    def select_episodes(episodes):
        batches.append(
            [
                (row["number"], [turn.action_ids for turn in t.turns], t.reward, rewards)
                for row, t, rewards in zip(
                    episodes.rows, episodes.trajectories, episodes.rewards_per_func.tolist(), strict=True
                )
            ]
        )
        return select(episodes)

    trainer.select_episodes = select_episodes
    return batches


def main() -> None:
    output, model = sys.argv[1:]
    # groups of 4 in batches of 2 a process: each lies on both
    trainer = make_trainer(model, output, per_device_train_batch_size=2)
    batches = watched(trainer)
    trainer.train()
    found = {"batches": batches, "logs": [entry for entry in trainer.state.log_history if "reward" in entry]}
    found["parameters"] = sum(p.double().abs().sum().item() for p in trainer.model.parameters())
    Path(output, f"rank{trainer.accelerator.process_index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
