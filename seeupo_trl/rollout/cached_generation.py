"""
Generation over many turns on the transformers backend, with the keys and values of earlier turns kept.

TRL's call encodes the whole context of every episode again in every turn. Here a turn computes its new tokens only,
and what contexts have in common (the prompt of a group) is computed once. A context that was rewritten between turns
uses what it still shares with the tokens before.

Sampling stays TRL's and transformers': `GRPOTrainer._generate_single_turn` runs as ever, and its call of
`model.generate` gets the very same tokens and mask, with a cache of all but the last token. So every sampling setting
means what it means in TRL, and the same seed gives the same tokens, up to rounding.

Keys and values belong to the parameters they were computed with: one object serves one rollout.
"""

import functools
import logging
from collections.abc import Hashable, Iterable, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, register_fsdp_forward_method
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from ..scoring.causal_lm import causal_lm_of
from ..scoring.tree_attention import reason_against_trees
from .key_values import CachedSequence, as_batch, as_rows, cache_argument, compute, into_batches, share_beginnings
from .turn_ends import replaced


if TYPE_CHECKING:
    from trl import GRPOTrainer


logger = logging.getLogger(__name__)

# Options of `generate` that have a say in its cache, with the values that leave it as it is needed here.
CACHE_OPTIONS: dict[str, tuple[Any, ...]] = {
    "cache_implementation": (None, "dynamic"),
    "prefill_chunk_size": (None,),
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "penalty_alpha": (None, 0),
    "dola_layers": (None,),
    "prompt_lookup_num_tokens": (None,),
    "guidance_scale": (None, 1),
    "token_healing": (None, False),
}


class CachedGeneration:
    """
    The responses of one rollout, generated with keys and values that are kept from turn to turn.

    Those of an episode that waits for its environment take no padding. While responses are generated they form one
    left-padded batch, as in TRL's own call; changing between the two forms takes the memory of one more layer.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            The trainer whose policy and sampling settings are used. Its parameters must not change while the object
            is in use.

    Raises:
        ValueError: If the trainer's setup is not supported, see [`reason_against_cache`].
    """

    def __init__(self, trainer: "GRPOTrainer"):
        reason = reason_against_cache(trainer)
        if reason is not None:
            raise ValueError(f"Keys and values cannot be kept from turn to turn, because {reason}.")
        self.trainer = trainer
        self._sequences: dict[Hashable, CachedSequence] = {}

    @staticmethod
    def supports(trainer: "GRPOTrainer") -> bool:
        """
        Whether keys and values can be kept from turn to turn. Where they cannot on the transformers backend, the
        reason is logged once; TRL's own call samples from the same distribution there, at a higher cost.

        Args:
            trainer ([`~trl.GRPOTrainer`]):
                The trainer.
        """
        reason = reason_against_cache(trainer)
        if reason is not None and not trainer.use_vllm:
            log_once(f"Every turn encodes its whole context again, because {reason}.")
        return reason is None

    def generate(self, keys: Sequence[Hashable], contexts: list[list[int]]) -> list[list[int]]:
        """
        Generate one response for each context. A collective operation: every process calls it equally often, with at
        least one context.

        Args:
            keys (`Sequence[Hashable]`):
                The episode of each context, each at most once. `None` marks a throw-away row, of which nothing is
                kept; several rows may be `None`.
            contexts (`list[list[int]]`):
                Token ids, at least one each. They need not extend what the episode had before.

        Returns:
            `list[list[int]]`:
                Token ids of the responses, up to and including an end-of-sequence token: what
                `GRPOTrainer._generate_single_turn` returns.
        """
        model = self.trainer.accelerator.unwrap_model(self.trainer.model_wrapped)
        generate = model.generate
        batches: list[tuple[DynamicCache, int]] = []

        def generate_from_cache(input_ids: torch.Tensor, generation_config: GenerationConfig, **inputs: Any) -> Any:
            if batches or len(input_ids) != len(contexts):
                raise RuntimeError(
                    "Keys and values can be kept from turn to turn only if the trainer's `_generate_single_turn` "
                    f"calls `model.generate` once, for all {len(contexts)} contexts; it called it with "
                    f"{len(input_ids)}."
                )
            width = input_ids.shape[1]
            cache = self._encode(causal_lm_of(model), keys, contexts, width - 1)
            batches.append((cache, width))
            generation_config = copy(generation_config)
            generation_config.use_cache = True  # models are configured without for training
            inputs[cache_argument(causal_lm_of(model))] = cache
            return generate(input_ids=input_ids, generation_config=generation_config, **inputs)

        with replaced(model, generate=generate_from_cache):
            # FSDP 2 gathers what no layer holds around a forward pass of the whole model; with an adapter, the passes
            # are those of the model in it. Does nothing to other models.
            register_fsdp_forward_method(model, "generate")
            responses, _ = self.trainer._generate_single_turn(contexts, None, {}, 1)
        for cache, width in batches:  # none where a subclass of the trainer generates by other means
            self._keep(keys, contexts, responses, cache, width)
        return responses

    def forget(self, keys: Iterable[Hashable]) -> None:
        """
        Free the memory of episodes that have ended.

        Args:
            keys (`Iterable[Hashable]`):
                Their keys. Unknown ones are ignored.
        """
        for key in keys:
            self._sequences.pop(key, None)

    def _encode(
        self, model: nn.Module, keys: Sequence[Hashable], contexts: list[list[int]], width: int
    ) -> DynamicCache:
        """Keys and values of the contexts without their last tokens, as a left-padded batch."""
        sequences = self._plan(keys, contexts)
        distinct = list(dict.fromkeys(sequences))
        waves = [share_beginnings(distinct), distinct]
        count = most = sum(len(into_batches(wave)) for wave in waves)
        accelerator = self.trainer.accelerator
        if accelerator.num_processes > 1:  # where parameters are sharded, a forward pass is a collective operation
            most = int(accelerator.gather(torch.tensor([count], device=accelerator.device)).max())
        for wave in waves:
            for sequence in wave:
                if sequence.num_new == 0:
                    sequence.layers = sequence.take_from_source()
            for batch in into_batches(wave):
                compute(model, batch, accelerator.device)
        for _ in range(most - count):
            compute(model, [CachedSequence(np.array(contexts[0][:1]))], accelerator.device)
        return as_batch([sequence.layers for sequence in sequences], width)

    def _plan(self, keys: Sequence[Hashable], contexts: list[list[int]]) -> list[CachedSequence]:
        """What to compute for each context, given what is there. Equal contexts get the same sequence."""
        known = dict(self._sequences)
        self.forget(keys)
        sequences: dict[bytes, CachedSequence] = {}
        plan = []
        for key, context in zip(keys, contexts, strict=True):
            tokens = np.array(context[:-1], dtype=np.int64)
            name = tokens.tobytes()
            if name not in sequences:
                sequences[name] = CachedSequence(tokens)
                # an episode's own past; in its first turn that of any other, which may be of its group
                for source in [known[key]] if key in known else known.values():
                    sequences[name].consider(source)
            plan.append(sequences[name])
        return plan

    def _keep(
        self,
        keys: Sequence[Hashable],
        contexts: list[list[int]],
        responses: list[list[int]],
        cache: DynamicCache,
        width: int,
    ) -> None:
        """Keep the keys and values of contexts and responses. Those of the very last token were not needed yet."""
        computed = cache.get_seq_length()
        starts = [width - len(context) for context in contexts]
        ends = [min(width + len(response), computed) for response in responses]
        layers = as_rows(cache, list(zip(starts, ends, strict=True)))
        for i, key in enumerate(keys):
            if key is not None:
                tokens = np.array(contexts[i] + responses[i], dtype=np.int64)
                self._sequences[key] = CachedSequence(tokens[: ends[i] - starts[i]], layers=layers[i])


