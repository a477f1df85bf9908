"""TRL environments: time limits, quarantine and waves, which TRL's own loop has not, and what is refused early."""

import asyncio
import contextlib
import io
import signal
import sqlite3
import threading
import time
from functools import partial

import pytest
import torch
from interrupting import interrupt, living
from scripted_tools import COUNTING, END, SCRIPTS, ScriptedSeeUPO, call, make_tool_trainer, play, row
from tool_environments import Counter, Database, Unreliable
from waiting import wait_until

from seeupo_trl import MultiTurnEnvironment
from seeupo_trl.rollout.environment_pool import NotAnEnvironmentError
from seeupo_trl.rollout.shared_state import SharedStateError


pytestmark = pytest.mark.usefixtures("both_schedules")


@pytest.fixture
def make(tmp_path):
    return partial(make_tool_trainer, tmp_path)


@pytest.fixture
def play_unreliable(make):
    def play_unreliable(*faults, response=None, **config):
        config = {"env_timeout": 2.0, "env_reset_retries": 0, "max_env_failure_rate": 0.9, **config}
        script = {"Task": [(response or call("increment", step=2)) + END, f"So.{END}"]}
        trainer = make(ScriptedSeeUPO, type("Fresh", (Unreliable,), {"made": 0}), script, **config)
        play(trainer, [row("a", fault=fault) for fault in faults])
        return trainer

    return play_unreliable


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("reset", "env_error"),
        ("reward", "env_error"),
        ("reset hangs", "env_timeout"),
        ("tool hangs", "env_timeout"),
    ],
)
def test_a_fault_costs_its_own_episode_only(play_unreliable, fault, reason):
    trainer = play_unreliable(None, fault)
    assert [trajectory.stop_reason for trajectory in trainer._batch.trajectories] == ["completed"] * 2 + [reason] * 2
    assert trainer._batch.rewards_per_func.isnan().tolist() == [[False] * 2] * 2 + [[True] * 2] * 2
    # a reward function may look at every environment, and at every last message
    assert [type(environment).__name__ for environment in trainer.environments] == ["Fresh"] * 4
    assert all(completion[-1]["role"] == "assistant" for completion in trainer.seen[0][1])


def test_a_coroutine_that_hangs_times_out(play_unreliable):
    with pytest.raises(RuntimeError, match="All 2 environments of the batch failed. The first error: TimeoutError"):
        play_unreliable(None, response=call("wait"))


def test_a_reset_that_failed_is_tried_with_another_instance(play_unreliable):
    trainer = play_unreliable("first reset", env_reset_retries=2)
    assert [trajectory.stop_reason for trajectory in trainer._batch.trajectories] == ["completed"] * 2
    assert [environment.value for environment in trainer.environments] == [2, 2]


def test_an_instance_that_failed_is_not_used_again(play_unreliable):
    trainer = play_unreliable(None, "reset")
    failed = trainer.environments[2:]
    play(trainer, [row("a", fault=None)] * 2)
    assert not any(environment in failed for environment in trainer.environments)


@pytest.mark.parametrize("waves", [None, 1, 3])
def test_instances_are_made_once_and_keep_their_state_until_they_are_scored(make, waves):
    made = []

    class Made(Counter):
        def __init__(self):
            made.append(self)

    trainer = make(ScriptedSeeUPO, Made, SCRIPTS, max_concurrent_envs=waves)
    for _ in range(2):
        play(trainer, COUNTING)
        assert len(made) == 2 * len(COUNTING) == len(set(trainer.environments))
        assert [environment.value for environment in trainer.environments[::2]] == [2, 2, 2, 5, 5]
    before = trainer.environments
    play(trainer, COUNTING[:1])
    assert trainer.environments == before[:2]


class Interrupting(Counter):
    """Interrupts the script once, where `interrupts_in` says."""

    def __init__(self):
        self.made.append(self)
        if len(self.made) == 3:
            self._interrupt("factory")

    def reset(self, start: int = 0, **row):
        self._interrupt("reset")
        return super().reset(start, **row)

    def read(self) -> str:
        """
        Reads the counter.

        Returns:
            The counter in words.
        """
        self._interrupt("tool")
        return super().read()

    def get_reward(self):
        self._interrupt("get_reward")
        return super().get_reward()

    def _interrupt(self, place):
        if place in self.interrupts_in:
            self.interrupts_in.remove(place)
            self.interrupted.append(self)
            interrupt()
            self.go_on.wait(30)


