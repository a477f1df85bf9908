"""What the policy is shown of earlier turns, with Qwen3's own chat template, and that exactly that is trained on."""

import copy
import json
from pathlib import Path

import pytest
import trl
from byte_tokenizer import byte_tokenizer, forced_end, tiny_model
from datasets import Dataset
from talk import TOOLS, Talk, result, row, user
from tiny import ON_CPU

from seeupo_trl import MultiTurnRollout, SeeUPOConfig, SeeUPOTrainer
from seeupo_trl.scoring.turn_buffer import TurnBuffer


pytestmark = pytest.mark.usefixtures("both_schedules")


CALL = '<tool_call>\n{"name": "look", "arguments": {"thing": "a"}}\n</tool_call>'
SILENT = {"enable_thinking": False}


def thought(text, content):
    """A response as Qwen3 writes it."""
    return f"<think>\n{text}\n</think>\n\n{content}<|im_end|>"


def play(make_trainer, replies, script, history, template="qwen3", chat_template_kwargs=None, **options):
    """One episode with scripted responses, and the trainer it was played with."""
    rows = [row(*replies, tools=json.dumps(TOOLS))]
    config = {} if chat_template_kwargs is None else {"chat_template_kwargs": chat_template_kwargs}
    trainer = make_trainer(rows, template, script=script, max_completion_length=200, **config)
    trainer.rollout_inputs = rows
    (trajectory,) = MultiTurnRollout(Talk, history=history, **options)([None], trainer)["trajectories"]
    return trajectory, trainer


