"""Environments in processes of their own: they can be ended whatever they do, and end with us."""

import datetime
import os
import signal
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest
from isolated_deeds import Coroutines, Deeds
from scripted_trainer import make_scripted_trainer
from talk import row
from waiting import is_running, wait_until

from seeupo_trl import MultiTurnRollout
from seeupo_trl.envs import IsolatedEnvironment
from seeupo_trl.envs.isolated import UnimportableScriptError
from seeupo_trl.rollout.failures import MISTAKES


MESSAGE = {"role": "assistant", "content": "Yes."}


@pytest.fixture
def environment():
    environment = IsolatedEnvironment(Deeds, timeout=60.0)
    yield environment
    environment.close()


def started(file: Path) -> int:
    """The process that a process has started and named in a file."""
    assert wait_until(lambda: file.exists() and file.read_text().endswith("\n"), 60)
    return int(file.read_text())


def test_it_plays_like_the_environment_itself(environment):
    plain = Deeds()
    opening, own = environment.reset(deed=None), plain.reset(deed=None)
    assert opening.info.pop("process") != own.info.pop("process") and opening == own
    for _ in range(2):
        mine, theirs = environment.step(MESSAGE), plain.step(MESSAGE)
        assert mine.info.pop("process") != theirs.info.pop("process") == os.getpid()
        assert mine == theirs


@pytest.mark.parametrize("deed", ["hang", "hold the lock", "half a line"])
def test_a_call_without_end_is_killed_and_the_next_episode_plays(environment, deed):
    environment.reset(deed=None)
    pid = environment.step(MESSAGE).info["process"]
    environment._timeout = 1.0
    environment.reset(deed=deed)
    with pytest.raises(TimeoutError, match=r"step\(\) took more than 1 seconds; process \d+ was killed"):
        environment.step(MESSAGE)
    assert not is_running(pid)
    environment._timeout = 60.0
    environment.reset(deed=None)
    assert environment.step(MESSAGE).info["process"] != pid


@pytest.mark.parametrize(
    ("deed", "error"),
    [
        ("die", r"Process \d+ of the environment died during step\(\)"),
        ("exit", "SystemExit: 3"),
        ("raise", "OSError: connection lost"),
        ("unpicklable", "cannot be sent between processes: it is a function and no StepResult"),
        (
            "a date",
            r"cannot be sent between processes: info\['when'\]\[0\] is a date; only texts",
        ),
        ("keys", r"info\['counts'\] has the key 1, a int; keys must be texts"),
        ("fraction", r"info\['half'\] is a Fraction"),
    ],
)
def test_faults_are_errors_of_the_call_and_the_next_episode_plays(environment, deed, error):
    environment.reset(deed=deed)
    with pytest.raises((RuntimeError, TimeoutError), match=error):
        environment.step(MESSAGE)
    environment.reset(deed=None)
    assert environment.step(MESSAGE).reward == 0.5


def test_nothing_that_the_process_sends_is_unpickled(environment, tmp_path):
    trace = tmp_path / "trace"
    environment.reset(deed="pickle", trace=str(trace))
    with pytest.raises(RuntimeError, match=r"Process \d+ answered step\(\) with something else"):
        environment.step(MESSAGE)
    assert not trace.exists()
    environment.reset(deed=None)
    assert environment.step(MESSAGE).reward == 0.5


def test_numbers_of_other_libraries_arrive_as_plain_ones(environment):
    environment.reset(deed="numbers")
    result = environment.step(MESSAGE)
    assert result.reward == 0.5 and result.terminated is True
    assert result.info == {"array": [0, 1], "tensor": 0.5, "pair": [1, None], "flag": True}


def test_rewards_and_flags_of_one_element_are_read_as_in_a_thread(environment):
    environment.reset(deed="one element")
    result = environment.step(MESSAGE)
    assert result.reward == 0.5 and result.terminated is False and result.truncated is False
    environment.reset(deed="half a number")
    assert environment.step(MESSAGE).reward == 0.5


def test_a_task_may_hold_what_can_be_pickled(environment):
    environment.reset(deed="task", day=datetime.date(2020, 1, 1), position=(1, 2))
    assert environment.step(MESSAGE).info == {"types": ["date", "tuple"]}


def test_a_time_out_of_the_environment_stays_one(environment):
    environment.reset(deed="time out")
    with pytest.raises(TimeoutError, match="the server is slow"):
        environment.step(MESSAGE)


def test_coroutines_run_in_the_process():
    environment = IsolatedEnvironment(Coroutines)
    assert environment.reset().info["process"] != os.getpid()
    result = environment.step(MESSAGE)
    assert result.reward == 0.5 and result.info["variable"] == "set in reset"
    environment.close()


