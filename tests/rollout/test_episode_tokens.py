"""The tokens of an episode: contexts grow by what was generated and rendered, with the templates that TRL ships."""

import json

import pytest
from byte_tokenizer import TEMPLATES, forced_end
from scripted_trainer import play
from talk import TOOLS, result, row, user

from seeupo_trl.rollout.chat_format import ChatFormat


pytestmark = pytest.mark.usefixtures("both_schedules")


def turns_in(mask):
    """Number of maximal runs of ones."""
    return sum(1 for i, bit in enumerate(mask) if bit and (i == 0 or not mask[i - 1]))


@pytest.mark.parametrize("template", TEMPLATES)
def test_each_context_begins_with_the_context_and_action_before_it(make_trainer, template):
    rows = [row([user("Go on.")], [result("a"), result("b")], [result("c"), user("And now?")])]
    trainer = make_trainer(rows, template, generation_kwargs=forced_end())
    output = play(trainer, rows)

    (trajectory,) = output["trajectories"]
    assert len(trajectory.turns) == 4
    for turn, following in zip(trajectory.turns, trajectory.turns[1:], strict=False):
        assert following.context_ids[: len(turn.context_ids + turn.action_ids)] == turn.context_ids + turn.action_ids
    whole = trajectory.turns[-1].context_ids + trajectory.turns[-1].action_ids
    assert output["prompt_ids"][0] + output["completion_ids"][0] == whole
    actions = [token for turn in trajectory.turns for token in turn.action_ids]
    masked = [t for t, m in zip(output["completion_ids"][0], output["env_mask"][0], strict=True) if m]
    assert masked == actions and turns_in(output["env_mask"][0]) == 4


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("with_tools", [True, False])
def test_tokens_are_those_of_the_rendered_conversation(make_trainer, template, with_tools):
    """A policy that writes canonical tokens gives exactly what the (training) template renders for the messages."""
    thought = "<think>\n\n</think>\n\n" if template == "qwen3" else ""
    call = '<tool_call>\n{"name": "look", "arguments": {"thing": "sky"}}\n</tool_call>'
    script = [f"{thought}Hello.<|im_end|>", f"{thought}{call}\n{call}<|im_end|>", f"{thought}Blue.<|im_end|>", "Yes."]
    rows = [row([user("Look up.")], [result("a sky"), result("a bird")], [user("Colour?")], tools=json.dumps(TOOLS))]
    if not with_tools:
        rows[0]["tools"] = None
        script[1] = f"{thought}Up.<|im_end|>"
    trainer = make_trainer(rows, template, script=script, max_completion_length=200)
    output = play(trainer, rows)

    (trajectory,) = output["trajectories"]
    conversation = [user("Begin."), *trajectory.messages]
    chat = ChatFormat(trainer)
    for k, turn in enumerate(trajectory.turns):
        before = [i for i, message in enumerate(conversation) if message["role"] == "assistant"][k]
        rendered = trainer.processing_class.apply_chat_template(
            conversation[:before],
            tools=TOOLS if with_tools else None,
            chat_template=chat.chat_template,
            add_generation_prompt=True,
            return_dict=False,
        )
        assert trainer.processing_class.decode(turn.context_ids) == trainer.processing_class.decode(rendered)
        assert turn.context_ids == rendered


def test_the_qwen3_template_keeps_its_generation_prompt_without_thinking(make_trainer):
    rows = [row([user("Go on.")])]
    trainer = make_trainer(
        rows, "qwen3", script=["One.<|im_end|>", "Two.<|im_end|>"], chat_template_kwargs={"enable_thinking": False}
    )
    (trajectory,) = play(trainer, rows)["trajectories"]
    text = trainer.processing_class.decode(trajectory.turns[1].context_ids)
    assert text == (
        "<|im_start|>user\nBegin.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nOne.<|im_end|>\n"
        "<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def test_generated_tokens_are_never_tokenised_again(make_trainer):
    """The bytes of a special token's text, generated one by one, stay these bytes in the next context."""
    rows = [row([user("Go on.")])]
    trainer = make_trainer(rows, script=["unused"])
    spelled = [trainer.processing_class.convert_tokens_to_ids(character) for character in "<think>"]
    end = trainer.processing_class.eos_token_id
    trainer._generate_single_turn = lambda prompts, *args: ([spelled + [end] for _ in prompts], None)
    (trajectory,) = play(trainer, rows)["trajectories"]
    assert trajectory.turns[0].action_ids == spelled + [end]
    start = len(trajectory.turns[0].context_ids)
    assert trajectory.turns[1].context_ids[start : start + len(spelled) + 1] == spelled + [end]


def test_sampling_log_probabilities_are_aligned(make_trainer):
    rows = [row([user("Go on.")], [user("And on.")])]
    trainer = make_trainer(rows, script=["A.<|im_end|>", "BCD.<|im_end|>", "E.<|im_end|>"])
    trainer.use_vllm = True
    output = play(trainer, rows)
    (logps,) = output["logprobs"]
    assert len(logps) == len(output["completion_ids"][0])
    for value, bit in zip(logps, output["env_mask"][0], strict=True):
        assert (value == 0.0) == (bit == 0)
    trajectory = output["trajectories"][0]
    assert trajectory.turns[1].sampling_logps == [-0.5 - i for i in range(5)]


def test_the_completion_ends_with_the_last_action(make_trainer):
    rows = [row([user("Go on.")], [user("Never answered.")])]
    trainer = make_trainer(rows, script=["A.<|im_end|>", "B.<|im_end|>"])
    output = play(trainer, rows, max_turns=2)
    assert output["env_mask"][0][-1] == 1
    assert "Never answered." not in trainer.processing_class.decode(output["completion_ids"][0])
    assert output["trajectories"][0].messages[-1] == user("Never answered.")
