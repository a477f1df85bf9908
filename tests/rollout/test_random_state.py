"""Environments that seed the random generators of the process, in `reset` or `get_reward`, do it one after another."""

import asyncio
import contextlib
import io
import itertools
import random
import threading
import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from interrupting import interrupt
from scripted_tools import END, ScriptedSeeUPO, call, make_tool_trainer
from scripted_tools import play as play_tools
from scripted_tools import row as task
from talk import Talk, row, user
from tool_environments import Counter

from seeupo_trl import MultiTurnRollout
from seeupo_trl.rollout import environment_pool
from seeupo_trl.rollout.free import play_freely
from seeupo_trl.rollout.random_state import RandomState


pytestmark = pytest.mark.usefixtures("both_schedules")

SEEDS = [1, 1, 1, 2, 2, 2]


class Seeded(Talk):
    """Its task is what the generators of the process say for a seed, which is looked up slowly."""

    def reset(self, seed, **kwargs):
        random.seed(seed)
        np.random.seed(seed)
        time.sleep(0.01)
        self.game = (random.random(), np.random.random())
        return super().reset(**kwargs)


def rows_and_trainer(make_trainer, columns):
    rows = [row([user("Go on.")], number=i, **more) for i, more in enumerate(columns)]
    return rows, make_trainer(rows, script=["Yes.<|im_end|>"] * 9, max_completion_length=20)


def play(make_trainer, environment, columns, **options):
    rows, trainer = rows_and_trainer(make_trainer, columns)
    return MultiTurnRollout(environment, tasks=rows, **options)([r["prompt"] for r in rows], trainer)


@pytest.mark.parametrize("is_coroutine", [False, True], ids=["function", "coroutine"])
@pytest.mark.parametrize("at_once", [None, 1, 2])
def test_members_of_a_group_begin_the_task_of_their_seed(make_trainer, at_once, is_coroutine):
    games = {}

    class Noted(Seeded):
        def reset(self, seed, number, **kwargs):
            if is_coroutine:
                return self.reset_later(seed, **kwargs)
            opening = super().reset(seed, **kwargs)
            games.setdefault(seed, set()).add(self.game)
            return opening

        async def reset_later(self, seed, **kwargs):
            random.seed(seed)
            await asyncio.sleep(0.01)
            games.setdefault(seed, set()).add(random.random())
            return Talk.reset(self, **kwargs)

        def step(self, message):
            random.random()  # between the two lines of another's reset
            return super().step(message)

    play(make_trainer, Noted, [{"seed": seed} for seed in SEEDS], max_concurrent_envs=at_once)
    assert [len(played) for played in games.values()] == [1, 1]


def seeds_for_itself(seed):
    state = np.random.get_state()
    np.random.seed(seed)
    yield np.random.random()
    yield np.random.random()
    np.random.set_state(state)


def puts_back_a_state(seed):
    random.setstate(random.Random(seed).getstate())
    yield random.random()
    yield random.random()


def seeds_torch(seed, manual_seed=torch.manual_seed):  # as one that `from torch import manual_seed` gave it
    manual_seed(seed)
    yield torch.rand(1).item()
    yield torch.rand(1).item()


@pytest.mark.parametrize("draw", [seeds_for_itself, puts_back_a_state, seeds_torch])
def test_also_where_the_state_shows_no_seed(make_trainer, draw):
    games = {}

    class Noted(Talk):
        def reset(self, seed, **kwargs):
            game = []
            for number in draw(seed):
                game.append(number)
                time.sleep(0.01)
            games.setdefault(seed, set()).add(tuple(game))
            return super().reset(**kwargs)

    before = np.random.get_state()[1].tolist()
    with torch.random.fork_rng():
        play(make_trainer, Noted, [{"seed": seed} for seed in SEEDS])
    assert [len(played) for played in games.values()] == [1, 1]
    assert np.random.get_state()[1].tolist() == before


