"""What a run cannot do in its precision, said before it starts."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, is_peft_model


if TYPE_CHECKING:
    from trl import GRPOTrainer


LOW_PRECISION = (torch.bfloat16, torch.float16)
# "fp8": what stays out of it
_MIXED_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
# Turns longer than this get other weights than they should from a correction of whole sequences: at a mismatch of 0.02
# a token the logs of their weights have a standard deviation of 0.63.
LONG_TURN = 1000


def compute_dtype(accelerator: Accelerator, dtype: torch.dtype) -> torch.dtype:
    """
    Dtype of the matrix products of a run whose weights have some dtype. Mixed precision comes from the arguments or
    from the launcher.
    """
    return _MIXED_PRECISION.get(accelerator.mixed_precision, dtype)


def keeps_master_weights(trainer: "GRPOTrainer") -> bool:
    """Whether an optimizer step is made in float32, whatever the dtype in which the model was loaded."""
    accelerator = trainer.accelerator
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return True  # it keeps master weights itself
    # accelerate casts what FSDP trains to float32 where there is mixed precision
    return accelerator.distributed_type == DistributedType.FSDP and accelerator.mixed_precision != "no"


@contextmanager
def weights_given_back(trainer: "GRPOTrainer") -> Iterator[None]:
    """
    Around an evaluation: where the Trainer casts the model to 16 bits for it (`bf16_full_eval`, outside training), the
    model gets its parameters and buffers back as they were. Meanwhile they are in the memory of the host.

    DeepSpeed and FSDP have the parameters in shards of their own, and are left alone.
    """
    args, accelerator = trainer.args, trainer.accelerator
    casts = (args.bf16_full_eval or args.fp16_full_eval) and not trainer.is_in_train
    is_sharded = accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)
    modules = list(trainer.model.modules()) if casts and not is_sharded else []
    cast_to = torch.float16 if args.fp16_full_eval else torch.bfloat16

    def changes(tensor: torch.Tensor) -> bool:
        return tensor.is_floating_point() and tensor.dtype != cast_to

    parameters = {p: p.data.cpu() for m in modules for p in m.parameters(recurse=False) if changes(p)}
    buffers = [(m, name, b.cpu()) for m in modules for name, b in m.named_buffers(recurse=False) if changes(b)]
    try:
        yield
    finally:
        for parameter, value in parameters.items():
            parameter.data = value.to(parameter.device)
        for module, name, value in buffers:
            setattr(module, name, value.to(getattr(module, name).device))


def check_precision(trainer: "GRPOTrainer") -> None:
    """
    Warn of what a run's options promise and its precision does not keep.

    Args:
        trainer ([`~seeupo_trl.SeeUPOTrainer`]):
            A trainer that has been constructed.
    """
    for message in _promises_not_kept(trainer):
        warnings.warn(message, stacklevel=3)


def _promises_not_kept(trainer: "GRPOTrainer") -> list[str]:
    args, model = trainer.args, trainer.model
    messages = []
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    if trained & set(LOW_PRECISION) and not keeps_master_weights(trainer):
        name = str(next(iter(trained & set(LOW_PRECISION)))).removeprefix("torch.")
        messages.append(
            f"The parameters that are trained are {name}, and nothing keeps a float32 copy of them: an update smaller "
            "than 1/256 of a weight is rounded away (at a learning rate of 1e-6 AdamW moves 2% of the entries in ten "
            'steps). Load the model in float32 (`model_init_kwargs={"dtype": "float32"}`, in the examples `dtype: '
            "float32`) with `bf16=True`, train LoRA adapters, or use DeepSpeed or FSDP2 with `bf16=True`."
        )
    is_low = compute_dtype(trainer.accelerator, model.dtype) in LOW_PRECISION
    products = {
        "loss_type='vespo'": args.loss_type == "vespo",
        "turn_ratio='product'": args.turn_ratio == "product",
        "surrogate_ratio='product'": args.surrogate_ratio == "product",
    }
    chosen = " and ".join(f"`{option}`" for option, is_chosen in products.items() if is_chosen)
    if is_low and chosen:
        messages.append(
            f"{chosen} multiplies the ratios of all tokens of a turn, and the model computes in 16 bits: rounding "
            "alone moves the log of such a ratio by about 0.03 times the square root of the number of tokens (0.3 at "
            "100 tokens), more than an update does. `ratio/noise_floor` in the log is what it does to a "
            "length-normalised ratio. Use 'geometric', or compute in float32."
        )
    if args.use_vllm and is_peft_model(model):
        messages.append(
            "vLLM samples from the base weights with the adapter added, rounded to its own dtype: in bfloat16 about a "
            "quarter of a change of 1e-5 (root mean square) survives that, and four fifths of one of 4e-5, so early "
            "in the run it samples from a policy between the base model and the one that is trained. "
            "`sampling/sampling_logp_difference` in the log says how far off it is; the correction for the sampler "
            "(`vllm_importance_sampling_correction`) accounts for it."
        )
    corrects = args.use_vllm and args.vllm_importance_sampling_correction
    if corrects and args.vllm_importance_sampling_mode.startswith("sequence"):
        if args.max_completion_length is not None and args.max_completion_length > LONG_TURN:
            messages.append(
                f"`vllm_importance_sampling_mode={args.vllm_importance_sampling_mode!r}` multiplies the ratios of all "
                f"tokens of a turn, and turns have up to {args.max_completion_length}: where vLLM and the policy "
                "differ by 0.02 a token, weights are off by a factor of 1.9 at 1,000 tokens and 3.5 at 4,000, and "
                "turns get a weight of 0 for no reason (`sampling/masked_*` in the log). Use 'token_truncate'."
            )
    return messages
