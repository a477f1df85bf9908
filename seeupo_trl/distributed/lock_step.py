"""
Several optimizer steps inside one training step of the Trainer, with all processes in lock step.

What is particular to single process, DDP, FSDP and DeepSpeed lives here. Every method that communicates must be called
equally often on every process.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import Trainer, TrainerCallback
from trl.models.utils import disable_gradient_checkpointing


class IdleStep(TrainerCallback):
    """
    An iteration without an update: neither momentum nor weight decay may move the parameters, so the Trainer's own
    optimizer step is skipped.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            That of the Trainer.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator

    def begin(self, model: nn.Module) -> None:
        """Skip the next optimizer step. Callbacks that read gradients find zeros, where parameters are whole."""
        self._accelerator.gradient_state._set_sync_gradients(False)
        if self._accelerator.distributed_type == DistributedType.DEEPSPEED or self._accelerator.is_fsdp2:
            return
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def on_optimizer_step(self, *args, **kwargs) -> None:
        """The flag is that of all accelerators of the process, whose optimizers must step again."""
        self._accelerator.gradient_state._set_sync_gradients(True)


class LockStep:
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

    def loss_context(self) -> Any:
        """What the Trainer, or a script that overrides it, has around a forward pass and its loss."""
        return self._trainer.compute_loss_context_manager()

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
        under DeepSpeed and FSDP2, or if `accelerator_config` asks for `sync_each_batch`. Callbacks hear of the others'
        end, as in the Trainer.
        """
        # DeepSpeed reads its accumulation boundary from this flag, and then steps by itself inside `backward`
        self._accelerator.gradient_state._set_sync_gradients(is_last)
        try:
            with nullcontext() if is_last or self._reduces_always else self._accelerator.no_sync(self.model):
                yield
        finally:
            self._accelerator.gradient_state._set_sync_gradients(True)
        if not is_last:
            trainer = self._trainer
            trainer.control = trainer.callback_handler.on_substep_end(trainer.args, trainer.state, trainer.control)

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