def test_what_another_thread_seeds_meanwhile_is_not_the_environments(make_trainer):
    barrier = threading.Barrier(2, timeout=30)

    class Innocent(Talk):
        def reset(self, number, **kwargs):
            if number == 0:
                update = threading.Thread(target=lambda: torch.set_rng_state(torch.get_rng_state()))
                update.start()
                update.join()
            else:
                barrier.wait()
            return super().reset(**kwargs)

    assert play(make_trainer, Innocent, [{}] * 3)["stop_reason"] == ["completed"] * 3


def test_what_seeds_is_as_before_when_two_rollouts_have_begun_at_the_same_time():
    before = [random.seed, random.setstate, np.random.seed, np.random.set_state, torch.set_rng_state]
    has_begun, has_ended = threading.Event(), threading.Event()

    def second():
        has_begun.set()
        assert has_ended.wait(30)

    thread = threading.Thread(target=RandomState("").watched(object(), second, is_alone=True))

    def first():
        thread.start()
        assert has_begun.wait(30)

    RandomState("").watched(object(), first, is_alone=True)()
    has_ended.set()
    thread.join()
    after = [random.seed, random.setstate, np.random.seed, np.random.set_state, torch.set_rng_state]
    assert all(one is other for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("seeds", [True, False], ids=["seed", "draw"])
def test_rewards_that_seed_are_computed_one_after_another_and_others_at_the_same_time(tmp_path, seeds):
    barrier = threading.Barrier(3, timeout=30)
    numbers = itertools.count()

    class Judged(Counter):
        def get_reward(self):
            if seeds:
                random.seed(3)
            elif next(numbers) > 0:
                barrier.wait()
            reward = random.random()
            time.sleep(0.01)
            return reward + random.random()

    trainer = make_tool_trainer(tmp_path, ScriptedSeeUPO, Judged, {"Task": [f"So.{END}"]})
    play_tools(trainer, [task("a"), task("b")])
    rewards = [trajectory.reward for trajectory in trainer._batch.trajectories]
    assert (len(rewards), len(set(rewards))) == (4, 1 if seeds else 4)


def test_a_reward_that_hangs_at_the_beginning_holds_the_others_up_once(tmp_path):
    starts = []

    class Hanging(Counter):
        def get_reward(self):
            starts.append(time.perf_counter())
            random.seed(3)
            time.sleep(20.0)

    before = random.getstate()
    trainer = make_tool_trainer(tmp_path, ScriptedSeeUPO, Hanging, {"Task": [f"So.{END}"]}, env_timeout=1.0)
    with pytest.raises(RuntimeError, match="`env_timeout`"):
        play_tools(trainer, [task("a"), task("b")])
    assert starts[1] - starts[0] >= 1.0 > starts[3] - starts[1]
    random.setstate(before)


def test_the_same_holds_for_environments_of_tools(tmp_path):
    games = {}

    class Drawn(Counter):
        def reset(self, seed, **kwargs):
            random.seed(seed)
            time.sleep(0.01)
            games.setdefault(seed, []).append(random.random())
            return super().reset()

    trainer = make_tool_trainer(tmp_path, ScriptedSeeUPO, Drawn, {"Task": [f"{call('read')}{END}", f"So.{END}"]})
    play_tools(trainer, [task("a", seed=seed) for seed in SEEDS])
    assert [(len(drawn), len(set(drawn))) for drawn in games.values()] == [(6, 1), (6, 1)]


def test_a_kind_that_seeds_begins_alone_also_after_another_kind_that_does_not(tmp_path):
    games = []

    class Drawn(Counter):
        def reset(self, **kwargs):
            random.seed(3)
            time.sleep(0.01)
            games.append(random.random())
            return super().reset()

    trainer = make_tool_trainer(
        tmp_path, ScriptedSeeUPO, {"seeds": Drawn, "draws": Counter}, {"Task": [f"{call('read')}{END}", f"So.{END}"]}
    )
    play_tools(trainer, [task("a", environment=kind) for kind in ("seeds", "draws", "seeds", "seeds")])
    assert (len(games), len(set(games))) == (6, 1)


def test_one_that_seeds_only_later_is_worth_a_warning_and_begins_alone_from_then_on(make_trainer, caplog):
    class Sometimes(Seeded):
        active, most = 0, 0

        def reset(self, number, draws, **kwargs):
            Sometimes.active += 1
            Sometimes.most = max(Sometimes.most, Sometimes.active)
            opening = super().reset(0, **kwargs) if draws else Talk.reset(self, **kwargs)
            time.sleep(0.05)
            Sometimes.active -= 1
            return opening

    columns = [{"draws": number == 3} for number in range(4)]
    rows, trainer = rows_and_trainer(make_trainer, columns)
    rollout = MultiTurnRollout(Sometimes, tasks=rows)
    rollout([r["prompt"] for r in rows], trainer)
    assert sum("members of a group may have got different tasks" in text for text in caplog.messages) == 1
    assert Sometimes.most > 1
    Sometimes.most = 0
    rows, trainer = rows_and_trainer(make_trainer, columns)
    rollout([r["prompt"] for r in rows], trainer)
    assert Sometimes.most == 1


@pytest.mark.parametrize("first", [0, 2], ids=["first", "third"])
def test_one_that_hangs_at_the_beginning_holds_the_others_up_once(make_trainer, first):
    starts = []

    class Hanging(Talk):
        def reset(self, number, **kwargs):
            starts.append(time.perf_counter())
            random.seed(number)
            if number >= first:
                time.sleep(20.0)
            return super().reset(**kwargs)

    with pytest.raises(RuntimeError, match=r"environments .* no answer within 1.5 seconds \(`env_timeout`\)"):
        play(make_trainer, Hanging, [{}] * 6, env_timeout=1.5, env_reset_retries=0)
    assert starts[first + 1] - starts[first] >= 1.5 > starts[5] - starts[first + 1]


def test_an_interrupt_in_the_first_reset_leaves_the_generators_as_they_were(make_trainer, interruptible):
    go_on = threading.Event()

    class Waiting(Talk):
        def reset(self, **kwargs):
            interrupt()
            go_on.wait(30)
            return super().reset(**kwargs)

    rows, trainer = rows_and_trainer(make_trainer, [{}])
    before = random.getstate()
    with pytest.raises(KeyboardInterrupt):
        MultiTurnRollout(Waiting, tasks=rows)([r["prompt"] for r in rows], trainer)
    assert random.getstate() == before
    go_on.set()


def test_those_that_draw_without_a_seed_begin_at_the_same_time(make_trainer, caplog):
    barrier = threading.Barrier(5, timeout=30)

    class Choosing(Talk):
        def reset(self, number, **kwargs):
            for _ in range(1000):
                random.choice("abc")
            if number == 0:
                np.random.rand(2600, 2600)
            np.random.choice(20_000, 3, replace=False)  # draws a whole permutation
            if number > 0:
                barrier.wait()
            return super().reset(**kwargs)

        def step(self, message):
            random.random()
            return super().step(message)

    output = play(make_trainer, Choosing, [{}] * 6)
    assert output["stop_reason"] == ["completed"] * 6
    assert not any("random generators" in text for text in caplog.messages)


def test_a_seed_that_is_the_runs_own_is_seen(make_trainer):
    tasks = []

    class Constant(Talk):
        def reset(self, number, **kwargs):
            random.seed(42)
            tasks.append([random.random(), time.sleep(0.01), random.random()])
            return super().reset(**kwargs)

    random.seed(42)
    random.random()
    play(make_trainer, Constant, [{}] * 6)
    assert all(task == tasks[0] for task in tasks)


def test_the_first_reset_leaves_the_generators_as_they_were_if_it_seeds_none(make_trainer):
    class Drawing(Talk):
        def reset(self, number, **kwargs):
            random.random()
            np.random.seed(3)
            return super().reset(**kwargs)

    rows, trainer = rows_and_trainer(make_trainer, [{}])
    before = random.getstate()
    MultiTurnRollout(Drawing, tasks=rows)([rows[0]["prompt"]], trainer)
    assert random.getstate() == before
    assert np.random.get_state()[1].tolist() == np.random.RandomState(3).get_state()[1].tolist()


def test_a_generator_of_another_kind_in_numpy_is_left_alone(make_trainer):
    bit_generator = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(3))
    try:
        output = play(make_trainer, Talk, [{}] * 2)
    finally:
        np.random.set_bit_generator(bit_generator)
    assert output["stop_reason"] == ["completed"] * 2


