"""Environments that raise, hang, leak, lie or flood: what becomes of the episode, the batch and a real run."""

import asyncio
import contextlib
import contextvars
import decimal
import gc
import io
import math
import os
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import warm_python
from datasets import Dataset
from interrupting import interrupt, living
from launching import HELPERS, run_command
from talk import Talk, row, user
from tiny import ON_CPU, load_tiny_model, tiny_tokenizer
from waiting import wait_until

from seeupo_trl import MultiTurnEnvironment, MultiTurnRollout, Observation, SeeUPOConfig, SeeUPOTrainer, StepResult
from seeupo_trl.rollout.environment_pool import NotAnEnvironmentError
from seeupo_trl.rollout.observations import check_step_result
from seeupo_trl.rollout.shared_state import SharedStateError


pytestmark = pytest.mark.usefixtures("both_schedules")


HANG = 30.0  # far beyond every time limit below
LIMIT = 1.0


class Chaotic(Talk):
    """Does in `step` (or `reset`) what its task says."""

    def reset(self, deed=None, **task):
        self.deed = deed
        if deed == "hang in reset":
            time.sleep(HANG)
        if deed == "exit in reset":
            sys.exit(3)
        observation = super().reset(**task)
        if deed == "tools of nonsense":
            observation.tools = "look"
        return observation

    def step(self, message):
        result = super().step(message)
        match self.deed:
            case "hang":
                time.sleep(HANG)
            case "raise":
                raise OSError("connection lost")
            case "exit":
                sys.exit(3)
            case "raise what cannot be shown":
                raise Unshowable
            case "nothing":
                return None
            case "another type":
                return {"messages": []}
            case "no dicts":
                result.messages = ["text"]
            case "no role":
                result.messages = [{"content": "x"}]
            case "a number as content":
                result.messages = [user(7)]
            case "bytes":
                result.messages = [user(b"\x00\xff")]
            case "messages of another type":
                result.messages = 12
            case "nan":
                result.reward = math.nan
            case "a complex reward":
                result.reward = 1j
            case "two rewards":
                result.reward = np.ones(2)
            case "a reward beyond floats":
                result.reward = 10**400
            case "a text as reward":
                result.reward = "1.0"
            case "info of another type":
                result.info = [1]
        return result


class Unshowable(Exception):
    def __str__(self):
        raise RuntimeError("no text")


def play(make_trainer, deeds, environment=Chaotic, script=("Yes.<|im_end|>",) * 9, replies=1, **options):
    rows = [row(*[[user("Go on.")]] * replies, deed=deed, number=i) for i, deed in enumerate(deeds)]
    trainer = make_trainer(rows, script=list(script), max_completion_length=20)
    options = {"env_timeout": LIMIT, "env_reset_retries": 0, **options}
    rollout = MultiTurnRollout(environment, tasks=rows, **options)
    output = rollout([r["prompt"] for r in rows], trainer)
    trainer.played_by = rollout  # its environments are closed when it is deleted
    return output, trainer


@pytest.mark.parametrize(
    ("deed", "reason", "error"),
    [
        ("raise", "env_error", "OSError: connection lost"),
        ("exit", "env_error", "RuntimeError: SystemExit: 3"),
        ("exit in reset", "env_error", "RuntimeError: SystemExit: 3"),
        ("raise what cannot be shown", "env_error", "Unshowable"),
        ("hang", "env_timeout", "TimeoutError: no answer within 1 seconds"),
        ("hang in reset", "env_timeout", "TimeoutError: no answer within 1 seconds"),
        ("nothing", "env_error", "TypeError: step() must return a StepResult; it returned NoneType None"),
        ("another type", "env_error", "TypeError: step() must return a StepResult; it returned dict"),
        ("no dicts", "env_error", "TypeError: A message must be a dict with a role; got str"),
        ("no role", "env_error", "TypeError: A message must be a dict with a role; got dict"),
        ("a number as content", "env_error", "TypeError: The content of a message must be a text; got int 7"),
        ("bytes", "env_error", "TypeError: The content of a message must be a text; got bytes"),
        ("messages of another type", "env_error", "TypeError: Messages must be a list of dicts"),
        ("nan", "env_error", "ValueError: StepResult.reward must be a finite number; got float nan"),
        ("a complex reward", "env_error", "StepResult.reward must be a finite number; got complex"),
        ("two rewards", "env_error", "StepResult.reward must be a finite number; got ndarray"),
        ("a reward beyond floats", "env_error", "StepResult.reward must be a finite number; got int"),
        ("a text as reward", "env_error", "ValueError: StepResult.reward must be a finite number; got str '1.0'"),
        ("info of another type", "env_error", "TypeError: StepResult.info must be a dict; got list [1]"),
        ("tools of nonsense", "env_error", "TypeError: Observation.tools must be a list of JSON schemas; got str"),
    ],
)
def test_a_fault_costs_its_own_episode_only(make_trainer, deed, reason, error):
    output, _ = play(make_trainer, [deed, None])
    assert output["stop_reason"] == [reason, "completed"]
    assert output["environment_reward"] == [None, 1.25]
    assert error in output["trajectories"][0].info["error"]


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("in_task", [False, True], ids=["itself", "in a task"])
def test_a_coroutine_that_exits_costs_its_own_episode_only(make_trainer, error, in_task):
    class Exiting(Talk):
        async def step(self, message):
            if self.task["deed"] is not None:
                await (asyncio.gather(self.exit()) if in_task else self.exit())
            await asyncio.sleep(0.1)
            return super().step(message)

        async def exit(self):
            raise error

    output, _ = play(make_trainer, ["exit", None, None], Exiting, env_timeout=10.0)
    assert output["stop_reason"] == ["env_error", "completed", "completed"]
    assert f"RuntimeError: {type(error).__name__}" in output["trajectories"][0].info["error"]


