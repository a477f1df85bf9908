"""What a run that was killed needs to go on exactly where its last whole checkpoint left it."""

import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerState
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length
from transformers.utils import logging
from trl.trainer.utils import RepeatSampler

from .backends import check_first_engine


logger = logging.get_logger(__name__)

TRAINER_STATE_FILE = "trainer_state.json"
ENTROPY_STATE_FILE = "entropy_ctrl_state.json"
REFERENCE_FILE = "reference.safetensors"
_RNG_STATE = re.compile(r"^rng_state(_\d+)?\.pth$")


class ResumableRepeatSampler(RepeatSampler):
    """
    [`~trl.trainer.utils.RepeatSampler`] whose order depends on the epoch alone, so that a run resumed in a later epoch
    sees the order of the uninterrupted run.

    Args:
        state_of_run (`Callable[[], TrainerState]`):
            Returns the state of the Trainer, whose `global_step` tells the first epoch: one step is one batch of
            prompts. Later ones are counted, because a callback may end an epoch early.
    """

    _epoch: int | None = None

    def __init__(self, *args, state_of_run: Callable[[], TrainerState], **kwargs):
        super().__init__(*args, **kwargs)
        self._state_of_run = state_of_run

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            if self._epoch is None:
                self._epoch = self._state_of_run().global_step // (self.num_samples // self.batch_size)
            self.generator.manual_seed(self.seed)
            for _ in range(self._epoch):
                torch.randperm(self.num_samples, generator=self.generator)
            self._epoch += 1
        return super().__iter__()


def last_complete_checkpoint(output_dir: str) -> str | None:
    """
    Newest checkpoint of a run that was written to its end.

    The main process writes the state file when every process has written its part ([`SeeUPOTrainer`] sees to that), so
    a checkpoint whose state file is missing or broken belongs to a run that died while saving; it is passed over with
    a warning.

    Args:
        output_dir (`str`):
            Output directory of the run.

    Returns:
        `str` or `None`:
            Path of the checkpoint, or `None` where there is none.
    """
    pattern = re.compile(rf"^{PREFIX_CHECKPOINT_DIR}-(\d+)$")
    names = os.listdir(output_dir) if os.path.isdir(output_dir) else []
    for name in sorted(filter(pattern.match, names), key=lambda name: -int(pattern.match(name)[1])):
        path = os.path.join(output_dir, name)
        try:
            with open(os.path.join(path, TRAINER_STATE_FILE)) as file:
                json.load(file)
            return path
        except (OSError, json.JSONDecodeError):
            logger.warning(f"Passing over {path}: it was not written to its end.")
    return None


def agree_on_checkpoint(output_dir: str, accelerator: Accelerator) -> str:
    """
    Checkpoint from which all processes resume: the newest whole one that the main process sees. Must be
    called on every process.

    Args:
        output_dir (`str`):
            Output directory of the run.
        accelerator ([`~accelerate.Accelerator`]):
            Communication.

    Returns:
        `str`:
            Path of the checkpoint.

    Raises:
        `ValueError`:
            On every process, where there is no complete checkpoint.
    """
    found = [last_complete_checkpoint(output_dir) if accelerator.is_main_process else None]
    (checkpoint,) = broadcast_object_list(found)
    if checkpoint is None:
        raise ValueError(
            f"`resume_from_checkpoint=True`, but {output_dir} holds no complete checkpoint. Start without it, or give "
            "the path of a checkpoint."
        )
    return checkpoint


def warn_of_older_run(output_dir: str) -> None:
    """Warn before a run begins anew where another one left checkpoints."""
    checkpoint = last_complete_checkpoint(output_dir)
    if checkpoint is not None:
        logger.warning(
            f"Training begins anew, but {output_dir} has checkpoints of an older run, the newest {checkpoint}: "
            "`resume_from_checkpoint=True` would take that one until this run has saved a later one. Use another "
            "`output_dir`, or move the old checkpoints away."
        )