def test_a_factory_need_not_be_hashable(make_trainer):
    @dataclass
    class Factory:
        name: str = "talk"

        def __call__(self):
            return Talk()

    output = play(make_trainer, Factory(), [{}] * 2)
    assert output["stop_reason"] == ["completed"] * 2


def test_none_begins_once_the_batch_is_cancelled(make_trainer, both_schedules):
    if both_schedules == "lock step":
        pytest.skip("a batch in lock step is not played ahead")
    cancelled, begun = threading.Event(), []

    class Counted(Seeded):
        def reset(self, number, **kwargs):
            begun.append(number)
            if number == 2:
                cancelled.set()
            return super().reset(0, **kwargs)

    rows, trainer = rows_and_trainer(make_trainer, [{}] * 8)
    rollout = MultiTurnRollout(Counted, tasks=rows)
    batch = rollout.prepare(rows, trainer)
    play_freely(batch, batch.sampler, cancelled)
    assert begun == [0, 1, 2]


def test_environments_of_tools_are_made_in_the_order_of_the_rows(tmp_path):
    numbers = itertools.count()

    class Numbered(Counter):
        def __init__(self):
            number = next(numbers)
            with contextlib.redirect_stdout(io.StringIO()):  # while none is called
                time.sleep(0.01 * (number % 3))
            self.number = number

        def get_reward(self):
            return float(self.number)

    trainer = make_tool_trainer(tmp_path, ScriptedSeeUPO, Numbered, {"Task": [f"So.{END}"]})
    play_tools(trainer, [task("a"), task("b"), task("c")])
    assert [trajectory.reward for trajectory in trainer._batch.trajectories] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("limit", [None, 0.5])
