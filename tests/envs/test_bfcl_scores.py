"""BFCL: the ground truth scores 100 %, anything less fails, as the official implementation has it."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from byte_tokenizer import byte_tokenizer, tiny_model
from tiny import ON_CPU


pytest.importorskip("bfcl_eval", reason="BFCL's package is optional")

from bfcl_play import calling, ids, play

from seeupo_trl.envs.bfcl import BfclEnvironment, ground_truth_messages, load_bfcl
from seeupo_trl.envs.bfcl.data import CATEGORIES, load_entries
from seeupo_trl.envs.bfcl.services import Services


# --- scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("category", CATEGORIES)
def test_the_ground_truth_solves_every_task(category):
    environment = BfclEnvironment()
    results = [play(environment, task_id) for task_id in ids(category)]
    assert len(results) == 200
    assert sum(steps[-1].info["success"] for steps in results) == 200
    assert sum(sum(step.reward for step in steps) for steps in results) == 200.0
    assert all(all(steps[-1].info["turns_passed"]) for steps in results)


@pytest.mark.parametrize("category", CATEGORIES)
def test_without_the_last_call_no_task_is_solved(category):
    environment = BfclEnvironment()
    for task_id in ids(category):
        truth = load_entries(category)[task_id]["ground_truth"]
        last = max(turn for turn, calls in enumerate(truth) if calls)
        steps = play(environment, task_id, lambda turn, calls, last=last: calls[:-1] if turn == last else calls)
        assert not steps[-1].info["success"] and sum(step.reward for step in steps) == 0.0


@pytest.mark.parametrize("category", CATEGORIES)
def test_empty_answers_solve_no_task(category):
    environment = BfclEnvironment()
    for task_id in ids(category):
        steps = play(environment, task_id, lambda turn, calls: [])
        assert not steps[-1].info["success"] and sum(step.reward for step in steps) == 0.0
        assert "Model response list is empty" in steps[-1].info["failure"]


def test_many_threads_at_once_give_the_same_scores():
    tasks = ids() * 3
    with ThreadPoolExecutor(64) as threads:
        results = list(threads.map(lambda task_id: play(BfclEnvironment(), task_id)[-1], tasks))
    assert sum(result.info["success"] for result in results) == len(tasks) == 600


def test_a_wrong_episode_leaves_nothing_behind():
    environment = BfclEnvironment()
    for task_id in ids()[:50]:
        assert not play(environment, task_id, lambda turn, calls: calls[:1])[-1].info["turns_passed"] == []
        assert play(environment, task_id)[-1].info["success"]


def test_a_long_context_episode_leaves_the_package_as_it_was():
    """The scenarios hand dicts of the package's modules to the services."""
    task_id = next(
        i for i in ids("multi_turn_long_context") if "TravelAPI" in str(load_entries("multi_turn_long_context")[i])
    )
    outputs = [
        [message["content"] for step in play(BfclEnvironment(), task_id) for message in step.messages]
        for _ in range(3)
    ]
    assert outputs[0] == outputs[1] == outputs[2]


def test_extra_calls_that_change_nothing_are_allowed():
    environment = BfclEnvironment()
    pwd = calling(("pwd", {}))["tool_calls"]
    assert play(environment, "multi_turn_base_0", lambda turn, calls: pwd + calls)[-1].info["success"]


# --- against the official implementation ----------------------------------------------------------------------------


@pytest.mark.parametrize("category", CATEGORIES)
def test_outputs_equal_the_official_executors(category):
    """Ground truth of all tasks, both ways. The official executor runs in a process of its own: it evaluates code."""
    code = f"""
import json
from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_utils import execute_multi_turn_func_call as execute
from seeupo_trl.envs.bfcl.data import load_entries
outputs = {{}}
for task_id, entry in load_entries({category!r}).items():
    outputs[task_id] = [
        execute(calls, entry["initial_config"], entry["involved_classes"], "m", task_id, "long" in task_id)[0]
        for calls in entry["ground_truth"]
    ]
print(json.dumps(outputs))
"""
    official = json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)
    # It hands the dicts of its own modules to long-context trips, so that a task changes the ones after it.
    shared = {
        task_id
        for task_id in official
        if "long_context" in category and "Travel" in str(load_entries(category)[task_id]["involved_classes"])
    }
    compared = 0
    for task_id, turns in official.items():
        entry = load_entries(category)[task_id]
        services = Services(entry)
        ours = [[services.call(*services.parse_call(call)) for call in calls] for calls in entry["ground_truth"]]
        if task_id not in shared:
            assert ours == turns, task_id
            compared += sum(map(len, turns))
    assert compared > 800


def test_nothing_is_stored_in_the_official_executor_or_on_disk():
    code = """
import sys, pathlib
from seeupo_trl.envs.bfcl import ground_truth_messages, load_bfcl
from bfcl_eval.eval_checker.multi_turn_eval import multi_turn_utils
before = set(vars(multi_turn_utils))
site = pathlib.Path(multi_turn_utils.__file__).parents[3]
files = set(site.iterdir())
for task_id in load_bfcl(split="all")["id"]:
    ground_truth_messages(task_id)
assert set(vars(multi_turn_utils)) == before
assert set(site.iterdir()) == files
assert "bfcl_eval.constants.eval_config" not in sys.modules, "importing it creates directories"
assert "bfcl_eval.eval_checker.eval_runner" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# --- as a rollout ---------------------------------------------------------------------------------------------------


def test_a_perfect_policy_is_rewarded_through_the_rollout(tmp_path):
    """Tool calls written as text by a scripted policy, parsed, run, checked: all of the pipeline but the sampling."""
    from trl import GRPOConfig, GRPOTrainer

    from seeupo_trl.rollout import MultiTurnRollout, environment_reward

    factory = partial(BfclEnvironment, tools="brief", tool_list="needed")
    tokenizer = byte_tokenizer("qwen2_5")
    scripts = {}
    for task_id in ids()[:20:4]:
        messages = ground_truth_messages(task_id, factory())
        spoken = [
            "\n".join(f"<tool_call>\n{json.dumps(call['function'])}\n</tool_call>" for call in message["tool_calls"])
            if message.get("tool_calls")
            else message["content"]
            for message in messages
            if message["role"] == "assistant"
        ]
        scripts[messages[0]["content"]] = spoken

    class Perfect(GRPOTrainer):
        def _generate_single_turn(self, prompt_ids, *args):
            responses = []
            for context in prompt_ids:
                text = tokenizer.decode(context)
                script = next(script for opening, script in scripts.items() if f"user\n{opening}<" in text)
                responses.append(script[text.count("<|im_start|>assistant") - 1] + "<|im_end|>")
            return [tokenizer(text)["input_ids"] for text in responses], None

    dataset = load_bfcl(split="all").select(range(0, 20, 4))
    trainer = Perfect(
        model=tiny_model(tokenizer, positions=100_000),
        args=GRPOConfig(
            output_dir=str(tmp_path),
            num_generations=2,
            per_device_train_batch_size=2,
            max_completion_length=2000,
            **ON_CPU,
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
        reward_funcs=environment_reward,
    )
    output = MultiTurnRollout(factory, tasks=dataset, max_turns=30)(list(dataset["prompt"]), trainer)
    assert output["environment_reward"] == [1.0] * 5 and output["stop_reason"] == ["completed"] * 5
    assert all(trajectory.info["success"] for trajectory in output["trajectories"])
