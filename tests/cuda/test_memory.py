"""Memory and time of a micro-batch on a card, beside the plan."""

import warnings
from time import perf_counter

import pytest
import torch
from cards import on_a_card
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl.trainer.utils import add_fused_lm_head

from seeupo_trl.plan.activations import Pass, trace_pass
from seeupo_trl.scoring.trees import TreeScorer
from seeupo_trl.scoring.turn_buffer import TurnBuffer
from seeupo_trl.trajectory import Trajectory, Turn


TOKENS = 32_768


def wide_model(heads: int) -> Qwen3ForCausalLM:
    """Four layers in Qwen3-14B's proportions, or with as many heads as a power of two."""
    config = Qwen3Config(
        vocab_size=32_000,
        hidden_size=128 * heads,
        intermediate_size=435 * heads,
        num_hidden_layers=4,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=65_536,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Qwen3ForCausalLM(config).bfloat16().train()
    add_fused_lm_head(model, cast_lm_head_to_fp32=True, outputs=("log_probs", "entropy"))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def tree_of(scorer, num_tokens: int):
    """A group of eight whose prompt is four fifths of the tree."""
    prompt, own = [5] * (num_tokens * 4 // 5), num_tokens // 40
    buffer = TurnBuffer([Trajectory([Turn(prompt, [6 + i] * own)]) for i in range(8)])
    (batch,) = scorer.micro_batches(buffer, [(i, 1) for i in range(8)], 8)
    return batch


def train_on(scorer, model, batch):
    with scorer.attention(batch):
        sum(score.logps.sum() for score in scorer.score(model, batch)[0].values()).backward()


@on_a_card
@pytest.mark.parametrize("heads", [32, 40])
def test_the_peak_of_a_pass_is_at_most_what_the_plan_says(heads):
    model = wide_model(heads)
    scorer = TreeScorer(model, 0, 1.0, packing="tree")
    batch = tree_of(scorer, TOKENS)
    train_on(scorer, model, tree_of(scorer, 4096))  # compiles, and makes the gradients that stay
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    train_on(scorer, model, batch)
    measured = torch.cuda.max_memory_allocated() - before
    one = Pass(batch.num_tokens, len(batch.scored()[0]), keeps_gradients=True, float32_head=True)
    # the plan counts the gradients among what a pass makes
    planned = trace_pass(model.config, one).peak
    assert measured <= 1.05 * planned


@on_a_card
def test_the_card_is_busy_and_the_host_waits_rarely():
    model = wide_model(40)
    scorer = TreeScorer(model, 0, 1.0, packing="tree")
    batch = tree_of(scorer, TOKENS)
    for _ in range(2):
        train_on(scorer, model, batch)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            train_on(scorer, model, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in record if "synchroniz" in str(warning.message)]
    assert len(waits) <= 20
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        start = perf_counter()
        train_on(scorer, model, batch)
        torch.cuda.synchronize()
        seconds = perf_counter() - start
    busy = sum(event.self_device_time_total for event in profiler.key_averages()) / 1e6
    assert busy / seconds > 0.9
