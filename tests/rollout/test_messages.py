"""The messages that environments read, and templates that can or cannot be continued."""

import json

import pytest
from byte_tokenizer import byte_tokenizer, forced_end
from scripted_trainer import play
from talk import TOOLS, row, user


pytestmark = pytest.mark.usefixtures("both_schedules")


def test_environments_read_parsed_tool_calls(make_trainer):
    rows = [row(tools=json.dumps(TOOLS))]
    script = ['Let me see.\n<tool_call>\n{"name": "look", "arguments": {"thing": "sky"}}\n</tool_call><|im_end|>']
    trainer = make_trainer(rows, script=script, max_completion_length=200)
    (trajectory,) = play(trainer, rows)["trajectories"]
    (message,) = trajectory.info["read"]
    assert message["content"] == "Let me see."
    assert message["tool_calls"] == [{"type": "function", "function": {"name": "look", "arguments": {"thing": "sky"}}}]
    assert "parse_error" not in message


def test_environments_read_reasoning_apart_from_content(make_trainer):
    rows = [row()]
    trainer = make_trainer(rows, "qwen3", script=["<think>\nHm.\n</think>\n\nYes.<|im_end|>"])
    (message,) = play(trainer, rows)["trajectories"][0].info["read"]
    assert message["reasoning_content"] == "Hm." and message["content"] == "Yes."


def nested_call(depth, text="", beside=""):
    """A call whose argument is a text in that many lists, each with something beside the next one."""
    thing = f"[{beside}" * depth + f'"{text}"' + "]" * depth
    return f'<tool_call>\n{{"name": "look", "arguments": {{"thing": {thing}}}}}\n</tool_call><|im_end|>'


def test_arguments_may_be_nested_as_deeply_as_any_official_executor_takes(make_trainer):
    rows = [row()]
    trainer = make_trainer(rows, script=[nested_call(250, text="\\ud83d")], positions=300_000)
    (message,) = play(trainer, rows)["trajectories"][0].info["read"]
    thing = message["tool_calls"][0]["function"]["arguments"]["thing"]
    for _ in range(250):
        (thing,) = thing
    assert thing == "?"


@pytest.mark.parametrize(
    "prose", ["[0, 1) ", "\\left[0, 1\\right) ", "if (x) {\n  y = z[\n"], ids=["intervals", "LaTeX", "code"]
)
def test_a_call_is_read_after_any_number_of_open_brackets(make_trainer, prose):
    rows = [row()]
    trainer = make_trainer(rows, script=[prose * 300 + nested_call(2)], positions=300_000)
    (message,) = play(trainer, rows)["trajectories"][0].info["read"]
    assert message["content"] == (prose * 300).strip()
    assert message["tool_calls"][0]["function"]["arguments"] == {"thing": [[""]]}


@pytest.mark.parametrize(
    "response",
    [
        '<tool_call>\n{"name": "look", "argum</tool_call><|im_end|>',
        '<tool_call>\n{"nam": "look", "arguments": {}}\n</tool_call><|im_end|>',
        "<tool_call>\n[1, 2]\n</tool_call><|im_end|>",
        "<tool_call>\n" + "[" * 100_000 + "\n</tool_call><|im_end|>",
        nested_call(500),
        nested_call(500, text="\\ud83d"),
        '"' + nested_call(500, beside='"]", '),
    ],
    ids=["not json", "no name", "no object", "bottomless", "deep", "deep, to be mended", "deep, hidden in strings"],
)
def test_malformed_tool_calls_reach_the_environment_as_text(make_trainer, response):
    rows = [row([user("That was malformed.")])]
    trainer = make_trainer(rows, script=[response, "Sorry.<|im_end|>"], positions=300_000)
    trajectory = play(trainer, rows)["trajectories"][0]
    broken, good = trajectory.info["read"]
    assert broken["parse_error"] is True and "tool_calls" not in broken
    assert broken["content"] == response.removesuffix("<|im_end|>")
    assert good == {"role": "assistant", "content": "Sorry."}
    assert trajectory.stop_reason == "completed"


