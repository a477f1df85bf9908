"""
One process of `test_evaluation.py`: evaluates sets of awkward sizes, trains one iteration and writes what it reports.

`accelerate launch [--config_file CONFIG] evaluation_run.py OUTPUT MODEL`
"""

import json
import os
import re
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from tiny import ON_CPU, load_tiny_model, tiny_tokenizer

from seeupo_trl import MultiTurnEnvironment, MultiTurnRollout, Observation, SeeUPOConfig, SeeUPOTrainer, StepResult
from seeupo_trl.trajectory_log import read_trajectories


K = 2


def tasks(count: int) -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"w{i}"}],
                "number": i,
                "id": f"task-{i}",
                "category": "odd" if i % 2 else "even",
            }
            for i in range(count)
        ]
    )


class Scripted(MultiTurnEnvironment):
    """The outcome depends on nothing but the task and the number of the attempt, which its rollout says."""

    def reset(self, number: int, attempt: int, seed: int, **task) -> Observation:
        self.number, self.attempt, self.steps, self.seed = number, attempt, 0, seed
        return Observation([{"role": "user", "content": f"w{number}"}])

    def step(self, message) -> StepResult:
        self.steps += 1
        if self.number == 4 and self.attempt == 1:
            raise RuntimeError("the database is gone")
        if self.steps <= self.number % 3:
            return StepResult([{"role": "user", "content": "w1 w2"}])
        # even tasks always succeed, odd ones at the first attempt
        success = self.number % 2 == 0 or self.attempt == 0
        return StepResult([], reward=float(success), terminated=True, info={"success": success, "seed": self.seed})


class ScriptedRollout(MultiTurnRollout):
    """
    Tells the environments which attempt of its task an episode is: by its position in the batch of all processes,
    which holds whole groups.
    """

    def __call__(self, prompts, trainer):
        first = trainer.accelerator.process_index * len(prompts)
        rows = enumerate(trainer.rollout_inputs)
        trainer.rollout_inputs = [{**row, "attempt": (first + offset) % K} for offset, row in rows]
        return super().__call__(prompts, trainer)


def make_trainer(
    model_dir, output_dir, options, environment_factory=Scripted, trainer_class=SeeUPOTrainer, **kwargs
) -> SeeUPOTrainer:
    model = load_tiny_model(model_dir)
    # any word may end a response: an untrained model hardly ever writes the one token that should
    model.generation_config.eos_token_id = list(range(40, 96))
    settings = {
        **ON_CPU,
        "output_dir": str(output_dir),
        "per_device_train_batch_size": K,
        "per_device_eval_batch_size": 2 * K,
        "num_generations": K,
        "num_generations_eval": K,
        "max_completion_length": 16,
        "max_steps": 1,
        **options,
    }
    is_scripted = environment_factory is Scripted
    how = {"rollout_func": ScriptedRollout(Scripted)} if is_scripted else {"environment_factory": environment_factory}
    return trainer_class(
        model=model,
        args=SeeUPOConfig(**settings),
        processing_class=tiny_tokenizer(),
        train_dataset=tasks(4),
        **how,
        **kwargs,
    )


def evaluate_and_train(model_dir: str, output: Path) -> dict:
    """What evaluations of awkward sizes report, and the outcomes that they and an iteration of training save."""
    stream = IterableDataset.from_generator(lambda: iter(tasks(3)))
    eval_dataset = {"1": tasks(1), "3": tasks(3), "5": tasks(5), "stream": stream}
    per_device = 2 * K // int(os.environ.get("WORLD_SIZE", "1"))
    options = {"per_device_train_batch_size": per_device, "save_trajectories": True}
    trainer = make_trainer(model_dir, output, options, eval_dataset=eval_dataset)
    metrics = trainer.evaluate()
    metrics = {name: value for name, value in metrics.items() if re.match("eval_(1|3|5|stream)_", name)}
    trainer.train()
    trainer.accelerator.wait_for_everyone()

    saved = {}
    for row in read_trajectories(output).to_pylist():
        if row["turn"] <= 1:
            names = ("trajectory", "task", "turns", "success", "reward", "stop_reason")
            outcome = [*(row[name] for name in names), json.loads(row["info"]).get("seed")]
            saved.setdefault(row["split"], []).append(outcome)
    return {"metrics": metrics, "trajectories": saved}


def main() -> None:
    torch.set_num_threads(1)
    output, model_dir = Path(sys.argv[1]), sys.argv[2]
    result = evaluate_and_train(model_dir, output)
    state = PartialState()
    (output / f"rank{state.process_index}.json").write_text(json.dumps(result))
    state.destroy_process_group()


if __name__ == "__main__":
    main()
