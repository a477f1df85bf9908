"""Two real processes agree about trees, micro-batches and a trajectory that is too long."""

import pytest
from safetensors.torch import load_file
from test_distributed import LAUNCHERS, TOLERANCE, model, relative_error, train  # noqa: F401


# ruff: noqa: F811 (a fixture is imported)

TREES = {"packing": "tree", "max_tokens_per_microbatch": 45}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["ddp", "zero3"])
def test_two_processes_with_trees_end_where_one_with_rows_ends(launcher, model, tmp_path):
    directories = {name: tmp_path / name for name in ("one", "two")}
    for directory in directories.values():
        directory.mkdir()
    expected, _ = train(model, directories["one"], None, {"packing": "rows"})
    actual, _ = train(model, directories["two"], LAUNCHERS[launcher], TREES)
    start = load_file(f"{model}/model.safetensors")
    assert relative_error(actual, expected, start) < TOLERANCE


@pytest.mark.slow
def test_trajectory_over_the_budget_stops_every_process(model, tmp_path):
    """Only the second process has long episodes; the first must not wait for it."""
    with pytest.raises(AssertionError, match="max_tokens_per_microbatch=16"):
        train(model, tmp_path, LAUNCHERS["ddp"], {"packing": "tree", "max_tokens_per_microbatch": 16})
