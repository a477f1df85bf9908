"""The tables of completions survive whatever stands in a conversation."""

import json

import pandas as pd
import pytest
from datasets import Dataset
from tiny import ON_CPU, load_tiny_model, save_tiny_model, tiny_tokenizer
from trl.trainer.utils import print_prompt_completions_sample

from seeupo_trl import SeeUPOConfig, SeeUPOTrainer
from seeupo_trl.evaluation.logs import as_logged


def call(arguments, name="look"):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    "calls",
    [
        [call([1])],
        [call("[1]")],
        [call("no json")],
        [call(None)],
        [call(3)],
        [call({"x": 10**5000})],
        [call("9" * 5000)],
        [call({"x": "\ud83d"})],
        [call({"x": {"y": [None]}}, name=None)],
        [call({}, name=["a"])],
        [{"type": "function"}],
        [{"type": "function", "function": "look"}],
        [{"name": "look", "arguments": {"x": 1}}],
        ["look"],
        [None],
        "look",
        {},
        [],
        None,
    ],
    ids=range(19),
)
def test_any_tool_call_can_be_printed(calls):
    conversation = [{"role": "assistant", "content": None, "tool_calls": calls}]
    logged = as_logged(conversation)
    print_prompt_completions_sample([logged], [logged], {"r": [1.0]}, [0.0], 1)
    json.dumps(logged).encode()
    for made in logged[0].get("tool_calls", []):
        function = made.get("function", made)
        assert isinstance(json.loads(function.get("arguments", "{}")), dict)


def test_arguments_of_the_usual_kind_are_json_text():
    (message,) = as_logged([{"role": "assistant", "content": "", "tool_calls": [call({"x": 1})]}])
    assert message["tool_calls"] == [call('{"x": 1}')]
    (message,) = as_logged([{"role": "assistant", "content": "", "tool_calls": [call('{"x":  1}')]}])
    assert message["tool_calls"] == [call('{"x":  1}')]


def test_messages_of_any_kind_fit_in_one_table(tmp_path):
    """Parquet wants one type a column, and cannot hold an empty dict."""
    messages = [
        {"role": "user", "content": "Hi."},
        {"role": "user", "content": [{"type": "text", "text": "Go "}, {"type": "input_text", "text": "on."}]},
        {"role": "tool", "content": [1, 2], "name": 7},
        {"role": "tool", "content": None, "name": "look", "meta": {}},
        {"role": "tool", "content": "", "meta": {"x": 1}},
        {"role": "tool", "content": "", "meta": "x", "reasoning_content": ["x"]},
        {"role": "tool", "content": "", "meta": object()},
        {"role": "assistant", "content": "", "tool_calls": [call({}, name=["a"]), {**call({}), "id": 1}]},
        {"role": "assistant", "content": "", "tool_calls": [{}, {**call({}), "id": "1"}, "look"]},
    ]
    logged = [as_logged([message]) for message in messages]
    pd.DataFrame({"completion": [*logged, as_logged(messages)]}).to_parquet(tmp_path / "table")
    print_prompt_completions_sample(logged, logged, {"r": [1.0] * len(logged)}, [0.0] * len(logged), 1)
    assert [message["content"] for (message,) in logged[:4]] == ["Hi.", "Go on.", "[1, 2]", None]
    assert [as_logged(message) for message in logged] == logged


def test_images_stay_for_trl_to_draw():
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    assert as_logged([{"role": "user", "content": content}]) == [{"role": "user", "content": content}]


def test_conversations_without_calls_and_plain_text_stay_as_they_are():
    conversation = [{"role": "user", "content": "Hi."}]
    assert as_logged(conversation) == conversation and as_logged("Hi.") == "Hi."


def test_what_arrow_fills_in_reaches_no_template_and_no_log(tmp_path, capsys):
    """In a column of messages, all have the keys that one of them has."""
    asks = [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": None, "tool_calls": [call({"x": 1})]},
        {"role": "tool", "name": "look", "content": "w2"},
    ]
    other = [{"role": "assistant", "content": "w3", "tool_calls": [call({"y": 2})]}, {"role": "user", "content": "w4"}]
    dataset = Dataset.from_list([{"prompt": asks}, {"prompt": other}])
    assert dataset[0]["prompt"][0]["tool_calls"] is None
    path, seen = save_tiny_model(tmp_path / "model"), []

    def reward(prompts, completions, **kwargs):
        seen.extend(prompts)
        return [float(i) for i in range(len(completions))]

    trainer = SeeUPOTrainer(
        model=load_tiny_model(path),
        reward_funcs=reward,
        args=SeeUPOConfig(
            str(tmp_path / "run"),
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=4,
            max_steps=1,
            log_completions=True,
            **ON_CPU,
        ),
        train_dataset=dataset,
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    assert "None" not in capsys.readouterr().out
    assert sorted(seen, key=len)[0] == other and sorted(seen, key=len)[-1] == asks