def test_environments_of_tools_have_the_time_that_they_take_unless_a_limit_is_given(
    tmp_path, monkeypatch, caplog, limit
):
    monkeypatch.setattr(environment_pool, "LONG_CALL", 0.5)

    class Slow(Counter):
        def get_reward(self):
            time.sleep(0.7)
            return 1.0

    config = {} if limit is None else {"env_timeout": limit}
    trainer = make_tool_trainer(tmp_path, ScriptedSeeUPO, Slow, {"Task": [f"So.{END}"]}, **config)
    if limit is not None:
        with pytest.raises(RuntimeError, match="`env_timeout`"):
            play_tools(trainer, [task("a")])
        return
    play_tools(trainer, [task("a")])
    assert [trajectory.reward for trajectory in trainer._batch.trajectories] == [1.0, 1.0]
    (warning,) = [text for text in caplog.messages if "A call of Slow has taken 0.5 seconds" in text]
    assert "of asyncio that environments share" in warning and "`max_concurrent_envs=1`" in warning


def test_a_factory_that_takes_long_is_named(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(environment_pool, "LONG_CALL", 0.1)

    class SlowToMake(Counter):
        def __init__(self):
            time.sleep(0.2)

    make_tool_trainer(tmp_path, ScriptedSeeUPO, partial(SlowToMake), {"Task": [f"So.{END}"]})
    (warning,) = [text for text in caplog.messages if "has taken" in text]
    assert "The factory SlowToMake has taken 0.1 seconds" in warning