def check_checkpoint(checkpoint: str, accelerator: Accelerator) -> None:
    """
    Refuse a checkpoint from which this run cannot go on exactly. Must be called on every process.

    Args:
        checkpoint (`str`):
            Path of the checkpoint.
        accelerator ([`~accelerate.Accelerator`]):
            Communication.

    Raises:
        `ValueError`:
            On every process, where a process does not see the checkpoint or sees an incomplete one, and where it was
            not written by as many processes as this run has.
    """
    sees = os.path.isfile(os.path.join(checkpoint, TRAINER_STATE_FILE))
    parts = [name for name in os.listdir(checkpoint) if _RNG_STATE.match(name)] if sees else []
    seen_by = gather_object([(sees, parts)])
    blind = [process for process, (sees, _) in enumerate(seen_by) if not sees]
    if len(blind) == len(seen_by):
        raise ValueError(
            f"Cannot resume from {checkpoint}: there is no {TRAINER_STATE_FILE} in it. It was not written to its end, "
            "or is no checkpoint."
        )
    if blind:
        raise ValueError(
            f"Cannot resume from {checkpoint}: processes {blind} do not see it. Checkpoints of several nodes must lie "
            "in a directory that all of them share."
        )
    found = sorted({part for _, parts in seen_by for part in parts})
    if not found:
        raise ValueError(
            f"Cannot resume from {checkpoint}: it holds a model, but no state of the optimizer and of the random "
            "generators (`save_only_model=True`). To start a new run from the model, give this path as `model`."
        )
    # the Trainer's names for the states of the random generators
    count = accelerator.num_processes
    expected = [f"rng_state_{process}.pth" for process in range(count)] if count > 1 else ["rng_state.pth"]
    if set(found) != set(expected):
        raise ValueError(
            f"Cannot resume from {checkpoint} with {count} process{'es' if count > 1 else ''}: it holds the parts "
            f"{', '.join(found)}. Resume with as many processes as it was written by, from a checkpoint that has the "
            "part of each. To start a new run from the model, give this path as `model`."
        )


class PlaceInData(TrainerCallback, ExportableState):
    """Counts passes over the dataset and the batches taken in the present one, and has each checkpoint say them."""

    def __init__(self):
        self.begin_at(0, 0)

    def begin_at(self, passes: int, batches: int) -> None:
        """Count on from a place: where a run begins or is resumed."""
        self._passes, self._batches = passes, batches

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._batches += 1

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.begin_at(self._passes + 1, 0)

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"_passes": self._passes, "_batches": self._batches}}

    @classmethod
    def of(cls, checkpoint: str) -> tuple[int, int] | None:
        """What a checkpoint says; nothing where GRPO or an older version wrote it."""
        callbacks = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_FILE)).stateful_callbacks
        place = callbacks.get(cls.__name__, {}).get("attributes")
        if not place:
            return None
        passes, batches = place["_passes"], place["_batches"]
        is_ended = batches > 0 and callbacks["TrainerControl"]["args"]["should_epoch_stop"]
        return (passes + 1, 0) if is_ended else (passes, batches)


def place_by_epoch(checkpoint: str) -> tuple[int, int]:
    """
    Passes and batches of a checkpoint that does not say them, of a run whose loader has no length: as if it had been
    written within a pass, and not in its last step. `TrainerState.epoch` counts `max_steps` batches as a whole one.
    """
    state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_FILE))
    passes = math.ceil(state.epoch) - 1
    return passes, round((state.epoch - passes) * state.max_steps)


def save_entropy_state(checkpoint: str, coefficient: float, last_entropy: float | None) -> None:
    """
    Write the state of the adaptive entropy bonus as TRL (1.15 and 1.16) does, which writes it when the checkpoint
    counts as whole already: a run killed just then would resume with another coefficient.
    """
    with open(os.path.join(checkpoint, ENTROPY_STATE_FILE), "w") as file:
        json.dump({"entropy_coef": coefficient, "last_world_entropy": last_entropy}, file)


def sharded_reference(args: TrainingArguments, accelerator: Accelerator) -> str | None:
    """
    What shards a reference model that moves (`sync_ref_model=True`), so that no checkpoint holds it: DeepSpeed ZeRO-3
    or FSDP. `None` where nothing does.
    """
    plugin = accelerator.state.deepspeed_plugin
    if args.sync_ref_model and plugin is not None and plugin.zero_stage == 3:
        return "DeepSpeed ZeRO-3"
    if args.sync_ref_model and accelerator.distributed_type == DistributedType.FSDP:
        return "FSDP"
    return None


def check_moving_reference(args: TrainingArguments, accelerator: Accelerator) -> None:
    """Warn before a run that could not be resumed, because its reference moves and is sharded."""
    backend = sharded_reference(args, accelerator)
    if backend is not None:
        warnings.warn(
            f"With `sync_ref_model=True` and {backend} this run cannot be resumed: no checkpoint holds the shards of "
            "the reference model. DDP and DeepSpeed ZeRO-1/2 save it.",
            stacklevel=3,
        )


def save_reference(model: nn.Module, checkpoint: str) -> None:
    """Write a reference model that moves (`sync_ref_model=True`) into a checkpoint."""
    save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, _reference_of(checkpoint))


def load_reference(model: nn.Module, checkpoint: str) -> None:
    """
    Give the reference model the parameters that it had when a checkpoint was written.

    Raises:
        `ValueError`:
            Where the checkpoint has none.
    """
    if not os.path.isfile(_reference_of(checkpoint)):
        raise ValueError(
            f"Cannot resume from {checkpoint} with `sync_ref_model=True`: it holds no {REFERENCE_FILE}, because it "
            "was written without `sync_ref_model`. Resume with `sync_ref_model=False`, or start a new run from the "
            "model."
        )
    saved = load_file(_reference_of(checkpoint))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(saved[name])


