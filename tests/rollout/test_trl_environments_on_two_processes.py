"""TRL environments on two processes, which generate equally often and end with the same parameters."""

import pytest
from launching import run_on_two_processes


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What each of two processes found."""
    return run_on_two_processes("tool_rollout_run.py", tmp_path_factory.mktemp("two_processes"))


@pytest.mark.slow
def test_processes_generate_equally_often_however_long_their_episodes_are(two_processes):
    first, second = (found["ragged"] for found in two_processes)
    shared = {"frequency": [1.0], "reward": [1.0]}
    assert first == {"turns": [1, 1], "calls": [2, 1, 1, 1], "stop": ["completed"] * 2, "value": [0, 0], **shared}
    assert second == {"turns": [4, 2], "calls": [2, 2, 1, 1], "stop": ["completed"] * 2, "value": [3, 1], **shared}


@pytest.mark.slow
def test_a_process_whose_environments_all_failed_goes_on(two_processes):
    first, second = (found["one fails"] for found in two_processes)
    assert (first["stop"], second["stop"]) == (["env_error"] * 2, ["completed"] * 2)
    assert len(first["calls"]) == len(second["calls"]) == 4
    assert first["reward"] == second["reward"] == [2.0]


@pytest.mark.slow
def test_processes_end_training_with_the_same_parameters(two_processes):
    first, second = two_processes
    assert first["parameters"] == second["parameters"]
