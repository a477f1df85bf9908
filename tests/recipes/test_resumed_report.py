"""What a resumed run of a recipe reports as "before training" is what the first of its processes found."""

import shutil
from pathlib import Path

import pytest
from datasets import Dataset
from tiny import ON_CPU, load_tiny_model, save_tiny_model, tiny_tokenizer

from seeupo_trl import MultiTurnEnvironment, Observation, SeeUPOTrainer, StepResult
from seeupo_trl.recipes.training import BEFORE_TRAINING, Config, ReportingRollout, success, train_and_report


class FirstLetter(MultiTurnEnvironment):
    def reset(self, n: int, **task) -> Observation:
        return Observation([{"role": "user", "content": f"w{n}"}])

    def step(self, message) -> StepResult:
        solved = message["content"].startswith("w1")
        return StepResult([], reward=float(solved), terminated=True, info={"success": solved})


def run(model: str, output_dir: Path, capsys, **options) -> list[str]:
    """The lines that a run prints of its evaluations."""
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
    rows = [{"n": i, "prompt": [{"role": "user", "content": f"w{i}"}]} for i in range(24)]
    rollout = ReportingRollout(FirstLetter)
    trainer = SeeUPOTrainer(
        model=load_tiny_model(model),
        processing_class=tiny_tokenizer(),
        args=Config(**settings),
        train_dataset=Dataset.from_list(rows),
        rollout_func=rollout,
        reward_funcs=[success],
    )
    capsys.readouterr()
    train_and_report(trainer, rollout, {"held-out": Dataset.from_list(rows[:16])}, "nothing")
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