def _reference_of(checkpoint: str) -> str:
    return os.path.join(checkpoint, REFERENCE_FILE)


@contextmanager
def dtypes_as_saved(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """
    While an optimizer loads its state: keep the dtypes in which it was saved. PyTorch casts a state to the dtype of
    its parameter, which rounds that of Adafactor: it is float32 beside parameters in bfloat16.
    """
    given: list[dict[str, Any]] = []

    def keep(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        given.append(state_dict)

    def restore(optimizer: torch.optim.Optimizer) -> None:
        saved = given.pop()
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            loaded = optimizer.state[parameter] if number in saved["state"] else {}
            for name, value in loaded.items():
                before = saved["state"][number][name]
                if isinstance(value, torch.Tensor) and value.dtype != before.dtype:
                    loaded[name] = before.to(value.device)

    hooks = [
        optimizer.register_load_state_dict_pre_hook(keep),
        optimizer.register_load_state_dict_post_hook(restore),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def discard_state(checkpoint: str) -> None:
    """Take back the word that a checkpoint is whole, before its files are written again."""
    with suppress(FileNotFoundError):
        os.remove(os.path.join(checkpoint, TRAINER_STATE_FILE))


def save_between_iterations(callbacks: list[TrainerCallback]) -> None:
    """Have `enable_jit_checkpoint` save between iterations only: within one, not all turns are updated."""
    for callback in callbacks:
        if isinstance(callback, JITCheckpointCallback):
            callback.on_pre_optimizer_step = lambda *args, **kwargs: None


class ExactResume:
    """
    What a [`~trl.GRPOTrainer`] does to resume exactly; a base class that stands before it.
    """

    def _get_train_sampler(self, dataset: Dataset | None = None) -> ResumableRepeatSampler:
        return ResumableRepeatSampler(
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
            state_of_run=lambda: self.state,
        )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """
        Main training entry point, see [`~transformers.Trainer.train`]. With `resume_from_checkpoint=True` it resumes
        from the newest checkpoint that was written to its end. A checkpoint that was not, one without the state of
        every process (`save_only_model=True`), one of another number of processes, and with `sync_ref_model=True` one
        without the reference model are refused.
        """
        check_first_engine(self)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = agree_on_checkpoint(self.args.output_dir, self.accelerator)
        if resume_from_checkpoint:
            check_checkpoint(resume_from_checkpoint, self.accelerator)
            backend = sharded_reference(self.args, self.accelerator)
            if backend is not None:
                raise ValueError(
                    f"Cannot resume from {resume_from_checkpoint} with `sync_ref_model=True` and {backend}: it does "
                    "not hold the shards of the reference model, and the KL would be another one. Resume with "
                    "`sync_ref_model=False`, or start a new run from the model."
                )
            if self.args.sync_ref_model:
                load_reference(self.accelerator.unwrap_model(self.ref_model), resume_from_checkpoint)
        elif self.accelerator.is_main_process:
            warn_of_older_run(self.args.output_dir)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _init_training_state(
        self, max_steps: int, steps_in_epoch: int, num_epochs: int, checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        place = super()._init_training_state(max_steps, steps_in_epoch, num_epochs, checkpoint, trial)
        self.state.stateful_callbacks.setdefault(PlaceInData.__name__, {})  # a checkpoint of GRPO's has none
        if checkpoint is not None and not has_length(self.train_dataset):
            said = PlaceInData.of(checkpoint)
            if said is None and steps_in_epoch == max_steps:  # of a loader without a length
                # the Trainer would skip as many batches of the first pass as the run has taken in all
                said = place_by_epoch(checkpoint)
            place = said or place
        passes, batches = place
        self._place_in_data.begin_at(passes, batches)
        return passes, 0 if self.args.ignore_data_skip else batches

    def get_batch_samples(self, *args, **kwargs) -> tuple[list, Any]:
        if self.state.global_step >= self.state.max_steps:
            # resumed when it was finished: the Trainer would go on to the end of the epoch
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)  # both load shards, in ways of their own
            return
        with dtypes_as_saved(self.optimizer.optimizer):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:
            discard_state(
                os.path.join(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            )
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.use_adaptive_entropy and self.args.should_save:
            save_entropy_state(output_dir, self.entropy_coef, self._last_world_entropy)
        is_whole = sharded_reference(self.args, self.accelerator) is None
        if self.args.sync_ref_model and self.args.should_save and is_whole:
            save_reference(self.accelerator.unwrap_model(self.ref_model), output_dir)
        # the state file, which is written next, says that the checkpoint is whole: on every process
        self.accelerator.wait_for_everyone()
