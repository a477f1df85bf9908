"""Ratios in 16 bits, where things are computed, and how often the host waits for the device."""

import warnings

import pytest
import torch
from against_oracle import load_model, train
from fixed_rollouts import NUM_TRAJECTORIES, make_iteration, ragged_rollouts
from tiny import load_tiny_model
from torch.overrides import TorchFunctionMode

from seeupo_trl.scoring.interface import Scores
from seeupo_trl.scoring.rows import RowScorer
from seeupo_trl.scoring.trees import TreeBatch, TreeScorer
from seeupo_trl.scoring.turn_buffer import TurnBuffer
from seeupo_trl.trajectory import Trajectory, Turn
from seeupo_trl.update.turn_updater import TurnUpdater


@pytest.fixture
def logs(monkeypatch):
    """What each iteration's update logs."""
    collected = []
    original = TurnUpdater.logs

    def recording(self):
        collected.append(dict(original(self)))
        return list(collected[-1].items())

    monkeypatch.setattr(TurnUpdater, "logs", recording)
    return collected


# --- Ratios in 16 bits -----------------------------------------------------------------------------------------------


def in_bf16(directory, tmp_path, **options):
    model = load_tiny_model(directory, torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(model, ragged_rollouts()[:1], tmp_path, packing="tree", bf16=True, **options)
    return model


def test_the_noise_floor_is_zero_but_for_rounding(tiny_dir, tmp_path, logs):
    train(load_model(tiny_dir), ragged_rollouts(), tmp_path, packing="tree")
    assert all(values["ratio/noise_floor"] < 1e-12 for values in logs)
    assert len({values["ratio/noise_floor"] for values in logs}) == 1  # measured once


def test_rows_have_no_noise_floor(tiny_dir, tmp_path, logs):
    train(load_model(tiny_dir), ragged_rollouts(), tmp_path, packing="rows")
    assert all("ratio/noise_floor" not in values for values in logs)


def test_the_noise_floor_is_how_far_the_log_of_a_ratio_is_off(tiny_dir, tmp_path, logs, monkeypatch):
    score = TreeScorer.score

    def shifted(self, model, batch):
        scores, aux_loss = score(self, model, batch)
        if isinstance(batch, TreeBatch):
            scores = Scores(scores.sizes, scores.logps + 5e-4, scores.entropies)
        return scores, aux_loss

    monkeypatch.setattr(TreeScorer, "score", shifted)
    train(load_model(tiny_dir, torch.float32), ragged_rollouts()[:1], tmp_path, packing="tree")
    assert logs[0]["ratio/noise_floor"] == pytest.approx(5e-4, rel=0.01)


def test_by_default_the_weights_of_the_head_stay_as_they_are(tiny_dir, tmp_path):
    assert in_bf16(tiny_dir, tmp_path / "default").lm_head.weight.dtype == torch.bfloat16
    assert in_bf16(tiny_dir, tmp_path / "grpo", cast_lm_head_to_fp32=True).lm_head.weight.dtype == torch.float32


def test_logits_in_16_bits_put_an_error_on_log_probabilities(tiny_dir, tmp_path):
    """Of a trained model, against its own hidden states times its head in float64."""
    errors = {}
    buffer = TurnBuffer([Trajectory([Turn([5, 6, 7], [8 + i for i in range(40)])])])
    for cast in (None, False):
        model = in_bf16(tiny_dir, tmp_path / str(cast), cast_lm_head_to_fp32=cast)
        hidden = []
        model.model.register_forward_hook(lambda module, args, output, kept=hidden: kept.append(output[0]))
        scorer = RowScorer(model, 0, 0.9)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            scores, _ = scorer.score(model, *scorer.micro_batches(buffer, [(0, 1)], 1))
        logits = hidden[0][0, -41:-1].double() @ model.lm_head.weight.double().T / 0.9
        expected = logits.log_softmax(-1).gather(1, torch.arange(8, 48)[:, None])[:, 0]
        errors[cast] = (scores[0, 1].logps.double() - expected).abs().mean().item()
    assert errors[None] < 1e-5 < 1e-3 < errors[False]


def test_mixed_precision_of_the_launcher_is_that_of_the_arguments(tiny_dir, tmp_path, monkeypatch):
    """`accelerate launch --mixed_precision bf16` sets the variable."""
    ends = []
    for launched, given in (("no", True), ("bf16", False)):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
        options = {"bf16": given, "turn_ratio": "product"}
        with pytest.warns(UserWarning, match="`turn_ratio='product'` multiplies"):
            ends += train(load_tiny_model(tiny_dir), ragged_rollouts()[:1], tmp_path / launched, **options)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


# --- Where things are computed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scorer_type", [RowScorer, TreeScorer])
def test_inputs_go_where_the_model_computes_and_not_where_its_parameters_are(scorer_type, tiny_dir):
    """As with FSDP2's offloading, whose parameters lie on the CPU between passes."""
    model = load_tiny_model(tiny_dir, torch.float64)
    device = torch.device("meta")
    options = {"packing": "tree"} if scorer_type is TreeScorer else {}
    scorer = scorer_type(model, 0, 1.0, device=device, **options)
    buffer = TurnBuffer([Trajectory([Turn([5, 6], [7]), Turn([5, 8], [9])])])
    (batch,) = scorer.micro_batches(buffer, [(0, 1), (0, 2)], 2)
    devices = set()

    def stop(module, args, kwargs):
        devices.update(value.device for value in kwargs.values() if torch.is_tensor(value))
        raise InterruptedError

    model.register_forward_pre_hook(stop, with_kwargs=True)
    with pytest.raises(InterruptedError):
        scorer.score(model, batch)
    assert devices == {device}


def test_the_trainer_computes_on_its_accelerators_device(tiny_dir, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(TreeScorer, "__init__", lambda self, *args, device, **kwargs: seen.append(device) or exit_())

    def exit_():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        train(load_model(tiny_dir), ragged_rollouts()[:1], tmp_path)
    assert seen == [torch.device("cpu")]


# --- How often the host waits ----------------------------------------------------------------------------------------


class Waits(TorchFunctionMode):
    """Counts what has the host wait for a device: values that are read back."""

    READS = {
        torch.Tensor.item,
        torch.Tensor.tolist,
        torch.Tensor.cpu,
        torch.Tensor.numpy,
        torch.Tensor.__bool__,
        torch.Tensor.__float__,
        torch.Tensor.__int__,
        torch.Tensor.nonzero,
    }

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func in self.READS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["sequence_mask", "token_truncate"])
def test_reads_of_a_micro_batch_do_not_grow_with_its_actions(mode, tiny_dir, tmp_path, monkeypatch):
    counts = []
    original = TurnUpdater._loss

    def counted(self, *args):
        with Waits() as waits:
            result = original(self, *args)
        counts.append((waits.count, len(self.buffer)))
        return result

    monkeypatch.setattr(TurnUpdater, "_loss", counted)
    init = TurnUpdater.__init__

    def corrected(self, buffer, *args, **kwargs):
        for trajectory in buffer.trajectories:
            for turn in trajectory.turns:
                turn.sampling_logps = [-1.0] * len(turn.action_ids)
        settings = kwargs["settings"]
        object.__setattr__(settings, "sampler_correction", (mode, None, 3.0))
        object.__setattr__(settings, "off_policy_mask_threshold", 0.5)
        init(self, buffer, *args, **kwargs)

    monkeypatch.setattr(TurnUpdater, "__init__", corrected)
    for rows in (1, NUM_TRAJECTORIES):
        settings = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": NUM_TRAJECTORIES // rows}
        train(load_model(tiny_dir), [make_iteration(1, [2] * NUM_TRAJECTORIES)], tmp_path, packing="rows", **settings)
    reads = [count for count, _ in counts]
    assert max(reads) <= 3
    assert reads[-1] <= max(reads[:-1])  # twelve actions in one micro-batch, and one in each of twelve
