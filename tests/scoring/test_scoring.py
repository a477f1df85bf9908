"""Rows share what contexts share, and their scores are those of each sequence on its own."""

import pytest
import torch
from tiny import load_tiny_model
from trl.trainer import utils as trl_utils
from trl.trainer.utils import add_fused_lm_head

from seeupo_trl.scoring import rows
from seeupo_trl.scoring.interface import DUMMY_KEY, Scores, score_without_gradient
from seeupo_trl.scoring.rows import RowScorer, build_rows, group_rows
from seeupo_trl.scoring.turn_buffer import TurnBuffer
from seeupo_trl.trajectory import Trajectory, Turn


TEMPERATURE = 0.7

APPEND_ONLY = Trajectory(
    turns=[
        Turn(context_ids=[7, 8], action_ids=[9, 10, 11]),
        Turn(context_ids=[7, 8, 9, 10, 11, 20, 21], action_ids=[12]),
        Turn(context_ids=[7, 8, 9, 10, 11, 20, 21, 12, 22], action_ids=[13, 14]),
    ]
)
# the second context drops the first action's token 10, as a template that strips reasoning does
REWRITTEN = Trajectory(
    turns=[
        Turn(context_ids=[7, 8], action_ids=[9, 10, 11]),
        Turn(context_ids=[7, 8, 9, 11, 20], action_ids=[12, 15]),
    ]
)
ALL_KEYS = [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2)]


@pytest.fixture
def buffer():
    return TurnBuffer([APPEND_ONLY, REWRITTEN])


def test_contexts_that_extend_one_another_share_a_row(buffer):
    rows = build_rows(buffer, ALL_KEYS)
    assert [len(row.input_ids) for row in rows] == [11, 7, 5]
    assert rows[0].spans == {(0, 3): (9, 11), (0, 2): (7, 8), (0, 1): (2, 5)}
    assert [set(row.spans) for row in rows[1:]] == [{(1, 2)}, {(1, 1)}]


def test_row_ends_with_its_last_scored_token(buffer):
    (row,) = build_rows(buffer, [(0, 1), (0, 2)])
    assert row.input_ids == [7, 8, 9, 10, 11, 20, 21, 12]


def test_rows_of_a_trajectory_stay_in_one_micro_batch(buffer):
    batches = group_rows(build_rows(buffer, ALL_KEYS), max_rows=1)
    assert [{key[0] for row in batch.rows for key in row.spans} for batch in batches] == [{0}, {1}]


def test_rows_of_similar_length_go_together():
    lengths = [3, 9, 4, 8]
    episodes = [Trajectory(turns=[Turn(context_ids=[1] * n, action_ids=[2])]) for n in lengths]
    buffer = TurnBuffer(episodes)
    batches = group_rows(build_rows(buffer, [(i, 1) for i in range(4)]), max_rows=2)
    assert [[len(row.input_ids) - 1 for row in batch.rows] for batch in batches] == [[9, 8], [4, 3]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["plain-head-float64", "fused-head-float32"])
@pytest.mark.parametrize("pad_to_multiple_of", [None, 8])
def test_scores_equal_those_of_each_sequence_alone(buffer, dtype, pad_to_multiple_of, tiny_dir):
    model = load_tiny_model(tiny_dir, dtype).eval()
    add_fused_lm_head(model, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
    scorer = RowScorer(model, pad_token_id=0, temperature=TEMPERATURE, pad_to_multiple_of=pad_to_multiple_of)
    scores, aux_loss = scorer.score(model, *scorer.micro_batches(buffer, ALL_KEYS, max_rows=3))
    assert aux_loss is None
    assert set(scores) == set(ALL_KEYS)
    for key in ALL_KEYS:
        turn = buffer.turn(key)
        logits = model(torch.tensor([turn.context_ids + turn.action_ids])).logits[0] / TEMPERATURE
        log_probs = logits[len(turn.context_ids) - 1 : -1].log_softmax(-1)
        expected = log_probs.gather(1, torch.tensor(turn.action_ids)[:, None])[:, 0]
        tolerance = 1e-10 if dtype == torch.float64 else 2e-5
        torch.testing.assert_close(scores[key].logps, expected, atol=tolerance, rtol=0)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        torch.testing.assert_close(scores[key].entropies, entropy, atol=tolerance, rtol=0)


def test_head_runs_on_scored_positions_only(buffer, tiny_dir):
    model = load_tiny_model(tiny_dir, torch.float64)
    scorer = RowScorer(model, pad_token_id=0, temperature=1.0)
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[:-1].numel()))
    scorer.score(model, *scorer.micro_batches(buffer, ALL_KEYS, max_rows=3))
    assert seen == [sum(len(buffer.turn(key).action_ids) for key in ALL_KEYS)]