def test_an_environment_may_raise_a_time_out_of_its_own(make_trainer):
    class Slow(Chaotic):
        def step(self, message):
            if self.deed:
                raise TimeoutError("server")
            return super().step(message)

    output, _ = play(make_trainer, ["slow", None], Slow)
    assert output["stop_reason"] == ["env_timeout", "completed"]


REWARDS = [1, True, 1.0, np.float32(1), np.float16(1), np.int64(1), np.bool_(True), np.array(1.0), np.ones(1)]
REWARDS += [torch.tensor(1.0), torch.tensor(1), torch.tensor(1.0, dtype=torch.bfloat16), Fraction(1), Decimal(1)]


@pytest.mark.parametrize("reward", REWARDS, ids=lambda reward: f"{type(reward).__name__}")
def test_any_real_number_is_a_reward(make_trainer, reward):
    class Rewarding(Talk):
        def step(self, message):
            return StepResult([], reward=reward, terminated=True)

    output, _ = play(make_trainer, [None], Rewarding)
    assert output["environment_reward"] == [1.0] and type(output["environment_reward"][0]) is float
    assert [turn.reward for turn in output["trajectories"][0].turns] == [1.0]


FLAGS = [False, 0, 0.0, None, np.False_, np.array([False]), torch.tensor(False), torch.tensor([0])]


@pytest.mark.parametrize("name", ["terminated", "truncated"])
def test_a_flag_is_a_boolean_of_any_library_and_nothing_else(name):
    go_on = [user("Go on.")]
    for value in FLAGS:
        assert getattr(check_step_result(StepResult(go_on, **{name: value})), name) is False
    for value in (True, 1, np.True_, np.array([True]), torch.tensor([1])):
        assert getattr(check_step_result(StepResult([], **{name: value})), name) is True
    for value in ("False", "", math.nan, [False], lambda: False, (x for x in [False]), 2, np.zeros(2)):
        with pytest.raises(TypeError, match=f"StepResult.{name} must be True or False; got {type(value).__name__}"):
            check_step_result(StepResult(go_on, **{name: value}))


# --- one thread an instance ------------------------------------------------------------------------------------------


class Database(Talk):
    """Opens a connection in `reset`; sqlite3 lets no other thread use it, nor close it."""

    def __init__(self):
        super().__init__()
        self.connection = sqlite3.connect(":memory:")
        self.threads = {threading.get_ident()}

    def reset(self, wait=0.0, **task):
        self.threads.add(threading.get_ident())
        self.wait = wait
        self.connection.execute("CREATE TABLE IF NOT EXISTS messages (text TEXT)")
        return super().reset(**task)

    def step(self, message):
        self.threads.add(threading.get_ident())
        time.sleep(self.wait)
        self.connection.execute("INSERT INTO messages VALUES (?)", (message["content"],))
        return super().step(message)

    def close(self):
        self.threads.add(threading.get_ident())
        self.connection.close()
        super().close()