def reason_against_cache(trainer: "GRPOTrainer") -> str | None:
    """
    Why keys and values cannot be kept from turn to turn, as far as a trainer's setup tells.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            The trainer.

    Returns:
        `str`, *optional*:
            The reason; `None` where they can: on the transformers backend, with a text model in which every layer
            attends to all earlier positions, and plain sampling or greedy search.
    """
    if trainer.use_vllm:
        return "vLLM has a cache of its own"
    if trainer.use_transformers_continuous_batching:
        return "continuous batching has a cache of its own"
    if isinstance(trainer.model_wrapped, FullyShardedDataParallel):
        return "FSDP 1 is not supported, which has its own way of generating; FSDP 2 is"
    reason = reason_against_trees(trainer.accelerator.unwrap_model(trainer.model))
    if reason is not None:
        return f"the model is not one of full attention over text: {reason}"
    model = causal_lm_of(trainer.accelerator.unwrap_model(trainer.model))
    if model.is_remote_code():
        return "the model's code comes from the Hub"
    if not model._supports_default_dynamic_cache() or any(
        type(layer) is not DynamicLayer for layer in DynamicCache(config=model.config).layers
    ):
        return "the model has a cache of its own kind"
    for name, usual in CACHE_OPTIONS.items():
        values = [getattr(config, name, None) for config in (trainer.generation_config, model.generation_config)]
        value = next((value for value in values if value is not None), None)
        if value not in usual:
            return f"`{name}={value!r}` needs a cache of its own"
    if trainer.generation_config.use_cache is False:
        return "`use_cache=False` was asked for"
    return None


@functools.cache
def log_once(message: str) -> None:
    """Warn of something, once in a process."""
    logger.warning(message)
