"""A recipe saves what it trained, and reports as "before training" what the first of a run's processes found."""

import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny import ON_CPU, load_tiny_model, save_tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from seeupo_trl import MultiTurnEnvironment, Observation, SeeUPOTrainer, StepResult
from seeupo_trl.recipes.training import BEFORE_TRAINING, Config, ReportingRollout, success, train_and_report


class FirstLetter(MultiTurnEnvironment):
    def reset(self, n: int, **task) -> Observation:
        return Observation([{"role": "user", "content": f"w{n}"}])

    def step(self, message) -> StepResult:
        solved = message["content"].startswith("w1")
        return StepResult([], reward=float(solved), terminated=True, info={"success": solved})


ROWS = [{"n": i, "prompt": [{"role": "user", "content": f"w{i}"}]} for i in range(24)]
HELD_OUT = {"held-out": Dataset.from_list(ROWS[:16])}


def trainer_of(model: str, output_dir: Path, rollout: ReportingRollout, **options) -> SeeUPOTrainer:
    settings = {
        **ON_CPU,
        "output_dir": str(output_dir),
        "num_generations": 8,
        "num_generations_eval": 4,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "max_completion_length": 4,
        "stop_token_ids": list(range(10, 96)),
        "learning_rate": 0.01,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "reward_weights": [0.0, 1.0],
        **options,
    }
    return SeeUPOTrainer(
        model=load_tiny_model(model),
        processing_class=tiny_tokenizer(),
        args=Config(**settings),
        train_dataset=Dataset.from_list(ROWS),
        rollout_func=rollout,
        reward_funcs=[success],
    )


def run(model: str, output_dir: Path, capsys, **options) -> list[str]:
    """The lines that a run prints of its evaluations."""
    rollout = ReportingRollout(FirstLetter)
    trainer = trainer_of(model, output_dir, rollout, **options)
    capsys.readouterr()
    train_and_report(trainer, rollout, HELD_OUT, "nothing")
    return [line for line in capsys.readouterr().out.splitlines() if "success" in line and "held-out" in line]


@pytest.mark.slow
def test_a_resumed_run_compares_with_what_was_before_its_first_iteration(tmp_path, capsys):
    model, out = save_tiny_model(tmp_path / "model"), tmp_path / "out"
    whole = run(model, out, capsys)
    assert len(whole) == 2 and whole[0].startswith("before training: success ")
    shutil.rmtree(out / "checkpoint-6")
    # the same result, and no evaluation in between
    assert run(model, out, capsys, resume_from_checkpoint=True) == whole[1:]
    # also where nothing is left to do
    assert run(model, out, capsys, resume_from_checkpoint=True) == whole[1:]

    (out / BEFORE_TRAINING).unlink()
    (line,) = run(model, out, capsys, resume_from_checkpoint=True)
    after = whole[1].split("before, ")[1].split(" after")[0]
    assert line.startswith(f"success on 16 held-out tasks: {after} after; what it was before training is not known")
    assert "difference" not in line


def test_the_model_is_saved_where_the_evaluation_after_training_fails(tmp_path):
    class Rollout(ReportingRollout):
        def __call__(self, prompts, trainer):
            if trainer.state.global_step == trainer.state.max_steps:
                raise ConnectionError("the environments' server is gone")
            return super().__call__(prompts, trainer)

    rollout = Rollout(FirstLetter)
    out = tmp_path / "out"
    trainer = trainer_of(save_tiny_model(tmp_path / "model"), out, rollout, max_steps=1, save_strategy="no")
    with pytest.raises(ConnectionError):
        train_and_report(trainer, rollout, HELD_OUT, "nothing")
    trained = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(value.cpu(), trained[name]) for name, value in trainer.model.state_dict().items())
