"""What DeepSpeed, FSDP2 and Gloo may not do to a run, and what they are told before it starts."""

import atexit
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
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


GLOO_SECONDS = 0.2


@cache
def let_gloo_finish() -> None:
    """
    Let the threads of Gloo finish before the interpreter ends.

    A thread that gives back the tensors of the last collective needs the interpreter's lock. One that waits for it
    when the interpreter ends takes the process with it (`terminate called without an active exception`, exit code
    -6), or the process waits for it forever, after all work was done. `destroy_process_group` does not wait for these
    threads where a model was wrapped in DDP (PyTorch 2.13), and nobody can ask whether they are done.
    """
    atexit.register(time.sleep, GLOO_SECONDS)