def test_an_instance_lives_in_one_thread(make_trainer):
    made = []

    def factory():
        made.append(Database())
        return made[-1]

    # episodes of different lengths and durations, so that idle instances and threads get mixed
    rows = [row(*[[user("Go on.")]] * (i % 4), number=i, wait=0.01 * (i % 3)) for i in range(12)]
    trainer = make_trainer(rows, script=["Yes.<|im_end|>"] * 5, max_completion_length=20)
    rollout = MultiTurnRollout(factory, tasks=rows, max_concurrent_envs=5)
    for _ in range(2):
        output = rollout([r["prompt"] for r in rows], trainer)
        assert output["stop_reason"] == ["completed"] * 12
    rollout.close()
    assert [len(environment.threads) for environment in made] == [1] * 5
    assert [environment.closed for environment in made] == [1] * 5


def print_apart(text):
    time.sleep(0.05 * int(text))  # they cross: one begins in the middle of another
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        time.sleep(0.1)
        print(text, end="")
    return printed.getvalue()


def work_apart(text):
    time.sleep(0.05 * int(text))
    before = os.getcwd()
    os.chdir(tempfile.mkdtemp())
    try:
        time.sleep(0.1)
        Path(text).touch()
        return " ".join(os.listdir())
    finally:
        os.chdir(before)


def leave_printing(text):
    sys.stderr = io.StringIO()
    return text


@pytest.mark.parametrize(
    ("way", "what"),
    [(print_apart, "sys.stdout"), (work_apart, "the working directory"), (leave_printing, "sys.stderr")],
)
def test_environments_that_replace_what_threads_share_play_one_after_another_or_not_at_all(
    make_trainer, both_schedules, way, what, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)

    class Replacing(Talk):
        def step(self, message):
            result = super().step(message)
            result.info["own"] = way(str(self.task["number"]))
            return result

    streams, directory = (sys.stdout, sys.stderr), os.getcwd()
    try:
        with pytest.raises(SharedStateError, match=f"replace {what} for one another.*Set `max_concurrent_envs=1`"):
            play(make_trainer, [None] * 4, Replacing, env_timeout=10.0)
        assert both_schedules == "free" or (sys.stdout, sys.stderr) == streams
        time.sleep(0.5)  # calls that were given up return
        sys.stdout, sys.stderr = streams
        os.chdir(directory)
        output, _ = play(make_trainer, [None] * 4, Replacing, env_timeout=10.0, max_concurrent_envs=1)
    finally:
        sys.stdout, sys.stderr = streams
        os.chdir(directory)
    assert [trajectory.info["own"] for trajectory in output["trajectories"]] == ["0", "1", "2", "3"]


