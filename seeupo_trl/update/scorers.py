"""What scores the policy and the reference of a trainer."""

from contextlib import nullcontext
from functools import partial
from typing import Any

from accelerate.utils import is_peft_model
from torch import nn
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head, use_adapter

from ..distributed.precision import LOW_PRECISION, compute_dtype
from ..scoring.causal_lm import causal_lm_of
from ..scoring.images import SampleScorer
from ..scoring.interface import Scorer
from ..scoring.trees import TreeScorer
from .log_probs import Reference


class Scorers:
    """
    The scorers of a trainer's models.

    Args:
        trainer ([`~seeupo_trl.SeeUPOTrainer`]):
            The trainer, constructed but for this.
    """

    def __init__(self, trainer: GRPOTrainer):
        self._trainer = trainer
        config = trainer.args
        for model, outputs in ((trainer.model, ("log_probs", "entropy")), (trainer.ref_model, ("log_probs",))):
            if model is not None and config.cast_lm_head_to_fp32 is None:
                _compute_logits_in_float32(trainer, trainer.accelerator.unwrap_model(model), outputs)
        options = {
            "pad_token_id": trainer._tokenizer.pad_token_id,
            "temperature": config.temperature,
            "pad_to_multiple_of": trainer.pad_to_multiple_of,
            "max_tokens": config.max_tokens_per_microbatch,
            "packing": config.packing,
            "device": trainer.accelerator.device,
        }
        self.policy = TreeScorer(trainer.model, aux_loss=trainer.aux_loss_enabled, **options)
        if trainer.ref_model is not None:
            self._reference = TreeScorer(trainer.accelerator.unwrap_model(trainer.ref_model), **options)

    def of_policy(self, batch: dict[str, Any]) -> Scorer:
        """Scorer of the policy for a generation batch, which holds the images where there are any."""
        return self._of_samples(batch, self._trainer.aux_loss_enabled) if self._trainer._is_vlm else self.policy

    def reference(self, batch: dict[str, Any]) -> Reference | None:
        """The reference policy for a generation batch; `None` without a KL term."""
        trainer = self._trainer
        if trainer.beta == 0.0:
            return None
        if trainer.ref_model is not None:
            scorer = self._of_samples(batch, entropy=False) if trainer._is_vlm else self._reference
            return Reference(scorer, trainer.ref_model, nullcontext)
        policy = trainer.accelerator.unwrap_model(trainer.model)
        if not is_peft_model(policy):
            raise ValueError(
                f"`beta` was set to {trainer.beta} in the run, but there is no reference model: it is loaded when the "
                "trainer is made with a `beta` other than 0. Start with the `beta` you need, however small."
            )
        adapter_name = "ref" if "ref" in policy.peft_config else None
        return Reference(self.of_policy(batch), trainer.model, partial(use_adapter, policy, adapter_name))

    def _of_samples(self, batch: dict[str, Any], aux_loss: bool = False, entropy: bool = True) -> SampleScorer:
        trainer = self._trainer
        return SampleScorer(
            batch,
            trainer._get_per_token_logps_and_entropies,
            aux_loss=aux_loss,
            entropy=entropy,
            max_tokens=trainer.args.max_tokens_per_microbatch,
        )


def _compute_logits_in_float32(trainer: GRPOTrainer, model: nn.Module, outputs: tuple[str, ...]) -> None:
    """
    Where a model computes in 16 bits, have TRL's fused head compute in float32, tile by tile and from the weights as
    they are: logits rounded to bfloat16 put an error of about 0.03 on the log-probability of a token.
    """
    causal_lm = causal_lm_of(model)
    if compute_dtype(trainer.accelerator, causal_lm.dtype) in LOW_PRECISION:
        add_fused_lm_head(causal_lm, trainer.temperature, cast_lm_head_to_fp32=True, outputs=outputs)