SCRIPT = """
from isolated_deeds import Deeds

from seeupo_trl.envs import IsolatedEnvironment
from seeupo_trl.envs.call_thread import CallThread

print("The script begins.", flush=True)


def play():
    environment = IsolatedEnvironment(Deeds)
    # in a thread, as rollouts do
    CallThread("seeupo-environment").submit(environment.reset).result()
    print(environment.step({{"role": "assistant", "content": ""}}).reward, flush=True)
    environment.close()


{call}
"""


def run_script(tmp_path, call):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(call=call))
    return subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("call", ["play()", "try:\n    play()\nfinally:\n    print()"])
def test_a_script_that_would_run_again_in_the_process_is_refused_before_it_does(tmp_path, call):
    done = run_script(tmp_path, call)
    assert done.returncode == 1 and done.stdout.count("The script begins.") == 1
    assert "without `if __name__ == '__main__':` around it" in done.stderr
    assert UnimportableScriptError in MISTAKES, "a rollout does not try again, and ends at once"


def test_a_guarded_script_plays(tmp_path):
    done = run_script(tmp_path, 'if __name__ == "__main__":\n    play()')
    assert done.returncode == 0 and "0.5" in done.stdout, done.stderr[-2000:]


def test_an_environment_of_the_command_line_is_refused():
    code = """
from seeupo_trl.envs import IsolatedEnvironment, MultiTurnEnvironment


class Here(MultiTurnEnvironment):
    def reset(self, **task): ...

    def step(self, message): ...


IsolatedEnvironment(Here).reset()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "is defined in a notebook or on the command line" in done.stderr


def test_a_process_is_replaced_after_a_number_of_episodes():
    environment = IsolatedEnvironment(Deeds, max_episodes=2)
    seen = []
    for _ in range(5):
        environment.reset()
        info = environment.step(MESSAGE).info
        seen.append((info["process"], info["episodes"]))
    environment.close()
    assert [episodes for _, episodes in seen] == [1, 2, 1, 2, 1]
    assert len({process for process, _ in seen}) == 3 and not any(is_running(process) for process, _ in seen)


def test_wrong_arguments_are_refused():
    with pytest.raises(TypeError, match="environment_factory is a Deeds"):
        IsolatedEnvironment(Deeds())
    with pytest.raises(ValueError, match="timeout is 0"):
        IsolatedEnvironment(Deeds, timeout=0)
    with pytest.raises(ValueError, match="timeout is nan"):
        IsolatedEnvironment(Deeds, timeout=float("nan"))
    with pytest.raises(ValueError, match="max_episodes is 0"):
        IsolatedEnvironment(Deeds, max_episodes=0)


def test_a_rollout_goes_on_where_threads_would_stand_still(tmp_path):
    rows = [row(deed=deed, number=i) for i, deed in enumerate(["hold the lock", "die", None, None])]
    trainer = make_scripted_trainer(tmp_path, rows, script=["Yes.<|im_end|>"] * 9)
    rollout = MultiTurnRollout(partial(IsolatedEnvironment, Deeds, timeout=5.0), tasks=rows, env_timeout=100.0)
    output = rollout([r["prompt"] for r in rows], trainer)
    rollout.close()
    assert output["stop_reason"] == ["env_timeout", "env_error", "completed", "completed"]


@pytest.mark.slow
def test_no_process_is_left_when_ours_is_killed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            from isolated_deeds import Deeds
            from seeupo_trl.envs import IsolatedEnvironment

            if __name__ == "__main__":
                environment = IsolatedEnvironment(Deeds)
                environment.reset()
                print(environment.step({"role": "assistant", "content": ""}).info["process"], flush=True)
                environment.reset(deed="start another and hang", file="started")
                environment.step({"role": "assistant", "content": ""})
            """
        )
    )
    ours = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    pids = int(ours.stdout.readline()), started(tmp_path / "started")
    assert all(map(is_running, pids))
    ours.send_signal(signal.SIGKILL)
    ours.wait()
    assert wait_until(lambda: not any(map(is_running, pids)), 60)


def test_what_a_process_started_is_killed_with_it(environment, tmp_path):
    environment.reset(deed=None)
    environment._timeout = 1.0
    environment.reset(deed="start another and hang", file=str(tmp_path / "started"))
    with pytest.raises(TimeoutError):
        environment.step(MESSAGE)
    pid = started(tmp_path / "started")
    assert wait_until(lambda: not is_running(pid), 60)