@pytest.fixture
def make_interrupting(make):
    def make_interrupting(*places):
        members = {"made": [], "interrupted": [], "go_on": threading.Event(), "interrupts_in": list(places)}
        factory = type("Interrupting", (Interrupting,), members)
        return make(ScriptedSeeUPO, factory, SCRIPTS), factory

    return make_interrupting


@pytest.mark.parametrize("place", ["factory", "reset", "tool", "get_reward"])
def test_only_the_instance_that_was_interrupted_plays_no_more(make_interrupting, interruptible, place):
    others = living()
    trainer, factory = make_interrupting(place)
    with pytest.raises(KeyboardInterrupt):
        play(trainer, COUNTING)
    play(trainer, COUNTING)
    (instance,) = factory.interrupted
    assert instance not in trainer.environments
    factory.go_on.set()
    assert wait_until(lambda: len(living() - others) == len(trainer.environments))


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_instances_of_a_batch_that_ended_while_sampling_play_the_next_one(make_interrupting, monkeypatch, error):
    def respond(context):
        if len(answered) == 12:
            raise error
        answered.append(context)
        return plain(context)

    others = living()
    trainer, factory = make_interrupting()
    plain, answered = trainer.respond, []
    monkeypatch.setattr(trainer, "respond", respond)
    with pytest.raises(error):
        play(trainer, COUNTING)
    trainer.respond = plain
    play(trainer, COUNTING)
    assert wait_until(lambda: len(living() - others) == len(trainer.environments))


@pytest.mark.parametrize("factory", [Database, lambda: Database()], ids=["class", "function"])
def test_an_environment_lives_in_one_thread(make, factory):
    script = {"Task": [f"{call('write', text='a')}{END}", f"{call('write', text='b')}{END}", f"So.{END}"]}
    trainer = make(ScriptedSeeUPO, factory, script)
    for _ in range(2):
        seen = play(trainer, [row("a")] * 4)
        assert seen["metrics"]["tools/failure_frequency"] == [0.0]
        assert seen["metrics"]["rewards/Database/mean"] == [2.0]


def test_a_tool_for_the_main_thread_is_nobodys_mistake_but_the_environments(make, caplog, both_schedules):
    class Alarmed(Counter):
        def increment(self, step: int) -> int:
            """
            Adds within a second.

            Args:
                step: Anything.
            """
            try:
                signal.signal(signal.SIGALRM, lambda *_: None)
            except ValueError as error:
                raise RuntimeError("no alarm") from error

    Alarmed.__name__ += both_schedules  # a class is named once
    trainer = make(ScriptedSeeUPO, Alarmed, SCRIPTS, env_reset_retries=0)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="All 4 environments of the batch failed"):
            play(trainer, [row("one")] * 2)
    warnings = [record.message for record in caplog.records if "works in one thread only" in record.message]
    assert len(warnings) == 1 and "The tool increment of Alarmed" in warnings[0]


@pytest.mark.parametrize("tool", ["query", "query_later"])
def test_a_connection_of_the_scripts_thread_is_nobodys_mistake_but_the_environments(make, caplog, request, tool):
    connection = sqlite3.connect(":memory:")

    def query(text: str) -> str:
        """
        Asks.

        Args:
            text: Anything.
        """
        return str(connection.execute(text).fetchall())

    async def query_later(text: str) -> str:
        """
        Asks.

        Args:
            text: Anything.
        """
        return query(text)

    fresh = type(request.node.name, (Counter,), {})  # a class is named once
    script = {"Task": [f"{call(tool, text='SELECT 1')}{END}", f"So.{END}"]}
    trainer = make(ScriptedSeeUPO, fresh, script, tools=[query, query_later])
    with pytest.raises(RuntimeError, match="All 2 environments of the batch failed.*SQLite objects created in a thr"):
        play(trainer, [row("a")])
    assert (
        sum(f"The tool {tool} of {fresh.__name__} works in one thread only" in text for text in caplog.messages) == 1
    )


def set_alarm(value):
    """Works in the main thread only."""
    signal.signal(signal.SIGALRM, lambda *_: None)
    return value


class AlarmedFactory(Counter):
    def __init__(self):
        set_alarm(None)


class AlarmedReset(Counter):
    def reset(self, **row):
        return set_alarm(super().reset(**row))


class AlarmedReward(Counter):
    def get_reward(self):
        return set_alarm(1.0)


class AlarmedRewardLater(Counter):
    async def get_reward(self):
        return set_alarm(1.0)


