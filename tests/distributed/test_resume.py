"""A run that was killed goes on from its last whole checkpoint as if nothing had happened."""

import json
import signal
from pathlib import Path

import pytest
import torch
import warm_python
from accelerate import Accelerator
from evaluation_run import make_trainer
from launching import HELPERS, run_command
from safetensors.torch import load_file
from tiny import save_tiny_model

from seeupo_trl.distributed.checkpoints import check_checkpoint, last_complete_checkpoint


def run(model: str, output: Path, *options: str) -> int:
    process = run_command([*warm_python.interpreter(), str(HELPERS / "killable_run.py"), model, str(output), *options])
    assert process.returncode in (0, -signal.SIGKILL), process.stderr[-3000:]
    return process.returncode


def final_parameters(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "final" / "model.safetensors")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def uninterrupted(model, tmp_path_factory) -> dict[str, torch.Tensor]:
    output = tmp_path_factory.mktemp("uninterrupted")
    assert run(model, output) == 0
    return final_parameters(output)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "where"),
    [(2, "between"), (4, "between"), (4, "inside")],
    ids=["within-an-epoch", "in-a-later-epoch", "after-half-of-the-turn-updates"],
)
def test_killed_run_resumes_to_bit_identical_parameters(step, where, model, uninterrupted, tmp_path):
    assert run(model, tmp_path, "--kill", str(step), where) == -signal.SIGKILL
    assert last_complete_checkpoint(str(tmp_path)).endswith(f"checkpoint-{step}")
    assert run(model, tmp_path, "--resume") == 0
    resumed = final_parameters(tmp_path)
    assert resumed.keys() == uninterrupted.keys()
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in resumed)


@pytest.mark.slow
def test_checkpoint_that_was_not_written_to_its_end_is_passed_over(model, uninterrupted, tmp_path):
    assert run(model, tmp_path, "--kill", "3", "between") == -signal.SIGKILL
    (tmp_path / "checkpoint-3" / "trainer_state.json").unlink()
    assert run(model, tmp_path, "--resume") == 0
    resumed = final_parameters(tmp_path)
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in resumed)


def test_last_complete_checkpoint_needs_a_readable_state(tmp_path):
    assert last_complete_checkpoint(str(tmp_path / "missing")) is None
    for step, state in ((2, '{"global_step": 2}'), (10, '{"global_st'), (11, None)):
        directory = tmp_path / f"checkpoint-{step}"
        directory.mkdir()
        if state is not None:
            (directory / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-best").mkdir()
    found = last_complete_checkpoint(str(tmp_path))
    assert found == str(tmp_path / "checkpoint-2")
    assert json.loads((Path(found) / "trainer_state.json").read_text())["global_step"] == 2


def test_a_new_run_where_another_left_checkpoints_is_warned_of_the_newest(model, tmp_path, caplog):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    said = []
    for resume in (None, None, True):
        caplog.clear()
        make_trainer(model, tmp_path, options).train(resume_from_checkpoint=resume)
        said.append([text for text in caplog.messages if "older run" in text])
    first, second, resumed = said
    assert first == resumed == []
    assert len(second) == 1 and f"the newest {tmp_path / 'checkpoint-2'}: `resume_from_checkpoint=True`" in second[0]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "there is no trainer_state.json in it"),
        (["rng_state.pth"], "there is no trainer_state.json in it"),
        (["trainer_state.json"], "save_only_model"),
        (["trainer_state.json", "rng_state_0.pth", "rng_state_1.pth"], "Resume with as many processes"),
        (["trainer_state.json", "rng_state_0.pth"], "Resume with as many processes"),
    ],
    ids=["empty", "half-written", "model-only", "of-two-processes", "of-two-processes-one-lost"],
)
def test_checkpoint_from_which_a_run_cannot_go_on_exactly_is_refused(files, message, tmp_path):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"Cannot resume from {tmp_path}.*{message}"):
        check_checkpoint(str(tmp_path), Accelerator(cpu=True))
