"""
The next tokens of many rows, sampled as transformers would and with a seed for each response.

The processors of logits, the ends of a response and its longest length come from the model's own `generate`, which is
called for every request up to the point where it would begin to decode. Processors that look at no tokens are applied
to all rows at once, others to the row's own tokens.

A response's `n`-th token takes the `n`-th uniform number of its seed and the distribution's inverse. So it does not
depend on what else is sampled at the time.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import (
    EosTokenCriteria,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessorList,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from .turn_ends import TurnEnds


if TYPE_CHECKING:
    from trl import GRPOTrainer


# Processors that look at the logits alone.
OF_LOGITS = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

BLOCK = 256  # tokens whose probabilities are added up first, so that few sums stand one after the other
PARTS = 2**60  # of which a distribution is made: more than float64 can tell apart, and int64 holds their sum


@dataclass
class Plan:
    """
    How a response is sampled.

    Args:
        of_tokens (`LogitsProcessorList`):
            Processors that look at the tokens of the context and of the response; they come first.
        of_logits (`LogitsProcessorList`):
            Processors that look at the logits alone.
        do_sample (`bool`):
            Whether to sample, not to take the most likely token.
        max_tokens (`int`):
            Most tokens of the response.
        eos_token_ids (`set[int]`):
            Tokens that end it.
        uniforms (`np.ndarray` of shape `(max_tokens,)`):
            A number in [0, 1) for each token.
        token_ids (`torch.Tensor`):
            The context, and room for the response.
        num_sampled (`int`, *optional*, defaults to `0`):
            Tokens of the response so far.
    """

    of_tokens: LogitsProcessorList
    of_logits: LogitsProcessorList
    do_sample: bool
    max_tokens: int
    eos_token_ids: set[int]
    uniforms: np.ndarray
    token_ids: torch.Tensor
    num_sampled: int = 0

    @property
    def tokens_so_far(self) -> torch.Tensor:
        """Context and response as transformers has them, of shape `(1, T)`."""
        return self.token_ids[None, : len(self.token_ids) - self.max_tokens + self.num_sampled]


def plan_response(model: nn.Module, trainer: "GRPOTrainer", ends: TurnEnds, context_ids: list[int], seed: int) -> Plan:
    """
    How a model's `generate` would sample from a context.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy.
        trainer ([`~trl.GRPOTrainer`]):
            The trainer, for its options of generation.
        ends ([`~seeupo_trl.rollout.turn_ends.TurnEnds`]):
            Where turns end.
        context_ids (`list[int]`):
            Token ids.
        seed (`int`):
            Seed of the response, 0 or more.
    """
    found: dict[str, Any] = {}

    def in_place_of_decoding(model: nn.Module, input_ids: torch.Tensor, **prepared: Any) -> torch.Tensor:
        found.update(prepared)
        return input_ids

    with ends.applied_to(trainer):
        input_ids = torch.tensor([context_ids], device=trainer.accelerator.device)
        model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=trainer.generation_config,
            custom_generate=in_place_of_decoding,
        )
    processors, config = found["logits_processor"], found["generation_config"]
    first = len(processors)
    while first and type(processors[first - 1]) in OF_LOGITS:
        first -= 1
    eos_token_ids = set(ends.token_ids)
    for criterion in found["stopping_criteria"]:
        if isinstance(criterion, EosTokenCriteria):
            eos_token_ids.update(criterion.eos_token_id.tolist())
    max_tokens = config.max_length - len(context_ids)
    return Plan(
        LogitsProcessorList(processors[:first]),
        LogitsProcessorList(processors[first:]),
        config.do_sample,
        max_tokens,
        eos_token_ids,
        np.random.default_rng(seed).random(max_tokens),
        nn.functional.pad(input_ids[0], (0, max_tokens)),
    )


def choose(scores: torch.Tensor, plans: list[Plan]) -> list[int]:
    """
    The next token of each row.

    Args:
        scores (`torch.Tensor` of shape `(B, V)`):
            Logits in float32, which are overwritten.
        plans (`list[Plan]`):
            How each row is sampled, by the same options.

    Returns:
        `list[int]`
    """
    for i, plan in enumerate(plans):
        if plan.of_tokens:
            scores[i] = plan.of_tokens(plan.tokens_so_far, scores[i : i + 1])[0]
    no_tokens = torch.empty(len(plans), 0, dtype=torch.long, device=scores.device)
    scores = plans[0].of_logits(no_tokens, scores)
    if plans[0].do_sample:
        uniforms = np.array([plan.uniforms[plan.num_sampled] for plan in plans])
        chosen = invert(scores, torch.from_numpy(uniforms).to(scores.device))
    else:
        chosen = scores.argmax(-1)
    for i, plan in enumerate(plans):
        if plan.of_tokens:
            plan.token_ids[plan.num_sampled - plan.max_tokens] = chosen[i]
        plan.num_sampled += 1
    return chosen.tolist()


def invert(scores: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """
    Tokens at given places of the cumulative distribution.

    Args:
        scores (`torch.Tensor` of shape `(B, V)`):
            Logits.
        uniforms (`torch.Tensor` of shape `(B,)`):
            Numbers in [0, 1), float64.

    Returns:
        `torch.Tensor` of shape `(B,)`

    Raises:
        `ValueError`:
            When logits are NaN.
    """
    probabilities = scores.softmax(-1)
    if probabilities[:, 0].isnan().any():
        raise ValueError(
            "The policy's logits are NaN, or infinite for all tokens: nothing can be sampled. Its parameters may be "
            "NaN after an update (lower `learning_rate`), or it overflows in float16 (use bfloat16)."
        )
    # whole numbers add up exactly, and PyTorch adds them up under `full_determinism` on a GPU, where it refuses others
    parts = probabilities.mul_(PARTS).long()
    parts = nn.functional.pad(parts, (0, -parts.shape[1] % BLOCK))
    blocks = parts.unflatten(1, (-1, BLOCK))  # (B, blocks, BLOCK)
    ends = blocks.sum(-1).cumsum(-1)
    places = torch.minimum((uniforms[:, None] * ends[:, -1:]).long(), ends[:, -1:] - 1)
    block = torch.searchsorted(ends, places, right=True)
    places -= torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)), 0)
    within = blocks[torch.arange(len(block), device=block.device), block[:, 0]].cumsum(-1)
    return (block * BLOCK + torch.searchsorted(within, places, right=True))[:, 0]
