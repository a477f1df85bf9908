"""TRL environments: the rollout plays them as TRL's own tool loop does, and what it adds does not change a token."""

import asyncio
import copy
import json
import sqlite3
import threading
from functools import partial

import pytest
import torch
import trl
from datasets import Dataset
from test_drop_in import CALL, WRONG_NAME, only, tool_dir  # noqa: F401 - a fixture
from test_multi_turn import byte_tokenizer, run_on_two_processes, tiny_model
from trl import GRPOConfig, GRPOTrainer

from seeupo_trl import MultiTurnEnvironment, MultiTurnRollout, SeeUPOConfig, SeeUPOTrainer, environment_reward
from seeupo_trl.envs.tools import ToolEnvironment


# ---- environments, as TRL's documentation shows them ----


class Counter:
    """Text at the reset, a reward of its own, state that survives the episode."""

    def reset(self, start: int = 0, **row):
        self.value = start
        self.row = row
        return f" Start at {start}."

    def increment(self, step: int) -> int:
        """
        Adds to the counter.

        Args:
            step: What to add.

        Returns:
            The counter.
        """
        self.value += step
        return self.value

    def read(self) -> str:
        """
        Reads the counter.

        Returns:
            The counter in words.
        """
        return f"the counter is {self.value}"

    def fail(self, reason: str):
        """
        Fails.

        Args:
            reason: Why.
        """
        self.value -= 1
        raise ValueError(f"failed: {reason}")

    def get_reward(self) -> float:
        return float(self.value)


class Library:
    """No text at the reset, coroutines beside functions, results that are not text."""

    def __init__(self):
        self.found = []

    def reset(self, shelf=None, **row) -> None:
        self.found = []
        self.shelf = shelf

    async def search(self, words: str, limit: int = 2) -> list[str]:
        """
        Searches.

        Args:
            words: What for.
            limit: Most hits.

        Returns:
            Titles.
        """
        self.found.append(words)
        return [f"{words} {number}" for number in range(limit)]

    async def borrow(self, title: str) -> dict:
        """
        Borrows a book.

        Args:
            title: Its title.

        Returns:
            The receipt.
        """
        if not self.found:
            raise LookupError("search first")
        return {"title": title, "shelf": self.shelf}

    def count(self) -> int:
        """
        Counts what was found.

        Returns:
            The number.
        """
        return len(self.found)


class Silent:
    """Nothing to call; brings the task itself."""

    def reset(self, **row):
        self.row = row
        return "Say something."


class Database:
    """Holds what works in one thread only."""

    def __init__(self):
        self.connection = sqlite3.connect(":memory:")
        self.connection.execute("create table log (text)")

    def reset(self, **row):
        self.connection.execute("delete from log")

    def write(self, text: str) -> int:
        """
        Writes a line.

        Args:
            text: The line.

        Returns:
            Number of lines.
        """
        self.connection.execute("insert into log values (?)", (text,))
        return self._lines()

    def _lines(self) -> int:
        return self.connection.execute("select count(*) from log").fetchone()[0]

    def get_reward(self) -> float:
        return self._lines()


