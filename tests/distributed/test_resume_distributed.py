"""
A run that loses a process ends with an error, soon, and goes on from its last whole checkpoint as if nothing had
happened.

The policy draws its tokens, the optimizer has momentum and the learning rate a schedule: all of them must be restored,
on every process.
"""

import shutil
from functools import cache
from typing import NamedTuple

import pytest
import torch
from launching import Finished, launch
from tiny import save_tiny_model

from seeupo_trl.distributed.checkpoints import last_complete_checkpoint


pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow

OPTIONS = {
    "plays": True,
    "top_k": 0,
    "optim": "adamw_torch",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "weight_decay": 0.01,
    "beta": 0.1,
    "save_strategy": "steps",
    "save_steps": 1,
}
# where a checkpoint holds a reference that moves, it does
MOVING_REFERENCE = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}
WITH_MOVING_REFERENCE = ("ddp", "zero2")
BACKENDS = ("ddp", "zero2", "zero3", "zero3_offload", "fsdp2")
KILLED_AT = 2  # of four iterations
SECONDS_TO_END = 120  # about 5 on an idle machine; PyTorch's launcher gives processes 30 to end by themselves


class Story(NamedTuple):
    """
    First launch: a run to its end, and one that dies. Second launch: that one resumed, one of which a process's part
    of the checkpoint is lost, and one that dies saving.
    """

    first: Finished
    second: Finished
    found: str | None


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    model = save_tiny_model(tmp_path_factory.mktemp("model"))

    @cache
    def tell(backend: str) -> Story:
        output = tmp_path_factory.mktemp(backend)
        options = {**OPTIONS, "model": model, **(MOVING_REFERENCE if backend in WITH_MOVING_REFERENCE else {})}
        whole = {**options, "name": "whole"}
        dying = {**options, "name": "dying", "kill": {"step": KILLED_AT, "process": 1}}
        first = launch(output, backend, 2, [whole, dying])
        checkpoints = output / "dying"
        found = last_complete_checkpoint(str(checkpoints))
        # what a run leaves that dies while it saves the next checkpoint: shards of some processes, no state
        half_written = checkpoints / f"checkpoint-{KILLED_AT + 1}"
        shutil.copytree(checkpoints / f"checkpoint-{KILLED_AT}", half_written)
        (half_written / "trainer_state.json").unlink()
        (half_written / "latest").unlink(missing_ok=True)
        next(half_written.glob("rng_state_1*")).unlink()
        lost = output / "lost" / f"checkpoint-{KILLED_AT}"
        shutil.copytree(checkpoints / f"checkpoint-{KILLED_AT}", lost)
        next(lost.glob("rng_state_1*")).unlink()
        resumed = {**options, "name": "dying", "resume": True}
        incomplete = {**options, "name": "lost", "resume": True, "refused": True}
        moving = {**resumed, **MOVING_REFERENCE, "refused": True, "name": "moving"}
        shutil.copytree(checkpoints / f"checkpoint-{KILLED_AT}", output / "moving" / f"checkpoint-{KILLED_AT}")
        saving = {**options, "name": "saving", "kill_while_saving": {"step": 2, "process": 1}}
        sharded = [] if backend in WITH_MOVING_REFERENCE else [moving]
        return Story(first, launch(output, backend, 2, [resumed, incomplete, *sharded, saving]), found)

    return tell


@pytest.mark.parametrize("backend", BACKENDS)
def test_lost_process_ends_the_run_with_an_error_soon(backend, story):
    first = story(backend).first
    assert first.returncode != 0
    assert "Signal 9 (SIGKILL)" in first.stderr
    killed = float((first.output / "dying" / "killed").read_text())
    assert first.end - killed < SECONDS_TO_END


@pytest.mark.parametrize("backend", BACKENDS)
def test_resumed_run_ends_with_the_parameters_of_the_uninterrupted_run(backend, story):
    first, second, found = story(backend)
    assert found == str(first.output / "dying" / f"checkpoint-{KILLED_AT}")
    expected, actual = first.parameters("whole"), second.parameters("dying")
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    last, reference = second.logs("dying")[-2], first.logs("whole")[-2]
    for name in ("loss", "reward", "grad_norm", "learning_rate", "num_tokens", "turns/mean"):
        assert last[name] == reference[name], name


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend not in WITH_MOVING_REFERENCE])
def test_reference_that_moves_in_shards_is_not_resumed(backend, story):
    notes = story(backend).second.notes("moving")
    name = "FSDP" if backend == "fsdp2" else "DeepSpeed ZeRO-3"
    assert all(f"`sync_ref_model=True` and {name}: it does not hold the shards" in note["error"] for note in notes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpoint_that_one_process_did_not_finish_is_not_resumed_from(backend, story):
    second = story(backend).second
    assert second.returncode != 0
    runs = second.output / "saving"
    assert (runs / "killed").exists()
    assert list((runs / "checkpoint-2").glob("rng_state_0*"))
    assert last_complete_checkpoint(str(runs)) == str(runs / "checkpoint-1")


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpoint_that_lost_the_part_of_one_process_is_refused_by_all(backend, story):
    notes = story(backend).second.notes("lost")
    assert len(notes) == 2
    assert all("it holds the parts rng_state_0.pth" in note["error"] for note in notes)
