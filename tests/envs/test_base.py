"""The environment interface: light to import, and what its types promise."""

import json
import subprocess
import sys

import pytest

from seeupo_trl.envs import MultiTurnEnvironment, Observation, StepResult, StopReason


def test_importing_the_interface_needs_no_benchmark_and_no_torch():
    code = (
        "import sys, seeupo_trl.envs; "
        "assert not {'torch', 'transformers', 'trl', 'bfcl_eval', 'mpmath'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_stop_reasons_are_strings():
    assert StopReason.completed == "completed" and StopReason("max_turns") is StopReason.max_turns
    assert f"{StopReason.env_error}" == str(StopReason.env_error) == "env_error"
    assert json.dumps(StopReason.context_overflow) == '"context_overflow"'
    assert {reason.value for reason in StopReason} == {
        "completed",
        "truncated",
        "max_turns",
        "context_overflow",
        "response_truncated",
        "env_error",
        "env_timeout",
    }


def test_defaults_of_observation_and_step_result():
    assert Observation([]).tools is None
    first, second = StepResult([]), StepResult([])
    assert (first.reward, first.terminated, first.truncated, first.info) == (0.0, False, False, {})
    assert first.info is not second.info


def test_an_environment_needs_reset_and_step_and_nothing_else():
    class Incomplete(MultiTurnEnvironment):
        def reset(self, **task):
            return Observation([])

    with pytest.raises(TypeError, match="step"):
        Incomplete()

    class Complete(Incomplete):
        def step(self, message):
            return StepResult([], terminated=True)

    assert Complete().close() is None
