"""
One response for each episode that waits for one.

Generation is a collective operation in some setups (ZeRO-3, vLLM), therefore all processes generate equally often: one
whose episodes have ended generates a throw-away row until all are done.
"""

from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object

from .cached_generation import CachedGeneration
from .episode import Episode
from .turn_ends import TurnEnds


if TYPE_CHECKING:
    from trl import GRPOTrainer


def generate_responses(
    episodes: list[Episode], trainer: "GRPOTrainer", cache: CachedGeneration | None, ends: TurnEnds
) -> list[tuple[list[int], list[float] | None]] | None:
    """
    Sample with the trainer's own backend and settings. To be called on every process, also without episodes.

    Args:
        episodes (`list[Episode]`):
            Episodes of this process in which it is the policy's turn.
        trainer ([`~trl.GRPOTrainer`]):
            The trainer whose policy plays.
        cache ([`~seeupo_trl.rollout.cached_generation.CachedGeneration`], *optional*):
            Keys and values of earlier turns, where they are kept.
        ends ([`~seeupo_trl.rollout.turn_ends.TurnEnds`]):
            Where turns end.

    Returns:
        `list[tuple]`, *optional*:
            For each episode the tokens of its response, up to the end of the turn, and their log-probabilities
            (`None` where the backend reports none); `None` when no process has any episode left.
    """
    accelerator = trainer.accelerator
    counts = [len(episodes)]
    if accelerator.num_processes > 1:
        counts = accelerator.gather(torch.tensor(counts, device=accelerator.device)).tolist()
    most = max(counts)
    if most == 0:
        return None
    rows, keys = [episode.context_ids for episode in episodes], [episode.key for episode in episodes]
    # vLLM's server and its tensor-parallel groups share out responses as if every process had sent as many rows.
    needed = most if trainer.use_vllm else 1
    if min(counts) < needed:
        # All processes wait for a throw-away row too. The answer to a real context ends like the others'; that to
        # anything else may ramble on to `max_completion_length`.
        shortest = min(gather_object([min(rows, key=len)] if rows else []), key=len)
        missing = needed - len(rows)
        rows += [shortest] * missing
        keys += [None] * missing
    with ends.applied_to(trainer):
        if cache is not None:
            completion_ids, logprobs = cache.generate(keys, rows), None
        else:
            completion_ids, logprobs = trainer._generate_single_turn(rows, None, {}, 1)
    if logprobs is None:
        logprobs = [None] * len(rows)
    responses = []
    for ids, logps, _ in zip(completion_ids, logprobs, episodes, strict=False):
        ids = list(ids)
        length = ends.length_of(ids)
        responses.append((ids[:length], None if logps is None else logps[:length]))
    return responses