def call(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


END = "<|im_end|>"


# ---- the same script for TRL's trainer and ours ----


class Scripted:
    """The policy is a list of responses for each row; all that the trainer makes of it is recorded."""

    script: dict[str, list[str]]

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        ids = [self.processing_class(self.respond(context))["input_ids"] for context in prompt_ids]
        return [row[: self.max_completion_length] for row in ids], None

    def respond(self, context):
        """The response that follows those the context holds."""
        text = self.processing_class.decode(context)
        script = next((script for opening, script in self.script.items() if opening in text), [f"?{END}"])
        place = 0
        for response in script:
            found = text.find(response, place)
            if found < 0:
                return response
            place = found + len(response)
        return f"?{END}"

    def _generate(self, prompts):
        output = super()._generate(prompts)
        names = ("prompt_ids", "completion_ids", "tool_mask", "completions")
        self.generated.append(
            {"prompts": copy.deepcopy(prompts), **dict(zip(names, copy.deepcopy(output), strict=False))}
        )
        return output


class ScriptedGRPO(Scripted, GRPOTrainer):
    pass


class ScriptedSeeUPO(Scripted, SeeUPOTrainer):
    pass


@pytest.fixture
def make(tmp_path):
    """A scripted trainer whose reward function keeps what it is given."""

    def make(trainer_class, factory, script, template="qwen2_5", tools=None, **config):
        def watching(prompts, completions, completion_ids, environments=None, start=None, shelf=None, **columns):
            state = [vars(environment) for environment in environments]
            state = [{name: repr(value) for name, value in s.items() if name != "connection"} for s in state]
            trainer.seen.append(copy.deepcopy([prompts, completions, completion_ids, state, start, shelf]))
            return [float(len(str(completion))) for completion in completions]

        tokenizer = byte_tokenizer(template)
        settings = {"max_completion_length": 2000, "num_generations": 2, "per_device_train_batch_size": 2}
        settings |= {"max_tool_calling_iterations": 20, "shuffle_dataset": False, "max_steps": 2, "logging_steps": 1}
        config_class = GRPOConfig if issubclass(trainer_class, ScriptedGRPO) else SeeUPOConfig
        trainer = trainer_class(
            model=tiny_model(tokenizer),
            args=config_class(
                output_dir=str(tmp_path),
                report_to=[],
                use_cpu=True,
                bf16=False,
                save_strategy="no",
                **{**settings, **config},
            ),
            train_dataset=Dataset.from_dict({"environment": ["counter", "library"]}),
            processing_class=tokenizer,
            reward_funcs=watching,
            tools=tools,
            environment_factory=factory,
        )
        trainer.script, trainer.generated, trainer.seen = script, [], []
        trainer.model.train()
        return trainer

    return make


def play(trainer, rows):
    """Play the rows twice each, and return all that the trainer's user can see of the episodes."""
    for kept in (trainer.generated, trainer.seen, trainer._metrics["train"], *trainer._logs.values()):
        kept.clear()
    trainer.state.num_input_tokens_seen = 0
    trainer._generate_and_score_completions([copy.deepcopy(row) for row in rows for _ in range(2)])
    metrics = {
        name: values
        for name, values in trainer._metrics["train"].items()
        if name.startswith(("tools/", "rewards/", "completions/")) or name in ("reward", "num_tokens")
    }
    logs = {name: list(trainer._logs[name]) for name in ("prompt", "completion")}
    return {"generated": trainer.generated, "rewards": trainer.seen, "metrics": metrics, "logs": logs}


def compare(theirs, ours, rows):
    """Play the rows with both trainers, compare all they show, and return what it was."""
    expected, found = play(theirs, rows), play(ours, rows)
    for name in expected:
        assert found[name] == expected[name], name
    return found


@pytest.fixture
def compare_on(make):
    """Compare a trainer of TRL's and one of ours on rows, which are played as often as `times` says."""

    def compare_on(rows, *args, times=1, **kwargs):
        theirs, ours = (make(trainer_class, *args, **kwargs) for trainer_class in (ScriptedGRPO, ScriptedSeeUPO))
        return [compare(theirs, ours, rows) for _ in range(times)][-1]

    return compare_on


def row(name, **columns):
    return {"prompt": [{"role": "user", "content": f"Task {name}."}], **columns}


SCRIPTS = {
    "Task one.": [f"{call('increment', step=2)}{END}", f"Hm. {call('read')}{END}", f"It is 2.{END}"],
    "Task several.": [f"{call('read')}\n{call('increment', step=1)}\n{call('read')}{END}", f"Done.{END}"],
    "Task none.": [f"No.{END}"],
    "Task mistakes.": [
        f"{call('fail', reason='x')}{END}",
        f"{call('increment', stride=2)}{END}",
        f"{call('decrement', step=2)}{END}",
        f"{call('increment', step='many')}\n{call('increment', step=3)}{END}",
        f"{call('reset')}\n{call('get_reward')}{END}",
        f"Sorry.{END}",
    ],
    "Task malformed.": [f"{call('increment', step=1)}{END}", "<tool_call>\n{increment\n</tool_call>" + END],
    "Task library.": [
        f"{call('borrow', title='a')}\n{call('count')}\n{call('search', words='b')}\n{call('lend')}{END}",
        f"{call('borrow', title='b 1')}\n{call('search', words='c', limit=1)}{END}",
        f"{call('count')}{END}",
        f"Thanks.{END}",
    ],
}
COUNTING = [row(name, start=start) for start, name in enumerate(("one", "several", "none", "mistakes", "malformed"))]


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3", "qwen3_instruct_2507"])
def test_functions_as_tools(compare_on, template):
    seen = compare_on(COUNTING, Counter, SCRIPTS, template, times=2)
    assert seen["metrics"]["tools/call_frequency"] == [pytest.approx(13 / 5)]
    assert seen["metrics"]["tools/failure_frequency"] == [pytest.approx(6 / 13)]
    assert seen["metrics"]["rewards/Counter/mean"] == [pytest.approx((2 + 2 + 2 + 5 + 5) / 5)]


def test_coroutines_as_tools(compare_on):
    seen = compare_on([row("library", shelf="s1"), row("none", shelf="s2")], Library, SCRIPTS, times=2)
    results = [m for m in seen["generated"][0]["completions"][0] if m["role"] == "tool"]
    # what functions return comes first
    assert [(m["name"], m["content"]) for m in results[:4]] == [
        ("count", "0"),
        ("lend", "{'error': 'Tool lend not found.'}"),
        ("borrow", "{'error': 'search first'}"),
        ("search", ["b 0", "b 1"]),
    ]


def test_environments_of_several_kinds(compare_on):
    rows = [
        row("one", environment="counter", start=3, shelf="s"),
        row("library", environment="library", start=4, shelf="s"),
        row("none", environment="silent", start=5, shelf="s"),
        row("several", environment="counter", start=6, shelf="s"),
    ]
    seen = compare_on(rows, {"counter": Counter, "library": Library, "silent": Silent}, SCRIPTS, times=2)
    assert {"rewards/Counter/mean", "rewards/watching/mean"} <= seen["metrics"].keys()


def test_further_tools(compare_on):
    def look() -> str:
        """Looks."""
        return "a wall"

    async def listen() -> str:
        """Listens."""
        return "a noise"

    def increment(step: int) -> str:
        """
        Has the name of a method.

        Args:
            step: Anything.
        """
        return "not called"

    script = {"Task": [f"{call('listen')}{call('look')}{call('increment', step=1)}{END}", f"So.{END}"]}
    compare_on([row("one")], Counter, script, tools=[look, listen, increment])


PROMPTS = {
    "parts": [{"role": "user", "content": [{"type": "text", "text": "Task a."}]}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Task a."}],
    "turns": [
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes?"},
        {"role": "user", "content": ""},
    ],
}


@pytest.mark.parametrize("template, prompt", [("qwen2_5", "system"), *(("qwen3", name) for name in PROMPTS)])
def test_prompts_of_any_form(compare_on, template, prompt):
    compare_on([{"prompt": PROMPTS[prompt]}], Counter, {"": SCRIPTS["Task one."]}, template)


def test_rows_without_a_prompt(compare_on):
    rows = [{"environment": name, "start": 1} for name in ("counter", "silent")]
    script = {"Start": SCRIPTS["Task one."], "Say": SCRIPTS["Task none."]}
    seen = compare_on(rows, {"counter": Counter, "silent": Silent}, script)
    assert "Say something." in str(seen["rewards"][0][0][2])
    assert "prompt" not in seen["rewards"][0][3][0]["row"]


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_the_limit_of_iterations(compare_on, iterations):
    seen = compare_on(COUNTING, Counter, SCRIPTS, max_tool_calling_iterations=iterations)
    assistant = [sum(m["role"] == "assistant" for m in c) for c in seen["generated"][0]["completions"]]
    assert max(assistant) == iterations + 1


def test_the_limit_of_tokens(make):
    """Wherever the budget ends: in a response, in a call, in a result, or just behind one."""
    theirs, ours = (make(trainer_class, Counter, SCRIPTS) for trainer_class in (ScriptedGRPO, ScriptedSeeUPO))
    rows = [row("one", start=1)]
    theirs.script = ours.script = {"Task one.": [f"{call('read')}{END}", f"So.{END}"]}
    whole = len(compare(theirs, ours, rows)["generated"][0]["completion_ids"][0])
    reasons = set()
    for limit in range(1, whole + 2):
        theirs.max_completion_length = ours.max_completion_length = limit
        compare(theirs, ours, rows)
        reasons |= {trajectory.stop_reason.value for trajectory in ours._trajectories}
    assert reasons == {"completed", "response_truncated"}


# ---- what TRL's own loop does not do: time limits, quarantine, as many generations on each process ----


class Unreliable(Counter):
    """Fails as its row says: in how many resets, or where."""

    made = 0

    def __init__(self):
        type(self).made += 1
        self.value = 0
        self.free = threading.Event()

    def reset(self, fault=None, **row):
        if fault == "reset" or (fault == "first reset" and type(self).made <= 2):
            raise ConnectionError("no server")
        if fault == "reset hangs":
            self.free.wait(60)
        self.fault = fault
        return super().reset(**row)

    def increment(self, step: int) -> int:
        """
        Adds to the counter.

        Args:
            step: What to add.
        """
        if self.fault == "tool hangs":
            self.free.wait(60)
        return super().increment(step)

    async def wait(self) -> None:
        """Waits for ever."""
        await asyncio.sleep(60)

    def get_reward(self) -> float:
        if self.fault == "reward":
            raise ConnectionError("no judge")
        return super().get_reward()


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
    assert [trajectory.stop_reason for trajectory in trainer._trajectories] == ["completed"] * 2 + [reason] * 2
    assert trainer._rewards_per_func.isnan().tolist() == [[False] * 2] * 2 + [[True] * 2] * 2
    # a reward function may look at every environment, and at every last message
    assert [type(environment).__name__ for environment in trainer.environments] == ["Fresh"] * 4
    assert all(completion[-1]["role"] == "assistant" for completion in trainer.seen[0][1])


def test_a_coroutine_that_hangs_times_out(play_unreliable):
    with pytest.raises(RuntimeError, match="All 2 environments of the batch failed. The first error: TimeoutError"):
        play_unreliable(None, response=call("wait"))


def test_a_reset_that_failed_is_tried_with_another_instance(play_unreliable):
    trainer = play_unreliable("first reset", env_reset_retries=2)
    assert [trajectory.stop_reason for trajectory in trainer._trajectories] == ["completed"] * 2
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


@pytest.mark.parametrize("factory", [Database, lambda: Database()], ids=["class", "function"])
def test_an_environment_lives_in_one_thread(make, factory):
    script = {"Task": [f"{call('write', text='a')}{END}", f"{call('write', text='b')}{END}", f"So.{END}"]}
    trainer = make(ScriptedSeeUPO, factory, script)
    for _ in range(2):
        seen = play(trainer, [row("a")] * 4)
        assert seen["metrics"]["tools/failure_frequency"] == [0.0]
        assert seen["metrics"]["rewards/Database/mean"] == [2.0]


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


def test_an_unknown_kind_of_environment_is_an_error(make):
    trainer = make(ScriptedSeeUPO, {"counter": Counter}, SCRIPTS)
    with pytest.raises(ValueError, match="`environment='count'`, which is not among .*: 'counter'"):
        play(trainer, [row("one", environment="count")])


def test_a_dict_takes_no_environments_of_messages(make):
    class Talk(MultiTurnEnvironment):
        pass

    with pytest.raises(ValueError, match=r"environment_factory\['talk'\].*makes a MultiTurnEnvironment"):
        make(ScriptedSeeUPO, {"counter": Counter, "talk": Talk}, SCRIPTS)


# ---- with a model ----


@pytest.fixture
def settings(tool_dir, tmp_path):  # noqa: F811
    """A policy that calls tools at random, greedily or from a seed."""

    def settings(**overrides):
        values = {
            "output_dir": str(tmp_path),
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "save_strategy": "no",
            "max_steps": 1,
            "logging_steps": 1,
            "per_device_train_batch_size": 8,
            "num_generations": 2,
            "max_completion_length": 60,
            "max_tool_calling_iterations": 20,
            "shuffle_dataset": False,
            "generation_kwargs": only(CALL, WRONG_NAME, "w1"),
            **overrides,
        }
        rows = {"prompt": [[{"role": "user", "content": f"w{i}"}] for i in range(8)], "start": list(range(8))}
        return values, {"model": tool_dir, "train_dataset": Dataset.from_dict(rows), "environment_factory": Counter}

    return settings


@pytest.mark.parametrize("generation", [{"do_sample": True}, {"do_sample": False}], ids=["sampled", "greedy"])
def test_generated_episodes_are_those_of_trl(settings, generation):
    values, arguments = settings()
    values["generation_kwargs"] |= generation
    found = []
    for trainer_class, config_class in ((GRPOTrainer, GRPOConfig), (SeeUPOTrainer, SeeUPOConfig)):
        trainer = trainer_class(args=config_class(**values), **arguments)
        trainer.model.train()
        rows = [copy.deepcopy(trainer.train_dataset[i // 2]) for i in range(8)]
        torch.manual_seed(5)
        batch = trainer._generate_and_score_completions(rows)
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask")
        state = [environment.value for environment in trainer.environments]
        found.append([*(batch[name].tolist() for name in names), state, list(trainer._logs["completion"])])
    assert found[0] == found[1]
    assert len(set(map(str, found[0][-1]))) > 2 or generation == {"do_sample": False}


def test_it_trains_and_evaluates(settings):
    values, arguments = settings(learning_rate=1e-2)
    trainer = SeeUPOTrainer(args=SeeUPOConfig(**values), eval_dataset=arguments["train_dataset"], **arguments)
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    trainer.train()
    assert not all(map(torch.equal, before, trainer.model.parameters()))
    logs = trainer.state.log_history[0]
    assert logs["rewards/Counter/mean"] == pytest.approx(logs["reward"])
    assert logs["turns/max"] > 1
    assert logs["tools/call_frequency"] > 0
    assert trainer.evaluate()["eval_tools/call_frequency"] > 0


@pytest.mark.skipif(trl.__version__.startswith("1.15"), reason="GRPOTrainer of trl 1.15 needs a GPU to train")
def test_the_same_rollouts_serve_a_stock_trainer(settings):
    """For a baseline: environments of tools in a `rollout_func`, without TRL's loop."""
    values, arguments = settings()
    factory = partial(ToolEnvironment, arguments.pop("environment_factory"))
    rollout = MultiTurnRollout(factory, tasks=arguments["train_dataset"])
    args = GRPOConfig(**values)
    trainer = GRPOTrainer(args=args, reward_funcs=environment_reward, rollout_func=rollout, **arguments)
    trainer.train()
    assert trainer.state.log_history[0]["completions/max_length"] > 0


# ---- several processes ----

TWO_PROCESSES = """
import json, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).with_name("trainer"))]
import torch
from test_trl_environments import *

FAULTS = {"ragged": [[None, None], [None, None]], "one fails": [["reset", "reward"], [None, None]]}
LENGTHS = [[0, 0], [3, 1]]

class Lockstep(ScriptedSeeUPO):
    def _generate_single_turn(self, prompt_ids, *args):
        self.calls.append(len(prompt_ids))
        torch.distributed.barrier()  # stands for the collectives of ZeRO-3: hangs unless all processes come
        return super()._generate_single_turn(prompt_ids, *args)

    def respond(self, context):
        text = self.processing_class.decode(context)
        if "Play" not in text:
            return END  # a throw-away row
        left = int(text.split("Play ")[1].split(".")[0]) - text.count("<|im_start|>assistant") + 1
        return (call("increment", step=1) if left > 0 else "So.") + END

tokenizer = byte_tokenizer("qwen2_5")
trainer = Lockstep(
    model=tiny_model(tokenizer),
    args=SeeUPOConfig(output_dir=sys.argv[2], report_to=[], use_cpu=True, bf16=False, num_generations=2, max_steps=1,
                      max_completion_length=500, per_device_train_batch_size=2, env_reset_retries=0,
                      learning_rate=1e-2, save_strategy="no"),
    train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": f"Play {i}."}] for i in (0, 3)]}),
    processing_class=tokenizer, environment_factory=Unreliable,
)
rank, found = trainer.accelerator.process_index, {}
assert trainer.accelerator.num_processes == 2
trainer.model.train()
for name, faults in FAULTS.items():
    trainer.generated, trainer.calls = [], []
    trainer._metrics["train"].clear()
    rows = [{"prompt": [{"role": "user", "content": f"Play {length}."}], "fault": fault}
            for length, fault in zip(LENGTHS[rank], faults[rank])]
    trainer._generate_and_score_completions(rows)
    found[name] = {
        "turns": [len(t.turns) for t in trainer._trajectories], "calls": list(trainer.calls),
        "stop": [t.stop_reason.value for t in trainer._trajectories],
        "value": [environment.value for environment in trainer.environments],
        "frequency": list(trainer._metrics["train"]["tools/call_frequency"]),
        "reward": list(trainer._metrics["train"]["rewards/Unreliable/mean"]),
    }
trainer.train()
found["parameters"] = sum(parameter.double().abs().sum().item() for parameter in trainer.model.parameters())
Path(sys.argv[2], f"rank{rank}.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What each of two processes found."""
    return run_on_two_processes(TWO_PROCESSES, tmp_path_factory.mktemp("two_processes"))


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
