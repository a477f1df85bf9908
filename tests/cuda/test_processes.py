"""DeepSpeed and FSDP2 over NCCL: one process on one card, two on two."""

import pytest
import torch
from cards import CARD, TWO_CARDS, arguments_for
from launching import launch
from oracle import OracleSettings, seeupo_iteration
from tiny import load_tiny_model, save_tiny_model
from unkind_rollouts import NUM_TRAJECTORIES, TURNS, groups


LEARNING_RATE = 0.005
# on a CPU over gloo, to see that the test itself is right; `tests/distributed` has the others
LAUNCHES = [pytest.param("zero2", 1, "cpu", "fp32")]
LAUNCHES += [
    pytest.param(backend, 1, "cuda", "fp32", marks=CARD) for backend in ("ddp", "zero1", "zero2", "zero3", "fsdp2")
]
LAUNCHES += [pytest.param(backend, 2, "cuda", "fp32", marks=TWO_CARDS) for backend in ("ddp", "zero3", "fsdp2")]
# DeepSpeed's bfloat16 parameters are rounded by more than an iteration moves them
LAUNCHES += [pytest.param(backend, 1, "cuda", "bf16", marks=CARD) for backend in ("ddp", "fsdp2")]


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "num_processes", "device", "precision"), LAUNCHES)
def test_processes_end_where_the_oracle_ends(backend, num_processes, device, precision, tmp_path):
    if backend.startswith("zero"):
        pytest.importorskip("deepspeed")
    model = save_tiny_model(tmp_path / "model")
    run = {"name": "run", "model": model, "packing": "tree", "learning_rate": LEARNING_RATE}
    run |= {"bf16": precision == "bf16", **arguments_for(device)}
    finished = launch(tmp_path / "output", backend, num_processes, [run])
    assert finished.returncode == 0, finished.stderr[-3000:]
    trained = finished.parameters("run")
    policy = load_tiny_model(model).double()
    start = {name: value.detach().clone() for name, value in policy.named_parameters()}
    settings = OracleSettings(lr=LEARNING_RATE, max_grad_norm=1.0, minibatches=(0,) * NUM_TRAJECTORIES)
    for step in range(len(TURNS)):
        expected = seeupo_iteration(policy, groups(step), settings).parameters
    difference = torch.cat([(trained[name].cpu() - expected[name]).flatten() for name in expected])
    moved = torch.cat([(expected[name] - start[name]).flatten() for name in expected])
    tolerance = 1e-3 if precision == "fp32" else 0.2
    assert difference.norm() / moved.norm() < tolerance
