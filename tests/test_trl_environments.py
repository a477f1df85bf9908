"""TRL environments: the rollout plays them as TRL's own tool loop does, and what it adds does not change a token."""

import copy
import json
import sqlite3

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
    whole = len(compare(theirs, ours, rows)["generated"][0]["completion_ids"][0])
    reasons = set()
    for limit in range(1, whole + 2):
        theirs.max_completion_length = ours.max_completion_length = limit
        compare(theirs, ours, rows)
        reasons |= {trajectory.stop_reason.value for trajectory in ours._trajectories}
    assert reasons == {"completed", "response_truncated"}
