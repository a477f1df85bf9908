"""TRL environments: the rollout plays them as TRL's own tool loop does, and what it adds does not change a token."""

import copy
import json
import sqlite3
import threading
import time
from functools import partial

import pytest
from datasets import Dataset
from test_rollout import byte_tokenizer, tiny_model
from trl import GRPOConfig, GRPOTrainer

from seeupo_trl import SeeUPOConfig, SeeUPOTrainer


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
        self.generated.append({"prompts": copy.deepcopy(prompts), **dict(zip(names, copy.deepcopy(output), strict=False))})
        return output


class ScriptedGRPO(Scripted, GRPOTrainer):
    pass


class ScriptedSeeUPO(Scripted, SeeUPOTrainer):
    pass


@pytest.fixture
def run(tmp_path):
    """Train a scripted trainer for a step, and return all that its user can see of the episodes."""

    def run(trainer_class, factory, script, rows, template="qwen2_5", tools=None, rewards=None, steps=1, **config):
        seen = []

        def watching(prompts, completions, completion_ids, environments=None, **columns):
            columns = {name: columns[name] for name in rows[0] if name != "prompt"} if rows else {}
            state = [vars(environment) for environment in environments or []]
            state = [{name: repr(value) for name, value in s.items() if name != "connection"} for s in state]
            seen.append(copy.deepcopy([prompts, completions, completion_ids, state, columns]))
            return [float(len(str(completion))) for completion in completions]

        tokenizer = byte_tokenizer(template)
        settings = {"max_completion_length": 2000, "num_generations": 2, "per_device_train_batch_size": len(rows) * 2}
        settings |= {"max_tool_calling_iterations": 20, "learning_rate": 0.0, "shuffle_dataset": False}
        config_class = GRPOConfig if trainer_class is ScriptedGRPO else SeeUPOConfig
        trainer = trainer_class(
            model=tiny_model(tokenizer),
            args=config_class(
                output_dir=str(tmp_path),
                report_to=[],
                use_cpu=True,
                bf16=False,
                logging_steps=1,
                save_strategy="no",
                max_steps=steps,
                **{**settings, **config},
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            reward_funcs=watching,
            tools=tools,
            environment_factory=factory,
        )
        trainer.script, trainer.generated = script, []
        trainer.train()
        metrics = [
            {name: value for name, value in entry.items() if name.startswith(("tools/", "reward", "completions/", "num_"))}
            for entry in trainer.state.log_history
        ]
        for entry in metrics:  # normalised differently
            for name in ("reward_std", "frac_reward_zero_std"):
                entry.pop(name, None)
        logs = {name: list(trainer._logs[name]) for name in ("prompt", "completion")}
        return trainer, {"generated": trainer.generated, "rewards": seen, "metrics": metrics, "logs": logs}

    return run


@pytest.fixture
def run_both(run):
    """Run both trainers, compare all they show, and return what it was."""

    def run_both(*args, **kwargs):
        _, theirs = run(ScriptedGRPO, *args, **kwargs)
        _, ours = run(ScriptedSeeUPO, *args, **kwargs)
        assert ours["generated"] == theirs["generated"]
        assert ours["rewards"] == theirs["rewards"]
        for our_metrics, their_metrics in zip(ours["metrics"], theirs["metrics"], strict=True):
            assert {k: (v, their_metrics.get(k)) for k, v in our_metrics.items() if v != their_metrics.get(k)} == {}
            assert our_metrics.keys() == their_metrics.keys()
        assert ours["logs"] == theirs["logs"]
        return ours

    return run_both


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
def test_functions_as_tools(run_both, template):
    seen = run_both(Counter, SCRIPTS, COUNTING, template, steps=2)
    assert seen["metrics"][0]["tools/call_frequency"] == pytest.approx(13 / 5)
    assert seen["metrics"][0]["tools/failure_frequency"] == pytest.approx(6 / 13)
    assert [m["rewards/Counter/mean"] for m in seen["metrics"][:2]] == [pytest.approx((2 + 2 + 2 + 5 + 5) / 5)] * 2


def test_coroutines_as_tools(run_both):
    seen = run_both(Library, SCRIPTS, [row("library", shelf="s1"), row("none", shelf="s2")], steps=2)
    results = [m for m in seen["generated"][0]["completions"][0] if m["role"] == "tool"]
    # what functions return comes first
    assert [(m["name"], m["content"]) for m in results[:4]] == [
        ("count", "0"),
        ("lend", "{'error': 'Tool lend not found.'}"),
        ("borrow", "{'error': 'search first'}"),
        ("search", ["b 0", "b 1"]),
    ]


def test_environments_of_several_kinds(run_both):
    rows = [
        row("one", environment="counter", start=3, shelf="s"),
        row("library", environment="library", start=4, shelf="s"),
        row("none", environment="silent", start=5, shelf="s"),
        row("several", environment="counter", start=6, shelf="s"),
    ]
    seen = run_both({"counter": Counter, "library": Library, "silent": Silent}, SCRIPTS, rows, steps=2)
    assert {name for m in seen["metrics"] for name in m} >= {"rewards/Counter/mean", "rewards/watching/mean"}


def test_further_tools(run_both):
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
    run_both(Counter, script, [row("one")], tools=[look, listen, increment])


def test_a_prompt_of_parts_and_of_several_messages(run_both):
    prompts = [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Task a."}]}],
        [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": ""}],
    ]
    for prompt in prompts:
        run_both(Counter, {"": SCRIPTS["Task one."]}, [{"prompt": prompt}])


def test_rows_without_a_prompt(run_both):
    rows = [{"environment": name, "start": 1} for name in ("counter", "silent")]
    seen = run_both({"counter": Counter, "silent": Silent}, {"Start": SCRIPTS["Task one."]}, rows)
    assert "prompt" not in seen["rewards"][0][3][0]["row"]


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_the_limit_of_iterations(run_both, iterations):
    seen = run_both(Counter, SCRIPTS, COUNTING, max_tool_calling_iterations=iterations)
    assistant = [sum(m["role"] == "assistant" for m in c) for c in seen["generated"][0]["completions"]]
    assert max(assistant) == iterations + 1


def test_the_limit_of_tokens(run_both):
    """At whatever token the budget ends: in a response, in a call, in a result, or just behind one."""
    rows = [row("one", start=1)]
    whole = len(run_both(Counter, SCRIPTS, rows)["generated"][0]["completion_ids"][0])
    for limit in range(1, whole + 2):
        run_both(Counter, SCRIPTS, rows, max_completion_length=limit)
