"""Rollouts on two processes generate equally often, whatever becomes of their episodes (see rollout_run.py)."""

import pytest
from launching import run_on_two_processes


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What each of two processes found in each scenario."""
    return run_on_two_processes("rollout_run.py", tmp_path_factory.mktemp("two_processes"))


@pytest.mark.slow
def test_processes_generate_equally_often(two_processes):
    first, second = (results["ragged"] for results in two_processes)
    assert first == {"turns": [1, 1], "stop": ["completed"] * 2, "calls": [2, 1, 1, 1]}
    assert second == {"turns": [4, 2], "stop": ["completed"] * 2, "calls": [2, 2, 1, 1]}


@pytest.mark.slow
def test_processes_send_equally_many_rows_to_vllm(two_processes):
    first, second = (results["ragged, vLLM"] for results in two_processes)
    assert first["calls"] == second["calls"] == [2, 2, 1, 1]
    assert (first["turns"], second["turns"]) == ([1, 1], [4, 2])


@pytest.mark.slow
def test_a_process_whose_environments_all_failed_goes_on(two_processes):
    first, second = (results["one fails"] for results in two_processes)
    assert first == {"turns": [0, 1], "stop": ["env_error"] * 2, "calls": [1, 1]}
    assert second == {"turns": [2, 1], "stop": ["completed"] * 2, "calls": [2, 1]}


@pytest.mark.slow
def test_processes_with_waves_of_different_number_generate_equally_often(two_processes):
    first, second = (results["waves"] for results in two_processes)
    assert (first["turns"], second["turns"]) == ([1, 1], [4, 2])
    assert first["calls"] == second["calls"] == [1] * 6


@pytest.mark.slow
def test_processes_without_a_fault_raise_with_the_others(two_processes):
    for results in two_processes:
        assert "2 of 4 environments of the batch failed" in results["one fails too often"]["error"]
        assert "OSError: no server" in results["one fails too often"]["error"]


@pytest.mark.slow
def test_all_processes_raise_when_all_environments_failed(two_processes):
    for results in two_processes:
        assert "All 4 environments of the batch failed" in results["all fail"]["error"]