@pytest.mark.parametrize(
    ("method", "alarmed"),
    [("reset", AlarmedReset), ("get_reward", AlarmedReward), ("get_reward", AlarmedRewardLater)],
    ids=["reset", "get_reward", "get_reward later"],
)
def test_what_to_do_is_said_where_more_than_tools_need_the_main_thread(make, caplog, both_schedules, method, alarmed):
    fresh = type(alarmed.__name__ + both_schedules, (alarmed,), {})  # a class is named once
    trainer = make(ScriptedSeeUPO, fresh, SCRIPTS, env_reset_retries=0)
    with pytest.raises(RuntimeError, match="signal only works in main thread.* a thread of its own. Make such things"):
        play(trainer, [row("one")] * 2)
    assert sum(f"`{method}` of {fresh.__name__} works in one thread only" in text for text in caplog.messages) == 1


def test_a_factory_that_needs_the_main_thread_is_told_what_to_do(make, caplog, both_schedules):
    fresh = type(AlarmedFactory.__name__ + both_schedules, (AlarmedFactory,), {})  # a class is named once
    with pytest.raises(ValueError, match="signal only works in main thread"):
        make(ScriptedSeeUPO, fresh, SCRIPTS)
    (warning,) = [text for text in caplog.messages if "works in one thread only" in text]
    assert f"The factory {fresh.__name__} works" in warning and "left out of training" not in warning


@pytest.mark.parametrize("tool", ["ask", "ask_later"])
def test_a_tool_that_returns_the_error_of_its_thread_is_warned_of_and_trained_on(make, caplog, request, tool):
    connection = sqlite3.connect(":memory:")

    class Asked(Counter):
        def ask(self, text: str) -> str:
            """
            Asks.

            Args:
                text: Anything.
            """
            try:
                return str(connection.execute(text).fetchall())
            except Exception as error:
                return f"Error: {error}"

        async def ask_later(self, text: str) -> list:
            """
            Asks.

            Args:
                text: Anything.
            """
            return [self.ask(text)]

    Asked.__name__ = request.node.name  # a class is named once
    script = {"Task": [f"{call(tool, text='SELECT 1')}{END}", f"So.{END}"]}
    trainer = make(ScriptedSeeUPO, Asked, script)
    for _ in range(2):
        assert play(trainer, [row("a")] * 2)["metrics"]["tools/failure_frequency"] == [0.0]
        assert {trajectory.stop_reason for trajectory in trainer._batch.trajectories} == {"completed"}
    warnings = [text for text in caplog.messages if "in one thread only" in text]
    assert len(warnings) == 1 and f"The tool {tool} of {Asked.__name__} may work" in warnings[0]


def test_environments_of_a_batch_run_at_the_same_time(make):
    barrier = threading.Barrier(4, timeout=30)

    class Together(Counter):
        def increment(self, step: int) -> int:
            """
            Waits for the others.

            Args:
                step: Anything.
            """
            return barrier.wait() * 0

    trainer = make(ScriptedSeeUPO, Together, SCRIPTS)
    assert play(trainer, [row("one")] * 2)["metrics"]["tools/failure_frequency"] == [0.0]


@pytest.mark.parametrize("at_once", [1, None])
def test_calls_that_replace_what_threads_share_come_one_after_another_or_not_at_all(make, at_once):
    class Printing(Counter):
        def read(self) -> str:
            """Reads what is printed."""
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                time.sleep(0.05)
                print(self.value, end="")
            return printed.getvalue()

        def get_reward(self) -> float:
            return float(self.read())

    script = {f"Task {name}.": [f"{call('increment', step=1)}{END}", f"So.{END}"] for name in ("one", "two", "three")}
    trainer = make(ScriptedSeeUPO, Printing, script, max_concurrent_envs=at_once)
    rows = [row(name, start=start) for start, name in enumerate(("one", "two", "three"))]
    if at_once is None:
        with pytest.raises(SharedStateError, match="replace sys.stdout for one another"):
            play(trainer, rows)
    else:
        play(trainer, rows)
        assert [trajectory.reward for trajectory in trainer._batch.trajectories] == [1, 1, 2, 2, 3, 3]


def test_an_image_needs_a_model_that_sees(make):
    class Camera:
        def reset(self, **row):
            return None

        def look(self) -> list:
            """Looks."""
            return [{"type": "image", "image": "a picture"}]

    trainer = make(ScriptedSeeUPO, Camera, {"": [f"{call('look')}{END}"]})
    with pytest.raises(RuntimeError, match="returned an image, but the policy reads text only"):
        play(trainer, [row("a")])


