"""The formula of `benchmarks/scale.py`."""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl.trainer.utils import add_fused_lm_head


sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import scale
from update_schedules import Shape

from seeupo_trl.scoring.trees import TreeScorer


CONFIG = Qwen3Config(
    vocab_size=500,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    tie_word_embeddings=False,
)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_of_a_pass_are_those_that_pytorch_counts(checkpointing):
    with torch.device("meta"):
        model = Qwen3ForCausalLM(CONFIG).double().train()  # float64: the plain head, without recomputation
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    scorer = TreeScorer(model, 0, 1.0, packing="tree")
    buffer = scale.episodes_of(Shape(60, 10, 5, 3), 4, CONFIG.vocab_size).buffer
    (batch,) = scorer.micro_batches(buffer, [(index, 3) for index in range(4)], max_rows=4)
    sizes = scale.Model.of(CONFIG, checkpointing)
    with scorer.attention(batch), FlopCounterMode(display=False) as counter:
        scores, _ = scorer.score(model, batch)
        sum(score.logps.sum() for score in scores.values()).backward()
    recomputed_head = 2 * sizes.head * scale.num_scored(batch)
    assert sizes.flops(batch, True) - recomputed_head == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_the_bottleneck_moves_to_a_slow_network():
    model = scale.Model.of(CONFIG)
    config = scale.update_config(400, 8, None)
    work = scale.work_of(scale.episodes_of(Shape(100, 10, 5, 4), 8), config, model, scale.scorer_for(400))
    assert work.optimizer_steps == 4 and len(work.flops) >= 4 and all(grad for _, grad in work.flops)
    big = scale.Model(body=13_000_000_000, embedding=0, head=0, layers=40, attention=5120)
    work = scale.Work([(1e15, True)] * 4, 4, 0)
    fast, slow = scale.Hardware(), scale.Hardware(network=1e9)
    one_node, two_nodes = (scale.update_seconds(work, big, gpus, slow, True) for gpus in (8, 16))
    assert scale.bottleneck(one_node) == "compute" and scale.bottleneck(two_nodes) == "gathers"
    assert two_nodes["total"] > one_node["total"]
    overlapped, added = (scale.update_seconds(work, big, 16, fast, overlap) for overlap in (True, False))
    assert added["total"] > overlapped["total"] >= overlapped["compute"]


def test_a_rank_with_part_of_a_group_loses_what_the_group_shares():
    model, scorer = scale.Model.of(CONFIG), scale.scorer_for(4000)
    tokens = [
        scale.work_of(
            scale.episodes_of(Shape(500, 10, 5, 2), count), scale.update_config(4000, count, None), model, scorer
        ).tokens
        / count
        for count in (8, 2)
    ]
    assert tokens[1] > 3 * tokens[0]
