"""
Several optimizer steps inside one training step of the Trainer, with all processes in lock step.

What is particular to single process, DDP, FSDP and DeepSpeed lives here. Every method that communicates must be called
equally often on every process.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, fsdp2_prepare_model
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer import grpo_trainer


def check_deepspeed(args: TrainingArguments) -> None:
    """
    Refuse what a DeepSpeed configuration may hold that does not go with several optimizer steps in a training step.

    Batch sizes of a launcher's configuration that agree with the arguments become `"auto"`: transformers would compare
    them with the arguments under which the Trainer runs underneath.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Arguments of the run as the user gave them, whose DeepSpeed configuration comes from `deepspeed=` or from
            the launcher.

    Raises:
        `ValueError`:
            Where the configuration has a `scheduler` section, or batch sizes that disagree with the arguments.
    """
    if args.deepspeed_plugin is None:
        return
    config = args.deepspeed_plugin.deepspeed_config
    if "scheduler" in config:
        raise ValueError(
            "The DeepSpeed configuration has a `scheduler` section. DeepSpeed would step that scheduler at every "
            "optimizer step, of which an iteration makes one for each turn. Remove the section and set "
            "`lr_scheduler_type` and `warmup_steps`: these count iterations."
        )
    if args.deepspeed is not None:
        return  # transformers has compared them already
    rows, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    allowed = {
        "train_micro_batch_size_per_gpu": ("auto", rows),
        "gradient_accumulation_steps": ("auto", steps, 1),  # 1 is what the launcher writes where nothing was said
        "train_batch_size": ("auto", rows * steps * args.world_size),
    }
    for name, values in allowed.items():
        given = config.get(name, "auto")
        if given not in values:
            raise ValueError(
                f"The DeepSpeed configuration has `{name}={given}`, and the training arguments say {values[1]}. "
                'Set it to "auto".'
            )
        config[name] = "auto"


def check_first_engine(trainer: Trainer) -> None:
    """
    Refuse to train with DeepSpeed on a trainer that has an engine already, be it for an evaluation: the Trainer
    destroys it and makes no other one.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer.

    Raises:
        `ValueError`:
            Where there is an engine.
    """
    if trainer.deepspeed is not None:
        raise ValueError(
            "With DeepSpeed, a trainer cannot train after `evaluate()` or a second time. To evaluate before the first "
            "iteration, set `eval_on_start=True`; to train on, make a new trainer."
        )


def keep_output_dtype(accelerator: Accelerator) -> None:
    """
    Let log-probabilities leave a model under FSDP2 as they are.

    accelerate tells FSDP2 to cast what a model returns to the dtype of mixed precision: a log-probability of -8 in
    bfloat16 is off by up to 0.03, and so would be the ratio of a whole turn.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator that has not prepared a model yet.
    """
    if accelerator.is_fsdp2 and accelerator.state.fsdp_plugin.mixed_precision_policy is not None:
        plugin = accelerator.state.fsdp_plugin
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


@contextmanager
def reference_in_layers() -> Iterator[None]:
    """
    While a [`~trl.GRPOTrainer`] is constructed: under FSDP2, shard its reference model layer by layer.

    TRL (1.15 and 1.16) shards it as one unit, so that every forward pass would gather all of it at once: 27.5 GiB of
    each GPU at 14B.
    """
    prepare = grpo_trainer.prepare_fsdp

    def prepare_in_layers(model: PreTrainedModel, accelerator: Accelerator) -> nn.Module:
        if accelerator.is_fsdp2:
            model.requires_grad_(False)  # what is trained would be kept in float32
            model = fsdp2_prepare_model(accelerator, model)
        return prepare(model, accelerator)

    grpo_trainer.prepare_fsdp = prepare_in_layers
    try:
        yield
    finally:
        grpo_trainer.prepare_fsdp = prepare


class UpdateEngine:
    """
    Backward passes and optimizer steps on behalf of a [`~transformers.Trainer`].

    The Trainer itself runs with one micro-batch a step, so it clips, steps and logs once after `training_step`
    returns. Every optimizer step but the last is therefore made here, and the last one is left to it.

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer whose optimizer, gradient clipping and callbacks are used.
        model (`torch.nn.Module`):
            The model that `training_step` got: wrapped for distributed training.
    """

    def __init__(self, trainer: Trainer, model: nn.Module):
        self._trainer = trainer
        self._accelerator = trainer.accelerator
        self._is_deepspeed = trainer.accelerator.distributed_type == DistributedType.DEEPSPEED
        # with sharded parameters, gradients that wait to be reduced would be those of the whole model
        self._reduces_always = (
            self._is_deepspeed
            or trainer.accelerator.is_fsdp2
            or trainer.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        )
        self.model = model

    @property
    def num_processes(self) -> int:
        return self._accelerator.num_processes

    @property
    def device(self) -> torch.device:
        return self._accelerator.device

    def max_over_processes(self, value: int) -> int:
        """Largest `value` of any process."""
        return int(self._accelerator.gather(torch.tensor([value], device=self.device)).max())

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Stack `tensor`, which must have the same shape on every process, along a new first dimension."""
        return self._accelerator.gather(tensor.to(self.device).unsqueeze(0))

    def autocast(self) -> Any:
        """Mixed precision of the run."""
        return self._accelerator.autocast()

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Around a forward pass without gradient."""
        kwargs = self._trainer.args.gradient_checkpointing_kwargs
        with torch.no_grad(), disable_gradient_checkpointing(self._trainer.model, kwargs), self.autocast():
            yield

    @contextmanager
    def micro_batch(self, is_last: bool) -> Iterator[None]:
        """
        Around the forward and backward pass of a micro-batch. Gradients are reduced with the last one; with every one
        under DeepSpeed and FSDP2, or if `accelerator_config` asks for `sync_each_batch`.
        """
        # DeepSpeed reads its accumulation boundary from this flag, and then steps by itself inside `backward`
        self._accelerator.gradient_state._set_sync_gradients(is_last)
        try:
            with nullcontext() if is_last or self._reduces_always else self._accelerator.no_sync(self.model):
                yield
        finally:
            self._accelerator.gradient_state._set_sync_gradients(True)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients. Gradients are averaged over processes, so `loss` is scaled up by their number."""
        kwargs = {"scale_wrt_gas": False} if self._is_deepspeed else {}
        self._accelerator.backward(loss * self.num_processes, **kwargs)

    def step(self) -> float:
        """
        Clip, step the optimizer and clear the gradients.

        Returns:
            `float`:
                Norm of the gradients before clipping.
        """
        trainer = self._trainer
        grad_norm = trainer._clip_grad_norm(self.model) if trainer.args.max_grad_norm > 0 else None
        grad_norm = trainer._get_grad_norm(self.model, grad_norm=grad_norm)
        trainer.control = trainer.callback_handler.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control)
        trainer.optimizer.step()
        trainer.control = trainer.callback_handler.on_optimizer_step(trainer.args, trainer.state, trainer.control)
        self.model.zero_grad()
        return float(grad_norm)