def rendered(trainer, trajectory, number, kwargs=None, template="qwen3"):
    """What the tokenizer's own template makes of the conversation before turn `number`."""
    opening = [{"role": "user", "content": "Begin."}]
    positions = [i for i, message in enumerate(trajectory.messages) if message["role"] == "assistant"]
    messages = opening + trajectory.messages[: positions[number]]
    template = (Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja").read_text()
    return trainer.processing_class.apply_chat_template(
        messages, tools=TOOLS, chat_template=template, add_generation_prompt=True, return_dict=False, **(kwargs or {})
    )


CONVERSATIONS = {
    "user turns": (
        [[user("More.")], [user("And?")]],
        [thought("one", "A."), thought("two", "B."), thought("3", "C.")],
    ),
    "tool steps keep their reasoning": (
        [[result("x")], [result("y"), result("z")], [user("Next.")], [result("w")]],
        [
            thought("first", CALL),
            thought("second", f"Both.\n{CALL}\n{CALL}"),
            thought("third", "Done."),
            thought("fourth", CALL),
            thought("fifth", "End."),
        ],
    ),
    "a message beside a tool result": (
        [[result("x"), user("Hurry.")], [user("So?")]],
        [thought("first", CALL), thought("second", "Yes."), thought("third", "No.")],
    ),
    "responses without reasoning": (
        [[result("x")], [user("Next.")], [user("And?")]],
        [f"{CALL}<|im_end|>", "Plain.<|im_end|>", thought("now", "B."), "C.<|im_end|>"],
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_stripped_contexts_are_those_of_qwen3s_template(make_trainer, name):
    replies, script = CONVERSATIONS[name]
    trajectory, trainer = play(make_trainer, replies, script, "strip_reasoning")
    assert len(trajectory.turns) == len(script)
    for number, turn in enumerate(trajectory.turns):
        assert turn.context_ids == rendered(trainer, trajectory, number), number


def test_stripped_contexts_without_thinking_are_those_of_qwen3s_template(make_trainer):
    replies = [[result("x")], [user("Next.")], [user("And?")]]
    script = [f"{CALL}<|im_end|>", "Plain.<|im_end|>", "B.<|im_end|>", "C.<|im_end|>"]
    trajectory, trainer = play(make_trainer, replies, script, "strip_reasoning", chat_template_kwargs=SILENT)
    for number, turn in enumerate(trajectory.turns):
        assert turn.context_ids == rendered(trainer, trajectory, number, SILENT), number


def test_what_is_kept_of_an_earlier_turn_keeps_its_tokens(make_trainer):
    odd_json = '<tool_call>\n{"name":  "look","arguments":{"thing":"a"}}\n</tool_call>'
    script = [thought("musing", f"So:  {odd_json}"), thought("pondering", "A."), thought("", "B.")]
    trajectory, trainer = play(make_trainer, [[result("x")], [user("Next.")]], script, "strip_reasoning")
    text = trainer.processing_class.decode(trajectory.turns[2].context_ids)
    assert f"So:  {odd_json}<|im_end|>" in text and "musing" not in text and "pondering" not in text


def test_reasoning_that_never_ends_is_kept(make_trainer):
    script = ["<think>\nand on and on<|im_end|>", thought("x", "B.")]
    trajectory, trainer = play(make_trainer, [[user("Next.")]], script, "strip_reasoning")
    assert "and on and on" in trainer.processing_class.decode(trajectory.turns[1].context_ids)


@pytest.mark.parametrize("template", ["qwen3_5_think", "qwen3_8", "nemotron_3_nano"])
def test_a_header_that_opens_the_reasoning_is_stripped_with_it(make_trainer, template):
    """The generation prompt of these ends with `<think>`, so that the action begins inside the reasoning."""
    replies, script = (
        [[user("More.")], [user("And?")]],
        ["one\n</think>\n\nA.", "two\n</think>\n\nB.", "3\n</think>\n\nC."],
    )
    trajectory, trainer = play(
        make_trainer, replies, [text + "<|im_end|>" for text in script], "strip_reasoning", template
    )
    tokenizer = trainer.processing_class
    texts = [tokenizer.decode(turn.context_ids) for turn in trajectory.turns]
    assert all(text.endswith("assistant\n<think>\n") for text in texts)
    assert [text.count("one") + text.count("two") for text in texts] == [texts[0].count("one")] * 3
    assert texts[2].count("A.<|im_end|>") == texts[2].count("B.<|im_end|>") == 1
    if template == "qwen3_5_think":  # the others keep reasoning, or leave a mark where it was
        assert trajectory.turns[2].context_ids == rendered(trainer, trajectory, 2, template=template)


def test_append_keeps_all_reasoning(make_trainer):
    replies, script = CONVERSATIONS["user turns"]
    trajectory, trainer = play(make_trainer, replies, script, "append")
    text = trainer.processing_class.decode(trajectory.turns[-1].context_ids)
    assert "one" in text and "two" in text
    assert all(later.extends(earlier) for earlier, later in zip(trajectory.turns, trajectory.turns[1:], strict=False))


def test_a_function_decides_what_is_shown(make_trainer):
    seen = []

    def last_exchange(messages):
        seen.append(copy.deepcopy(messages))
        messages[0]["content"] = "Begin again."
        return messages[:1] + messages[-1:] if len(messages) > 1 else messages

    replies, script = [[user("More.")], [user("And?")]], ["A.<|im_end|>", "B.<|im_end|>", "C.<|im_end|>"]
    trajectory, trainer = play(make_trainer, replies, script, last_exchange)
    texts = [trainer.processing_class.decode(turn.context_ids) for turn in trajectory.turns]
    assert "Begin again." in texts[0] and "A." not in texts[1]
    assert "More." in texts[1] and "More." not in texts[2] and "And?" in texts[2]
    assert [len(messages) for messages in seen] == [1, 3, 5] and seen[2][0]["content"] == "Begin."
    assert [m["content"] for m in trajectory.messages][1::2] == ["More.", "And?"], "the episode keeps everything"


def test_a_function_that_changes_nothing_appends_tokens(make_trainer):
    odd = "A.<think>x</think>  spaced<|im_end|>"
    trajectory, _ = play(make_trainer, [[user("More.")]], [odd, "B.<|im_end|>"], lambda messages: messages)
    assert trajectory.turns[1].extends(trajectory.turns[0])


@pytest.mark.parametrize("returned", [None, [], ["text"]])
def test_a_function_that_returns_no_messages_is_an_error(make_trainer, returned):
    with pytest.raises(RuntimeError, match="^history must return the list of messages to show"):
        play(make_trainer, [[user("More.")]], ["A.<|im_end|>"] * 2, lambda messages: returned)


def test_unknown_histories_are_refused(make_trainer):
    with pytest.raises(ValueError, match="history is 'forget'; it must be one of 'append', 'strip_reasoning'"):
        MultiTurnRollout(Talk, history="forget")
    with pytest.raises(ValueError, match="history"):
        SeeUPOConfig("x", use_cpu=True, bf16=False, history="forget")
    with pytest.raises(ValueError, match="has no such reasoning"):
        play(make_trainer, [[user("More.")]], ["A.<|im_end|>"], "strip_reasoning", template="qwen2_5")


def test_a_stock_trainer_cannot_train_on_rewritten_contexts(make_trainer):
    rows = [row()]
    trainer = make_trainer(rows, "qwen3", script=["A.<|im_end|>"])
    with pytest.raises(ValueError, match="GRPO|ScriptedTrainer trains on an episode as one sequence"):
        MultiTurnRollout(Talk, tasks=rows, history="strip_reasoning")([rows[0]["prompt"]], trainer)


class Thinker(SeeUPOTrainer):
    """A policy that answers with scripted reasoning, and records what it is shown and what is trained on."""

    def _generate_single_turn(self, prompt_ids, *args):
        self.shown = [*getattr(self, "shown", []), *map(tuple, prompt_ids)]
        first = getattr(self, "answering", 0)
        texts = [thought(f"{len(ids) % 7}", "Yes." if i % 2 else "No.") for i, ids in enumerate(prompt_ids, first)]
        return [self.processing_class(text)["input_ids"] for text in texts], None


@pytest.mark.parametrize("history", ["append", "strip_reasoning", lambda messages: messages[-3:]])
def test_the_tokens_that_are_trained_on_are_those_of_generation(tmp_path, history, monkeypatch):
    tokenizer = byte_tokenizer("qwen3")

    class Grade(Talk):
        def step(self, message):
            answer = super().step(message)
            answer.reward = float(message["content"] == "Yes.")
            return answer

    rows = [row([user("More.")], [result("x")], [user("And?")], number=i) for i in range(2)]
    trainer = Thinker(
        model=tiny_model(tokenizer),
        args=SeeUPOConfig(
            str(tmp_path),
            max_steps=1,
            num_generations=4,
            per_device_train_batch_size=4,
            max_completion_length=100,
            packing="tree",
            generation_kwargs=forced_end(tokenizer),
            **ON_CPU,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        rollout_func=MultiTurnRollout(Grade, history=history),
    )
    scored, sequence = set(), TurnBuffer.sequence
    monkeypatch.setattr(
        TurnBuffer, "sequence", lambda *args: [scored.add(tuple(sequence(*args).tolist())), sequence(*args)][1]
    )
    trainer.train()
    turns = [turn for trajectory in trainer._batch.trajectories for turn in trajectory.turns]
    assert len(turns) == 16 and sorted(trainer.shown) == sorted(tuple(turn.context_ids) for turn in turns)
    assert scored == {tuple(turn.context_ids + turn.action_ids) for turn in turns}
    assert trainer.state.log_history[0]["turn_updates"] == 4
