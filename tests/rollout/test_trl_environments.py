"""TRL environments: the rollout plays them as TRL's own tool loop does, and what it adds does not change a token."""

import copy
from functools import partial

import pytest
import torch
import trl
from datasets import Dataset
from scripted_tools import COUNTING, END, SCRIPTS, ScriptedGRPO, ScriptedSeeUPO, call, make_tool_trainer, play, row
from tiny import ON_CPU
from tool_calls import CALL, WRONG_NAME, only
from tool_environments import Counter, Library, Silent
from trl import GRPOConfig, GRPOTrainer

from seeupo_trl import MultiTurnRollout, SeeUPOConfig, SeeUPOTrainer, environment_reward
from seeupo_trl.envs.tools import ToolEnvironment


@pytest.fixture
def make(tmp_path):
    return partial(make_tool_trainer, tmp_path)


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


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3", "qwen3_instruct_2507"])
def test_functions_as_tools(compare_on, template):
    seen = compare_on(COUNTING, Counter, SCRIPTS, template, times=2)
    assert seen["metrics"]["tools/call_frequency"] == [pytest.approx(13 / 5)]
    assert seen["metrics"]["tools/failure_frequency"] == [pytest.approx(6 / 13)]
    assert seen["metrics"]["rewards/Counter/mean"] == [pytest.approx((2 + 2 + 2 + 5 + 5) / 5)]


def test_columns_named_like_parameters_of_ours(compare_on):
    seen = compare_on([row("one", get_reward=1, environment_class=2)], Counter, SCRIPTS)
    assert seen["metrics"]["rewards/Counter/mean"] == [2]


def test_coroutines_as_tools(compare_on):
    seen = compare_on([row("library", shelf="s1"), row("none", shelf="s2")], Library, SCRIPTS, times=2)
    results = [m for m in seen["generated"][0]["completions"][0] if m["role"] == "tool"]
    # what functions return comes first
    assert [(m["name"], m["content"]) for m in results[:4]] == [
        ("count", "0"),
        ("lend", "{'error': 'Tool lend not found.'}"),
        ("borrow", "{'error': 'search first'}"),
        ("search", "b 0\nb 1"),
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


# not text in parts, which Qwen3's template renders as nothing in TRL, and here as the text it is (test_chat_format.py)
PROMPTS = {
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Task a."}],
    "turns": [
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes?"},
        {"role": "user", "content": ""},
    ],
    # templates print nothing of the former, and of the latter nothing or the number
    "a role of its own": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Task a."}],
    "a number": [{"role": "user", "content": 5}, {"role": "user", "content": "Task a."}],
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
        reasons |= {trajectory.stop_reason.value for trajectory in ours._batch.trajectories}
    assert reasons == {"completed", "response_truncated"}


# ---- with a model ----


@pytest.fixture
def settings(tool_dir, tmp_path):
    """A policy that calls tools at random, greedily or from a seed."""

    def settings(**overrides):
        values = {
            **ON_CPU,
            "output_dir": str(tmp_path),
            "max_steps": 1,
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
    # TRL draws the tokens of all rows from one stream of random numbers, which rows in lock step do as well; else each
    # response has a seed of its own
    config = partial(SeeUPOConfig, lock_step_rollouts=generation["do_sample"])
    found = []
    for trainer_class, config_class in ((GRPOTrainer, GRPOConfig), (SeeUPOTrainer, config)):
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


@pytest.mark.parametrize("column", ["stop_reason", "environment_reward"])
def test_a_column_that_reports_of_episodes_would_replace_is_refused(settings, column):
    values, arguments = settings()
    columns = {"prompt": ["w1"] * 8, column: [1.0] * 8}
    with pytest.raises(ValueError, match=f"has a column `{column}`.*Rename the column"):
        SeeUPOTrainer(args=SeeUPOConfig(**values), eval_dataset={"further": Dataset.from_dict(columns)}, **arguments)


def test_an_evaluation_takes_a_list_of_rows(settings):
    values, arguments = settings()
    rows = arguments["train_dataset"].to_list()
    trainer = SeeUPOTrainer(args=SeeUPOConfig(**values), eval_dataset=rows, **arguments)
    assert trainer.evaluate()["eval_episodes/tasks"] == len(rows)


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