def test_a_factory_that_returns_the_same_instance_again_is_an_error(make):
    only_one = Counter()
    trainer = make(ScriptedSeeUPO, lambda: only_one, SCRIPTS)
    with pytest.raises(NotAnEnvironmentError, match="returned the same Counter again"):
        play(trainer, COUNTING)


@pytest.mark.parametrize(
    "given", [Counter(), [Counter], {"counter": Counter()}], ids=["instance", "list", "in a dict"]
)
def test_an_instance_in_place_of_a_factory_is_an_error(make, given):
    with pytest.raises(TypeError, match=r"`environment_factory.*` is a (Counter|list); give a class"):
        make(ScriptedSeeUPO, given, SCRIPTS)


def test_an_undocumented_tool_is_an_early_error(make):
    class Undocumented(Counter):
        def decrement(self, step: int):
            pass

    with pytest.raises(Exception, match="no docstring"):
        make(ScriptedSeeUPO, Undocumented, SCRIPTS)


def test_a_prompt_that_is_no_conversation_is_an_error(make):
    trainer = make(ScriptedSeeUPO, Counter, SCRIPTS, env_reset_retries=0)
    with pytest.raises(RuntimeError, match="Give a list of messages"):
        play(trainer, [{"prompt": "Task one."}])


def test_a_message_of_the_prompt_that_the_template_leaves_out_is_warned_of_and_no_fault_of_the_environment(
    make, caplog
):
    trainer = make(ScriptedSeeUPO, Counter, SCRIPTS)
    prompt = [{"role": "developer", "content": "Be brief."}, *row("one")["prompt"]]
    for _ in range(2):
        play(trainer, [row("one"), {"prompt": prompt}])
        assert [trajectory.stop_reason for trajectory in trainer._batch.trajectories] == ["completed"] * 4
    (warning,) = [text for text in caplog.messages if "shows nothing of a message" in text]
    assert "with the role 'developer' in the dataset's `prompt`" in warning


def test_an_unknown_kind_of_environment_is_an_error(make):
    trainer = make(ScriptedSeeUPO, {"counter": Counter}, SCRIPTS)
    with pytest.raises(ValueError, match="`environment='count'`, which is not among .*: 'counter'"):
        play(trainer, [row("one", environment="count")])


def test_a_dict_takes_no_environments_of_messages(make):
    class Talk(MultiTurnEnvironment):
        pass

    with pytest.raises(ValueError, match=r"environment_factory\['talk'\].*makes a MultiTurnEnvironment"):
        make(ScriptedSeeUPO, {"counter": Counter, "talk": Talk}, SCRIPTS)


def test_a_call_that_is_nested_deeply_ends_no_run(make):
    response = '<tool_call>\n{"name": "read", "arguments": {"x": ' + "[" * 1200 + "\n</tool_call>"
    trainer = make(ScriptedSeeUPO, Counter, {"Task": [response + END]}, max_completion_length=1300)
    (message,) = play(trainer, [row("one", start=1)])["generated"][0]["completions"][0]
    assert message["content"].count("[") == 1200


class SharesAsyncio(Counter):
    """An event loop and a limit that all instances share."""

    loop = asyncio.new_event_loop()

    def __init__(self, limit):
        self._limit = limit

    async def _limited(self):
        async with self._limit:
            await asyncio.sleep(0.002)
        return "answer"

    def ask(self) -> str:
        """
        Asks.
        """
        return self.loop.run_until_complete(self._limited())

    def ask_in_its_own_loop(self) -> str:
        """
        Asks.
        """
        return asyncio.run(self._limited())

    async def ask_later(self) -> str:
        """
        Asks.
        """
        return await self._limited()


@pytest.mark.parametrize(("tool", "at_once"), [("ask", 1), ("ask_in_its_own_loop", 1), ("ask_later", None)])
def test_objects_of_asyncio_are_shared_one_after_another_or_in_coroutines(make, tool, at_once):
    factory = partial(SharesAsyncio, asyncio.Semaphore(1))
    script = {"Task": [f"{call(tool)}{END}", f"So.{END}"]}
    trainer = make(ScriptedSeeUPO, factory, script, max_concurrent_envs=at_once)
    assert play(trainer, [row("a")] * 2)["metrics"]["tools/failure_frequency"] == [0.0]