def test_other_forward_passes_are_left_alone(buffer, tiny_dir):
    model = load_tiny_model(tiny_dir)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    scorer = RowScorer(model, pad_token_id=0, temperature=1.0)
    with torch.no_grad():
        before = load_tiny_model(tiny_dir)(torch.tensor([[5, 6, 7]])).logits
        assert torch.equal(model(torch.tensor([[5, 6, 7]])).logits, before)
    assert set(scorer.score(model, scorer.dummy_batch())[0]) == {DUMMY_KEY}


@pytest.mark.skipif(not rows._FUSED_HEAD_ON_CPU, reason="trl 1.15's fused head needs a GPU")
@pytest.mark.parametrize("tile", [rows._CPU_TILE, 5])
def test_on_a_cpu_the_head_computes_small_tiles_and_the_same_gradient(buffer, tile, tiny_dir, monkeypatch):
    own, multiply, widths = trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE, torch.mm, []

    def watched(*args, **kwargs):
        widths.append(args[1].size(1))
        return multiply(*args, **kwargs)

    def gradient(tile):
        monkeypatch.setattr(rows, "_CPU_TILE", tile)
        model = load_tiny_model(tiny_dir, torch.float32).eval()
        add_fused_lm_head(model, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
        scorer = RowScorer(model, pad_token_id=0, temperature=TEMPERATURE)
        scores, _ = scorer.score(model, *scorer.micro_batches(buffer, ALL_KEYS, max_rows=3))
        torch.cat([score.logps for score in scores.values()]).sum().backward()
        return model.config.vocab_size, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    _, expected = gradient(own)
    monkeypatch.setattr(torch, "mm", watched)
    vocabulary, tiled = gradient(tile)
    assert max(widths) == min(tile, vocabulary)
    assert trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE == own
    torch.testing.assert_close(tiled, expected, rtol=1e-4, atol=1e-6)


def test_scores_of_several_passes_are_put_together_and_picked_out_in_any_order():
    first = Scores({(0, 1): 2, (0, 2): 1}, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.1, 0.2, 0.3]))
    second = Scores({(3, 1): 2}, torch.tensor([4.0, 5.0], requires_grad=True), torch.tensor([0.4, 0.5]))
    scores = Scores.joined([first, second])
    assert list(scores) == [(0, 1), (0, 2), (3, 1)]
    assert scores[0, 2].logps.tolist() == [3.0]
    picked = scores.in_a_row([[(3, 1)], [(0, 2), (0, 1)]])
    assert picked.logps.tolist() == [4.0, 5.0, 3.0, 1.0, 2.0]
    torch.testing.assert_close(picked.entropies, torch.tensor([0.4, 0.5, 0.3, 0.1, 0.2]))
    by_turn = scores.logps_by_turn()
    assert {key: values.tolist() for key, values in by_turn.items()} == {
        (0, 1): [1.0, 2.0],
        (0, 2): [3.0],
        (3, 1): [4.0, 5.0],
    }
    assert not any(values.requires_grad for values in by_turn.values())
    picked.logps.sum().backward()
    assert len(Scores.joined([])) == 0
    assert Scores.joined([]).logps_by_turn() == {}


class _WithAnotherProcess:
    """Stands for the communication with a process that has three micro-batches."""

    def max_over_processes(self, value):
        return max(value, 3)

    def inference(self):
        return torch.no_grad()


def test_what_a_process_computes_only_to_stay_in_step_is_in_no_score(buffer, tiny_dir):
    model = load_tiny_model(tiny_dir, torch.float64)
    scorer = RowScorer(model, pad_token_id=0, temperature=1.0)
    for keys in ([(0, 1)], []):
        scores, _ = score_without_gradient(buffer, keys, scorer, model, _WithAnotherProcess(), max_rows=1)
        assert list(scores) == keys
        assert len(scores.logps) == len(scores.entropies) == 3 * len(keys)