def test_another_end_token_is_no_part_of_the_message(make_trainer):
    """Qwen models stop at `<|endoftext|>`, too; the parsers know the tokenizer's own end only."""
    rows = [row([user("Go on.")])]
    trainer = make_trainer(rows, script=["Yes.<|endoftext|>", "<|endoftext|>"])
    trainer.eos_token_ids = [trainer.processing_class.eos_token_id, trainer.processing_class.pad_token_id]
    (trajectory,) = play(trainer, rows)["trajectories"]
    assert [message["content"] for message in trajectory.info["read"]] == ["Yes.", ""]
    assert trajectory.turns[1].action_ids == [trainer.processing_class.pad_token_id]


def test_a_template_trl_cannot_parse_gives_plain_text(make_trainer, caplog):
    tokenizer = byte_tokenizer("qwen2_5")
    tokenizer.chat_template += "{# changed #}"
    rows = [row(tools=json.dumps(TOOLS))]
    call = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'
    trainer = make_trainer(rows, tokenizer=tokenizer, script=[f"{call}<|im_end|>"], max_completion_length=200)
    (message,) = play(trainer, rows)["trajectories"][0].info["read"]
    assert message == {"role": "assistant", "content": call}
    assert "plain text and no tool calls" in caplog.text


def test_the_trainers_tokenizer_is_left_alone(make_trainer):
    rows = [row([user("Go on.")])]
    trainer = make_trainer(rows, "qwen3", generation_kwargs=forced_end())
    before = (trainer.processing_class.chat_template, getattr(trainer.processing_class, "response_template", None))
    play(trainer, rows)
    assert before == (
        trainer.processing_class.chat_template,
        getattr(trainer.processing_class, "response_template", None),
    )
    assert before[1] is None


def test_a_template_that_rewrites_history_is_refused(make_trainer):
    tokenizer = byte_tokenizer("qwen2_5")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role if loop.last else '' }}{{ m.content }}<|im_end|>{% endfor %}"
    )
    rows = [row([user("Go on.")])]
    trainer = make_trainer(rows, tokenizer=tokenizer, generation_kwargs=forced_end())
    with pytest.raises(ValueError, match="renders earlier messages differently"):
        play(trainer, rows)


def test_a_token_that_ends_one_message_and_begins_the_next_is_not_doubled(make_trainer):
    """GLM-4 stops at `<|user|>`, which is how the next message begins."""
    tokenizer = byte_tokenizer("glm4moe")
    tokenizer.add_tokens(["<|user|>", "<|assistant|>"], special_tokens=True)
    tokenizer.eos_token = "<|user|>"
    rows = [row([user("Go on.")])]
    trainer = make_trainer(rows, tokenizer=tokenizer, script=["unused"], positions=8192)
    answer = tokenizer("Yes.<|user|>")["input_ids"]
    trainer._generate_single_turn = lambda prompts, *args: ([answer for _ in prompts], None)
    (trajectory,) = play(trainer, rows)["trajectories"]
    assert tokenizer.decode(trajectory.turns[1].context_ids).endswith("Yes.<|user|>\nGo on.<|assistant|>")


@pytest.mark.parametrize("template", ["phi3", "gemma3", "llama3_1", "lfm2", "deepseekv3", "qwen3_5_think"])
def test_templates_of_other_families_can_be_continued(make_trainer, template):
    tokenizer = byte_tokenizer(template)
    ends = {
        "phi3": "<|end|>",
        "gemma3": "<end_of_turn>",
        "llama3_1": "<|eot_id|>",
        "deepseekv3": "<｜end▁of▁sentence｜>",
    }
    end = ends.get(template, "<|im_end|>")
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.add_tokens([end], special_tokens=True)
    tokenizer.eos_token = end
    rows = [row([user("Go on.")])]
    trainer = make_trainer(rows, tokenizer=tokenizer, script=["unused"])
    answer = tokenizer("Yes." + end, add_special_tokens=False)["input_ids"]
    trainer._generate_single_turn = lambda prompts, *args: ([answer for _ in prompts], None)
    output = play(trainer, rows)
    assert output["stop_reason"] == ["completed"]
    text = tokenizer.decode(output["trajectories"][0].turns[1].context_ids)
    opening = tokenizer.decode(output["prompt_ids"][0])
    assert text.startswith(opening + "Yes." + end)
    assert end + end not in text and text.count("Go on.") == text.count("Begin.") == 1 and "dummy" not in text
