"""Each task of an evaluation has seeds of its own, the same in every evaluation and whatever its batches."""

import random

import pytest
import tool_calls
from datasets import Dataset
from evaluation_run import make_trainer
from tiny import ON_CPU

from seeupo_trl import MultiTurnEnvironment, Observation, SeeUPOConfig, SeeUPOTrainer, StepResult
from seeupo_trl.trajectory_log import read_trajectories


NUM_TASKS = 10


class Draws(MultiTurnEnvironment):
    """The task is drawn from the seed; all of them begin alike."""

    drawn: list[int] = []

    def reset(self, seed: int, **task) -> Observation:
        self.drawn.append(random.Random(seed).randrange(10**6))
        return Observation([{"role": "user", "content": "w1"}])

    def step(self, message) -> StepResult:
        return StepResult([], terminated=True)


def same_prompts() -> Dataset:
    prompts = [[{"role": "user", "content": "w1"}]] * NUM_TASKS
    return Dataset.from_dict({"prompt": prompts, "id": list(range(NUM_TASKS))})


def tasks_drawn(trainer) -> list[int]:
    Draws.drawn.clear()
    trainer.evaluate(same_prompts())
    return sorted(Draws.drawn)


def responses(output_dir) -> list[tuple[int, ...]]:
    """The first one of each episode."""
    rows = read_trajectories(output_dir).to_pylist()
    return [tuple(row["action_ids"]) for row in rows if row["turn"] <= 1]


@pytest.mark.parametrize("lock_step", [False, True])
def test_an_evaluation_draws_as_many_tasks_as_it_has_rows(lock_step, tiny_dir, tmp_path):
    drawn = []
    for batch_size in (2, 4, 20):
        options = {"per_device_eval_batch_size": batch_size, "lock_step_rollouts": lock_step}
        trainer = make_trainer(tiny_dir, tmp_path, options, environment_factory=Draws)
        drawn += [tasks_drawn(trainer), tasks_drawn(trainer)]
    assert len(set(drawn[0])) == NUM_TASKS and len(drawn[0]) == 2 * NUM_TASKS
    assert drawn == [drawn[0]] * 6


def test_no_two_responses_of_an_evaluation_share_their_random_numbers(tiny_dir, tmp_path):
    said = []
    for batch_size in (4, 20):
        options = {"per_device_eval_batch_size": batch_size, "save_trajectories": True}
        trainer = make_trainer(tiny_dir, tmp_path / str(batch_size), options, environment_factory=Draws)
        trainer.evaluate(same_prompts())
        said.append(responses(tmp_path / str(batch_size)))
    assert said[0] == said[1]
    assert len(set(said[0])) > NUM_TASKS  # the shortest of them may well be equal


def test_tools_are_called_with_other_random_numbers_in_each_batch(tmp_path):
    calls = tool_calls.CALLS
    args = SeeUPOConfig(
        **ON_CPU,
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=4,
        num_generations=2,
        num_generations_eval=2,
        max_completion_length=24,
        save_trajectories=True,
    )
    trainer = SeeUPOTrainer(
        tool_calls.save_calling_model(tmp_path / "model", calls),
        args=args,
        train_dataset=same_prompts(),
        environment_factory=tool_calls.Counter,
    )
    trainer.evaluate(same_prompts())
    assert len(set(responses(tmp_path))) > NUM_TASKS
