"""`rollouts_ahead=1` with TRL environments: instances stay with their episodes until these have been scored."""

import time

import pytest
from ahead_run import Apart, Trainer
from datasets import Dataset
from tiny import ON_CPU
from tool_calls import CALL, Counter, calling_tokenizer, save_calling_model
from transformers import TrainerCallback

from seeupo_trl import SeeUPOConfig


ANSWERS = [CALL, "w1", "<|im_end|>"]
GROUP = 2


class Calls(Apart):
    """Calls the tool or says something."""

    def __init__(self, trainer, ends):
        super().__init__(trainer, ends)
        self.allowed = trainer.processing_class.convert_tokens_to_ids(ANSWERS)

    def logits(self, ids):
        logits = super().logits(ids)
        barred = logits.new_full(logits.shape, float("-inf"))
        barred[self.allowed] = logits[self.allowed]
        return barred


class Watched(Trainer):
    sampler_class = Calls

    def select_episodes(self, episodes):
        self.numbers = [*vars(self).get("numbers", []), [row["start"] for row in episodes.rows]]
        return episodes


class NumberedCounter(Counter):
    """Knows how often it was called in this episode."""

    def reset(self, start, **row):
        self.start, self.num_calls = start, 0
        return super().reset(start)

    def increment(self, step: int) -> int:
        """
        Adds to the counter.

        Args:
            step: What to add.
        """
        self.num_calls += 1
        return super().increment(step)


@pytest.fixture
def make(tmp_path):
    model = save_calling_model(tmp_path / "model", [CALL])

    def make_trainer(trainer_class=Watched, **options):
        made, seen = [], []

        def factory():
            made.append(NumberedCounter())
            return made[-1]

        def watching(completions, environments, start, **columns):
            """What the environments hold is what became of these episodes, of no others."""
            for completion, environment, number in zip(completions, environments, start, strict=True):
                calls = sum(message["role"] == "tool" for message in completion)
                assert (environment.start, environment.num_calls) == (number, calls)
                seen.append(calls)
            return [0.0] * len(completions)

        settings = {
            **ON_CPU,
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 4,
            "num_generations": GROUP,
            "max_completion_length": 60,
            "max_tool_calling_iterations": 3,
            "learning_rate": 1e-2,
            "max_steps": 4,
            "rollouts_ahead": 1,
            **options,
        }
        rows = [{"prompt": [{"role": "user", "content": f"w{i}"}], "start": i} for i in range(12)]
        trainer = trainer_class(
            model,
            args=SeeUPOConfig(**settings),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows[:2]),
            reward_funcs=watching,
            environment_factory=factory,
            processing_class=calling_tokenizer([CALL]),
        )
        return trainer, made, seen

    return make_trainer


def test_instances_are_those_of_their_episodes_and_play_again(make):
    trainer, made, seen = make()
    trainer.train()
    assert trainer.staleness() == [0, 1, 1, 1]
    assert len(seen) == 4 * 4 and max(seen) > 1
    assert len(made) == 4


def test_tasks_are_those_of_a_run_that_does_not_play_ahead(make):
    ahead, plain = (make(rollouts_ahead=number)[0] for number in (1, 0))
    ahead.train(), plain.train()
    assert ahead.numbers == plain.numbers and len(plain.numbers) == 4


def test_an_evaluation_leaves_the_batch_in_flight_as_it_is(make):
    trainer, made, seen = make(
        eval_strategy="steps", eval_steps=1, num_generations_eval=2, per_device_eval_batch_size=4
    )
    trainer.train()
    assert trainer.staleness() == [0, 1, 1, 1]
    assert len(seen) == 4 * 4 + 4 * 4
    assert len(made) == 2 * 4  # those of the batch in flight wait to be scored


def test_what_a_dropped_batch_played_with_is_used_again(make):
    class Holds(Calls):
        def poll(self, timeout):
            if trainer.samplers[1:2] == [self]:
                waits.append(timeout)
                time.sleep(timeout or 0)
                return []
            return super().poll(timeout)

    class HoldsTheSecond(Watched):
        sampler_class = Holds

    class Saves(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            until = time.monotonic() + 20
            while state.global_step == 1 and not waits:
                assert time.monotonic() < until
                time.sleep(0.01)
            control.should_save = state.global_step == 1

    waits: list[float] = []
    trainer, made, seen = make(trainer_class=HoldsTheSecond)
    trainer.add_callback(Saves())
    trainer.train()
    assert trainer.staleness() == [0, 0, 1, 1]
    assert len(made) == 4 and len(seen) == 4 * 4