def test_what_the_script_replaces_after_the_batch_is_its_own(make_trainer):
    """A call that was given up returns only then."""
    go_on, closed = threading.Event(), threading.Event()

    class Late(Talk):
        def step(self, message):
            if self.task["deed"] == "late":
                go_on.wait(HANG)
            return super().step(message)

        def close(self):
            if self.task["deed"] == "late":
                closed.set()

    output, _ = play(make_trainer, ["late", None], Late, replies=0)
    assert output["stop_reason"] == ["env_timeout", "completed"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        go_on.set()
        assert closed.wait(HANG)
        print("Done.", end="")
    assert printed.getvalue() == "Done."


def test_a_factory_that_returns_the_same_instance_again_is_an_error(make_trainer):
    only_one = Talk()
    with pytest.raises(NotAnEnvironmentError, match="environment_factory returned the same Talk again"):
        play(make_trainer, [None] * 3, lambda: only_one)
    output, _ = play(make_trainer, [None] * 3, lambda: only_one, max_concurrent_envs=1)
    assert output["stop_reason"] == ["completed"] * 3


VARIABLE = contextvars.ContextVar("VARIABLE")


async def later(function, *args):
    await asyncio.sleep(0)
    return function(*args)


@pytest.mark.parametrize("reads_later", [False, True], ids=["function reads", "coroutine reads"])
@pytest.mark.parametrize("sets_later", [False, True], ids=["function sets", "coroutine sets"])
def test_context_variables_are_those_of_the_script_until_the_environment_sets_them(
    make_trainer, sets_later, reads_later
):
    class Contextual(Talk):
        def reset(self, number, **task):
            return later(self.open, number, task) if sets_later else self.open(number, task)

        def open(self, number, task):
            seen.append(VARIABLE.get())
            VARIABLE.set(number)
            return super().reset(**task)

        def step(self, message):
            return later(self.answer, message) if reads_later else self.answer(message)

        def answer(self, message):
            result = super().step(message)
            result.reward = float(VARIABLE.get())
            return result

    seen, token = [], VARIABLE.set("script")
    output, _ = play(make_trainer, [None] * 3, Contextual, replies=0)
    VARIABLE.reset(token)
    assert seen == ["script"] * 3
    assert output["environment_reward"] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("is_coroutine", [False, True], ids=["function", "coroutine"])
def test_settings_of_decimal_are_those_of_the_script_until_the_environment_sets_its_own(make_trainer, is_coroutine):
    class Precise(Talk):
        def reset(self, number, **task):
            seen.append(decimal.getcontext().prec)
            return self.later(number, task) if is_coroutine else self.open(number, task)

        async def later(self, number, task):
            return self.open(number, task)

        def open(self, number, task):
            decimal.getcontext().prec = number + 1
            return super().reset(**task)

        def step(self, message):
            result = super().step(message)
            result.reward = float(decimal.getcontext().prec)
            return result

    seen = []
    with decimal.localcontext(prec=11) as context:
        output, _ = play(make_trainer, [None] * 3, Precise, replies=0)
    assert seen == [11] * 3 and context.prec == 11
    assert output["environment_reward"] == [1.0, 2.0, 3.0]


@dataclass
class Alike(MultiTurnEnvironment):
    """All instances are equal."""

    closed: int = 0

    def reset(self, fails=False, **task):
        self.fails = fails
        return Observation([user("Begin.")])

    def step(self, message):
        if self.fails:
            raise OSError("connection lost")
        return StepResult([], terminated=True)

    def close(self):
        closed.append(id(self))


closed = []


def test_environments_that_are_equal_are_closed_once_each(make_trainer):
    closed.clear()
    rows = [row(number=i, fails=i == 2) for i in range(4)]
    trainer = make_trainer(rows, script=["Yes.<|im_end|>"] * 2, max_completion_length=20)
    rollout = MultiTurnRollout(Alike, tasks=rows, env_reset_retries=0)
    rollout([r["prompt"] for r in rows], trainer)
    assert len(closed) == 1
    rollout.close()
    assert len(closed) == len(set(closed)) == 4


def test_calls_of_an_instance_never_overlap_also_when_the_pool_is_closed(make_trainer, caplog):
    events, go_on = [], threading.Event()

    class Stuck(Chaotic):
        def step(self, message):
            if self.deed:
                events.append("step begins")
                go_on.wait(HANG)
                events.append("step ends")
            return super().step(message)

        def close(self):
            if self.deed:
                events.append("close")

    output, trainer = play(make_trainer, ["stuck", None], Stuck)
    assert output["stop_reason"] == ["env_timeout", "completed"]
    trainer.played_by.close()
    assert events == ["step begins"]
    go_on.set()
    wait_until(lambda: len(events) == 3)
    assert events == ["step begins", "step ends", "close"]
    assert not caplog.records or "ValueError" not in caplog.text


class Counted(Talk):
    """Counts what is made and closed, and interrupts the script in the middle of a step."""

    def __init__(self):
        super().__init__()
        self.made.append(self)

    def reset(self, deed=None, **task):
        self.deed = deed
        return super().reset(**task)

    def step(self, message):
        if self.deed == "interrupt":
            interrupt()
            self.go_on.wait(HANG)
        return super().step(message)

    def close(self):
        self.ended.append(self)


@pytest.fixture
def counted():
    return type("Counted", (Counted,), {"made": [], "ended": [], "go_on": threading.Event()})


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_environments_of_a_batch_that_ended_while_sampling_play_the_next_one(make_trainer, counted, error):
    def respond(context):
        if len(answered) == 4:
            raise error
        answered.append(context)
        return "Yes.<|im_end|>"

    rows, others = [row([user("Go on.")], number=i) for i in range(3)], living()
    trainer, answered = make_trainer(rows, script=["Yes.<|im_end|>"] * 2, max_completion_length=20), []
    rollout = MultiTurnRollout(counted, tasks=rows)
    plain, trainer.respond = trainer.respond, respond
    for _ in range(2):
        answered.clear()
        with pytest.raises(error):
            rollout([r["prompt"] for r in rows], trainer)
    trainer.respond = plain
    assert rollout([r["prompt"] for r in rows], trainer)["stop_reason"] == ["completed"] * 3
    assert wait_until(lambda: len(living() - others) == len(counted.made) - len(counted.ended) == 3)


def test_an_environment_that_was_interrupted_is_closed_once_its_call_returns(make_trainer, counted, interruptible):
    rows = [row([user("Go on.")], deed=deed, number=i) for i, deed in enumerate(["interrupt", None, None])]
    others = living()
    trainer = make_trainer(rows, script=["Yes.<|im_end|>"] * 2, max_completion_length=20)
    rollout = MultiTurnRollout(counted, tasks=rows)
    with pytest.raises(KeyboardInterrupt):
        rollout([r["prompt"] for r in rows], trainer)
    (busy,) = [environment for environment in counted.made if environment.deed]
    rows[0]["deed"] = None
    trainer.rollout_inputs = rows
    assert rollout([r["prompt"] for r in rows], trainer)["stop_reason"] == ["completed"] * 3
    assert busy.resets == 1 and busy not in counted.ended
    counted.go_on.set()
    assert wait_until(
        lambda: busy in counted.ended and len(living() - others) == len(counted.made) - len(counted.ended) == 3
    )


# --- what gymnasium has ----------------------------------------------------------------------------------------------


def test_an_episode_that_the_environment_cuts_short_is_truncated(make_trainer):
    class Short(Talk):
        def step(self, message):
            return StepResult([], reward=0.5, truncated=True, terminated=self.task["number"] == 1)

    output, _ = play(make_trainer, [None, None], Short)
    assert output["stop_reason"] == ["truncated", "completed"]
    assert output["environment_reward"] == [0.5, 0.5]


def test_rewards_of_steps_are_kept_on_the_turns(make_trainer):
    output, _ = play(make_trainer, [None], replies=2)
    assert [turn.reward for turn in output["trajectories"][0].turns] == [0.25, 0.25, 1.0]


class Seeded(Talk):
    def reset(self, *, seed, **task):
        observation = super().reset(**task)
        observation.info = {"seed": seed, "level": 3}
        return observation


def test_episodes_of_a_group_begin_with_one_seed_and_groups_with_different_ones(make_trainer):
    output, trainer = play(make_trainer, [None] * 4, Seeded)
    first, second, third, fourth = [t.info["seed"] for t in output["trajectories"]]
    assert trainer.num_generations == 2 and first == second != third == fourth
    assert [t.info["level"] for t in output["trajectories"]] == [3] * 4
    trainer.state.global_step += 1
    rollout = MultiTurnRollout(Seeded, tasks=[row(number=0)])
    (later,) = rollout([row(number=0)["prompt"]], trainer)["trajectories"]
    assert later.info["seed"] not in (first, third)


def test_a_seed_of_the_row_is_the_rows_and_who_takes_none_gets_none(make_trainer):
    rows = [row(seed=7)]
    trainer = make_trainer(rows, script=["Yes.<|im_end|>"] * 2, max_completion_length=20)
    output = MultiTurnRollout(Seeded, tasks=rows)([rows[0]["prompt"]], trainer)
    assert output["trajectories"][0].info["seed"] == 7
    rows = [row(seed=None)]  # Arrow fills in None where other rows have a seed
    output = MultiTurnRollout(Seeded, tasks=rows)([rows[0]["prompt"]], trainer)
    assert isinstance(output["trajectories"][0].info["seed"], int)

    class Plain(Talk):
        def reset(self, **task):
            observation = super().reset(**task)
            observation.info = {"columns": sorted(task)}
            return observation

    rows = [row()]
    output = MultiTurnRollout(Plain, tasks=rows)([rows[0]["prompt"]], trainer)
    assert output["trajectories"][0].info["columns"] == ["prompt", "replies"]


# --- retries and the failure rate ------------------------------------------------------------------------------------


def unreliable(failures, deed):
    """A factory of environments whose first resets fail."""
    left, lock, made = [failures], threading.Lock(), []

    class Unreliable(Talk):
        def __init__(self):
            super().__init__()
            made.append(self)

        def reset(self, **task):
            with lock:
                left[0] -= 1
                fails = left[0] >= 0
            if fails and deed == "hang":
                time.sleep(HANG)
            if fails:
                raise OSError("not yet")
            return super().reset(**task)

    return Unreliable, made


@pytest.mark.parametrize("deed", ["raise", "hang"])
def test_a_failed_reset_is_tried_again_with_another_environment(make_trainer, deed):
    environment, made = unreliable(2, deed)
    output, trainer = play(make_trainer, [None], environment, env_reset_retries=2)
    assert output["stop_reason"] == ["completed"] and len(made) == 3
    assert trainer._metrics["train"]["env/resets_retried"] == [2.0]
    assert [environment.closed for environment in made] == ([1, 1, 0] if deed == "raise" else [0, 0, 0])


def test_retries_are_bounded(make_trainer):
    environment, made = unreliable(100, "raise")
    with pytest.raises(RuntimeError, match="OSError: not yet"):
        play(make_trainer, [None], environment, env_reset_retries=1)
    assert len(made) == 2


def test_a_step_is_never_tried_again(make_trainer):
    calls = Counter()

    class Once(Talk):
        def step(self, message):
            calls["step"] += 1
            if calls["step"] == 1:
                raise OSError("lost")
            return super().step(message)

    output, _ = play(make_trainer, [None, None], Once, env_reset_retries=5)
    assert sorted(output["stop_reason"]) == ["completed", "env_error"]


@pytest.mark.parametrize(("failing", "allowed", "stops"), [(1, 0.25, False), (2, 0.25, True), (3, 0.8, False)])
def test_the_run_stops_when_too_many_environments_fail(make_trainer, failing, allowed, stops):
    deeds = ["raise"] * failing + [None] * (4 - failing)
    if stops:
        with pytest.raises(RuntimeError, match=f"{failing} of 4 environments.*connection lost.*max_env_failure_rate"):
            play(make_trainer, deeds, max_env_failure_rate=allowed)
    else:
        output, _ = play(make_trainer, deeds, max_env_failure_rate=allowed)
        assert output["stop_reason"].count("env_error") == failing


# --- concurrency -----------------------------------------------------------------------------------------------------


def test_no_more_environments_exist_at_once_than_allowed(make_trainer, both_schedules):
    made = []

    class Counted(Chaotic):
        def __init__(self):
            super().__init__()
            made.append(self)

    rows = [row(*[[user("Go on.")]] * n, number=n) for n in (0, 3, 1, 0, 2, 1)]
    trainer = make_trainer(rows, script=["Yes.<|im_end|>"] * 4)
    output = MultiTurnRollout(Counted, tasks=rows, max_concurrent_envs=2)([r["prompt"] for r in rows], trainer)
    assert [len(t.turns) for t in output["trajectories"]] == [1, 4, 2, 1, 3, 2]
    assert len(made) == 2
    if both_schedules == "lock step":  # an episode begins as soon as another one has ended
        assert [len(batch) for batch in trainer.contexts] == [2, 2, 2, 2, 2, 2, 1]


def test_a_slot_whose_environment_hangs_is_free_again(make_trainer):
    output, _ = play(make_trainer, ["hang", "hang in reset", None, None], max_concurrent_envs=1)
    assert output["stop_reason"] == ["env_timeout", "env_timeout", "completed", "completed"]


class Async(MultiTurnEnvironment):
    """An environment of coroutines."""

    loops = set()

    async def reset(self, deed=None, **task):
        self.deed, self.steps = deed, 0
        type(self).loops.add(id(asyncio.get_running_loop()))
        await asyncio.sleep(0.01)
        return Observation([user("Begin.")])

    async def step(self, message):
        self.steps += 1
        if self.deed == "hang":
            await asyncio.sleep(HANG)
        if self.deed == "go on":
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(HANG)
            await asyncio.sleep(HANG)
        if self.deed == "block":
            time.sleep(HANG)
        if self.deed == "raise":
            raise OSError("connection lost")
        await asyncio.sleep(0.01)
        return StepResult([user("Go on.")], reward=0.5, terminated=self.steps == 2)


def test_coroutines_run_on_one_loop(make_trainer):
    Async.loops.clear()
    output, _ = play(make_trainer, [None] * 8, Async)
    assert output["stop_reason"] == ["completed"] * 8 and output["environment_reward"] == [1.0] * 8
    assert len(Async.loops) == 1


@pytest.mark.parametrize(
    ("deed", "reason"), [("hang", "env_timeout"), ("go on", "env_timeout"), ("raise", "env_error")]
)
def test_a_fault_of_a_coroutine_costs_its_own_episode_only(make_trainer, deed, reason):
    output, trainer = play(make_trainer, [deed, None, None], Async)
    assert output["stop_reason"] == [reason, "completed", "completed"]
    start = time.monotonic()
    trainer.played_by.close()
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("blocks", [False, True], ids=["awaits", "blocks"])
def test_a_coroutine_that_is_given_up_cleans_up_before_its_environment_closes(make_trainer, blocks):
    class Slow(Async):
        async def reset(self, **task):
            VARIABLE.set(self)
            return await super().reset(**task)

        async def step(self, message):
            try:
                if self.deed == "hang" and blocks:
                    time.sleep(LIMIT)
                return await super().step(message)
            finally:
                await asyncio.sleep(0.2 if self.deed == "hang" else 0.01)
                if self.deed == "hang" and VARIABLE.get() is self:
                    is_clean.set()

        def close(self):
            if self.deed == "hang" and VARIABLE.get() is self and is_clean.is_set():
                is_closed.set()

    is_clean, is_closed = threading.Event(), threading.Event()
    _, trainer = play(make_trainer, ["hang", None], Slow, env_timeout=LIMIT / 4, max_concurrent_envs=1)
    trainer.played_by.close()
    assert is_closed.wait(LIMIT * 5)


def test_a_coroutine_that_blocks_the_loop_spoils_one_step_and_not_the_run(make_trainer):
    rows = [row(deed=deed, number=i) for i, deed in enumerate(["block", None])]
    trainer = make_trainer(rows, script=["Yes.<|im_end|>"] * 9, max_completion_length=20)
    rollout = MultiTurnRollout(Async, tasks=rows, env_timeout=LIMIT, env_reset_retries=0)
    with pytest.raises(RuntimeError, match="no answer within"):
        rollout([r["prompt"] for r in rows], trainer)
    assert rollout([rows[1]["prompt"]], trainer)["stop_reason"] == ["completed"]


# --- text ------------------------------------------------------------------------------------------------------------


class Verbose(Talk):
    text = ""

    def reset(self, opening_text=None, **task):
        observation = super().reset(**task)
        if opening_text:
            observation.messages[0]["content"] = type(self).text
        return observation

    def step(self, message):
        result = super().step(message)
        for reply in result.messages:
            reply["content"] = type(self).text
        return result


def verbose(text):
    return type("Verbose", (Verbose,), {"text": text})


def test_long_observations_are_cut(make_trainer):
    output, trainer = play(make_trainer, [None], verbose("abc" * 100), max_observation_tokens=30)
    (trajectory,) = output["trajectories"]
    assert trajectory.messages[1]["content"] == "abc" * 10 + "\n[cut: 30 of 300 characters]"
    assert "abc" * 10 + "\n[cut" in trainer.processing_class.decode(trajectory.turns[1].context_ids)
    assert trainer._metrics["train"]["env/observations_cut"] == [1.0]


@pytest.mark.parametrize("limit", [299, 300, 301, math.inf])
def test_observations_within_the_limit_are_left_alone(make_trainer, limit):
    output, _ = play(make_trainer, [None], verbose("abc" * 100), max_observation_tokens=limit)
    text = output["trajectories"][0].messages[1]["content"]
    assert (text == "abc" * 100) == (limit >= 300)


def test_a_cut_never_splits_a_character(make_trainer):
    output, _ = play(make_trainer, [None], verbose("\N{PILE OF POO}" * 20), max_observation_tokens=6)
    assert output["trajectories"][0].messages[1]["content"] == "\N{PILE OF POO}\n[cut: 1 of 20 characters]"


def test_fifty_megabytes_cost_little(make_trainer):
    text = "lorem ipsum " * (50 * 2**20 // 12)
    start = time.process_time()
    output, _ = play(make_trainer, [None], verbose(text), max_observation_tokens=500, max_context_length=2000)
    assert output["stop_reason"] == ["completed"] and len(output["completion_ids"][0]) < 1000
    assert time.process_time() - start < 30


def test_an_endless_opening_is_an_overflow(make_trainer):
    rows = [row(opening_text="yes"), row()]
    trainer = make_trainer(rows, script=["Yes.<|im_end|>"])
    output = MultiTurnRollout(verbose("word " * 10**7), tasks=rows)([r["prompt"] for r in rows], trainer)
    assert output["stop_reason"] == ["context_overflow", "completed"]


def test_characters_without_utf8_form_are_replaced(make_trainer):
    output, _ = play(make_trainer, [None], verbose("a\ud83db\x00c"))
    assert output["trajectories"][0].messages[1]["content"] == "a?b\x00c"


def test_an_environment_cannot_change_the_conversation_afterwards(make_trainer):
    class Sly(Talk):
        def reset(self, **task):
            observation = super().reset(**task)
            self.kept = observation.messages
            return observation

        def step(self, message):
            message["content"] = "I said this."
            for kept in self.kept:
                kept["content"] = "You never saw this."
            result = super().step(message)
            self.kept = result.messages
            return result

    output, trainer = play(make_trainer, [None], Sly, replies=2)
    assert [m["content"] for m in output["trajectories"][0].messages] == ["Yes.", "Go on."] * 2 + ["Yes."]


# --- whole runs ------------------------------------------------------------------------------------------------------


class Storm(MultiTurnEnvironment):
    """In every batch of eight: one raises, one hangs, one floods, one returns garbage, one leaks, three play well."""

    leaked = []

    def reset(self, deed, **task):
        self.deed, self.steps = deed, 0
        return Observation([user("w1 w2 w3")])

    def step(self, message):
        self.steps += 1
        if self.deed == "raise":
            raise OSError("connection lost")
        if self.deed == "hang":
            time.sleep(HANG)
        if self.deed == "garbage":
            return object()
        if self.deed == "leak":
            Storm.leaked += [open(__file__), threading.Thread(target=time.sleep, args=(HANG,), daemon=True)]
            Storm.leaked[-1].start()
        text = "w5 " * (50 * 2**20 // 3) if self.deed == "flood" else "w4 w5"
        return StepResult([user(text)], reward=float(len(message["content"]) % 3), terminated=self.steps == 3)


DEEDS = ["raise", "hang", "flood", "garbage", "leak", None, None, None]


@pytest.mark.slow
def test_a_run_through_a_storm_ends_with_the_right_counts_and_finite_parameters(tiny_dir, tmp_path):
    rows = [{"prompt": [user(f"w{i}")], "deed": deed or ""} for i, deed in enumerate(DEEDS)]
    trainer = SeeUPOTrainer(
        model=load_tiny_model(tiny_dir),
        args=SeeUPOConfig(
            str(tmp_path),
            max_steps=3,
            num_generations=2,
            per_device_train_batch_size=16,
            max_completion_length=8,
            max_context_length=400,
            max_observation_tokens=40,
            env_timeout=2.0,
            generation_kwargs={"forced_eos_token_id": tiny_tokenizer().eos_token_id},
            learning_rate=1e-3,
            **ON_CPU,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        environment_factory=Storm,
    )
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train()
    logs = [log for log in trainer.state.log_history if "turn_updates" in log]
    assert len(logs) == 3
    for log in logs:
        assert log["stop_reason/env_error"] == 4 / 16 and log["stop_reason/env_timeout"] == 2 / 16
        assert log["stop_reason/completed"] == 10 / 16
        assert log["env/observations_cut"] == 2 * 3
        assert log["turn_1/pool"] == 10, "no gradient from an environment that failed"
    after = list(trainer.model.parameters())
    assert all(parameter.isfinite().all() for parameter in after)
    assert any(not torch.equal(*pair) for pair in zip(before, after, strict=True))
    for file in Storm.leaked[::2]:
        file.close()


def test_threads_are_used_again(make_trainer):
    rows = [row(*[[user("Go on.")]] * 3, number=i) for i in range(4)]
    trainer = make_trainer(rows, script=["Yes.<|im_end|>"] * 4)
    others = set(threading.enumerate())

    def own_threads():
        return {t for t in threading.enumerate() if t.name == "seeupo-environment"} - others

    rollout = MultiTurnRollout(Talk, tasks=rows)
    for _ in range(4):
        rollout([r["prompt"] for r in rows], trainer)
    assert len(own_threads()) == 4
    del rollout
    gc.collect()
    assert wait_until(lambda: not own_threads())


@pytest.mark.slow
def test_the_interpreter_exits_although_environments_hang(tmp_path):
    arguments = [sys.executable, str(HELPERS / "stuck_run.py"), str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().endswith("['env_timeout', 'completed']"), done.stderr[-2000:]
    assert done.returncode == 0


CLOSES_IN_A_THREAD = """
import asyncio
from seeupo_trl import MultiTurnEnvironment
from seeupo_trl.rollout.environment_pool import EnvironmentPool

class Threaded(MultiTurnEnvironment):
    reset = step = None

    async def close(self):
        await asyncio.to_thread(print, "closed")

pools = [EnvironmentPool(), EnvironmentPool()]
for pool in pools:
    instance = pool.new_instance(Threaded)
    pool.call([(instance, instance.made)], None)
pools[0].close()
"""


@pytest.mark.slow
def test_what_cannot_close_as_the_interpreter_exits_says_what_to_do(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(CLOSES_IN_A_THREAD)
    done = run_command([*warm_python.interpreter(), str(script)])
    assert done.stdout == "closed\n"
    (warning,) = [line for line in done.stderr.splitlines() if line.startswith("Could not close Threaded: ")]
    assert warning.endswith("is closed by `close()` of the trainer, or of the rollout, at the end of the script.")
