"""Turns end where the user says: at stop strings and stop tokens, and at what ends a message in the chat template."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from byte_tokenizer import byte_tokenizer, forced_end
from scripted_trainer import play
from talk import row, user
from transformers import LogitsProcessor

from seeupo_trl import SeeUPOConfig
from seeupo_trl.rollout import cached_generation
from seeupo_trl.rollout.settings import RolloutSettings
from seeupo_trl.rollout.turn_ends import TurnEnds


SEARCH = "Hm. <search>sky</search>"


class Spelled(LogitsProcessor):
    """Has a model write a text, from the beginning of its response on, and then anything but an end."""

    def __init__(self, token_ids, prompt_length, eos):
        self.token_ids, self.prompt_length, self.eos = token_ids, prompt_length, eos

    def __call__(self, input_ids, scores):
        position = input_ids.shape[1] - self.prompt_length
        if position >= len(self.token_ids):
            scores[:, self.eos] = -torch.inf
            return scores
        only = torch.full_like(scores, -torch.inf)
        only[:, self.token_ids[position]] = 0
        return only


def spell(trainer, *texts):
    """Have the trainer's model write a text in each call, on the transformers backend itself."""
    tokenizer, model, turns = trainer.processing_class, trainer.model, itertools.cycle(texts)
    generate = model.generate

    def spelled(input_ids, **inputs):
        token_ids = tokenizer(next(turns))["input_ids"]
        processor = Spelled(token_ids, input_ids.shape[1], tokenizer.eos_token_id)
        return generate(input_ids=input_ids, logits_processor=[processor], **inputs)

    model.generate = spelled


def texts_of(trajectory, tokenizer):
    return [tokenizer.decode(turn.action_ids) for turn in trajectory.turns]


@pytest.mark.parametrize("cached", [True, False], ids=["kept keys and values", "TRL's own call"])
@pytest.mark.parametrize("way", ["option", "config", "generation_kwargs"])
def test_a_turn_ends_at_a_stop_string(make_trainer, monkeypatch, way, cached):
    monkeypatch.setattr(cached_generation.CachedGeneration, "supports", staticmethod(lambda trainer: cached))
    rows = [row([user("blue")]), row([user("blue")], number=2)]
    old_way = {"generation_kwargs": {"stop_strings": ["</search>"]}} if way == "generation_kwargs" else {}
    trainer = make_trainer(rows, max_completion_length=60, **old_way)
    if way == "config":
        trainer.args.stop_strings, trainer.args.stop_token_ids = ["</search>"], None
    spell(trainer, SEARCH, "It is blue.<|im_end|>")
    output = play(trainer, rows, **({"stop_strings": ["</search>"]} if way == "option" else {}))

    assert output["stop_reason"] == ["completed"] * 2
    for trajectory in output["trajectories"]:
        assert texts_of(trajectory, trainer.processing_class) == [SEARCH, "It is blue.<|im_end|>"]
        assert [message["content"] for message in trajectory.info["read"]] == [SEARCH, "It is blue."]
        # the environment's reply begins with the end of the message that the policy did not write
        before, after = (trainer.processing_class.decode(turn.context_ids) for turn in trajectory.turns)
        assert after == f"{before}{SEARCH}<|im_end|>\n<|im_start|>user\nblue<|im_end|>\n<|im_start|>assistant\n"


def test_the_backend_stops_there_and_its_settings_are_left_alone(make_trainer):
    rows = [row([user("blue")])]
    trainer = make_trainer(rows, max_completion_length=200)
    spell(trainer, SEARCH, "Blue.<|im_end|>")
    generate, lengths = trainer.model.generate, []

    def watched(**inputs):
        output = generate(**inputs)
        lengths.append(output.shape[1] - inputs["input_ids"].shape[1])
        return output

    trainer.model.generate = watched
    settings = trainer.generation_config, trainer.generation_kwargs, trainer.eos_token_ids
    play(trainer, rows, stop_strings=["</search>"])
    assert lengths == [len(SEARCH), len("Blue.") + 1]
    assert settings == (trainer.generation_config, trainer.generation_kwargs, trainer.eos_token_ids)
    assert trainer.model.generate is watched


def test_a_turn_ends_at_a_stop_token(make_trainer):
    rows = [row([user("Go on.")])]
    trainer = make_trainer(rows, max_completion_length=60)
    spell(trainer, "Call <tool_call>", "Done.<|im_end|>")
    stop = trainer.processing_class.convert_tokens_to_ids("<tool_call>")
    output = play(trainer, rows, stop_token_ids=[stop])
    assert output["stop_reason"] == ["completed"]
    (trajectory,) = output["trajectories"]
    assert trajectory.turns[0].action_ids[-1] == stop
    assert "<tool_call><|im_end|>\n<|im_start|>user" in trainer.processing_class.decode(
        trajectory.turns[1].context_ids
    )


def test_what_a_backend_writes_after_the_end_is_dropped(make_trainer):
    """As with continuous batching, which cannot stop at strings, and with several tokens a step."""
    rows = [row([user("blue")])]
    trainer = make_trainer(rows, script=[f"{SEARCH} and <search>more</search> an", "Blue.<|im_end|>"])
    trainer.use_vllm, trainer.vllm_generation = True, SimpleNamespace(generation_kwargs={"seed": 1})
    output = play(trainer, rows, stop_strings=["</search>"], max_context_length=1000)
    (trajectory,) = output["trajectories"]
    first = trajectory.turns[0]
    assert trainer.processing_class.decode(first.action_ids) == SEARCH
    assert len(first.sampling_logps) == len(first.action_ids)
    assert trainer.vllm_generation.generation_kwargs == {"seed": 1}


def test_vllm_is_asked_to_stop(make_trainer):
    rows = [row()]
    trainer = make_trainer(rows, script=["unused"], generation_kwargs={"stop": "</a>", "stop_token_ids": [4]})
    vllm = SimpleNamespace(generation_kwargs={"stop": "</a>", "stop_token_ids": [4], "seed": 1})
    trainer.use_vllm, trainer.vllm_generation = True, vllm
    settings = RolloutSettings(stop_strings=["</search>"], stop_token_ids=[5])
    ends = TurnEnds.of(settings, trainer, trainer.processing_class, [6])
    with ends.applied_to(trainer):  # what a server is sent, and what a colocated engine samples with
        assert vllm.generation_kwargs == {"stop": ["</search>", "</a>"], "stop_token_ids": [6, 5, 4], "seed": 1}


def test_the_first_end_counts():
    tokenizer = byte_tokenizer("qwen2_5")
    ends = TurnEnds(tokenizer, [tokenizer.eos_token_id], strings=["</b>", "\n\n", "é!"])
    for text, kept in {
        "a</b>c\n\n": "a</b>",
        "a\n\n</b>": "a\n\n",
        "caf\u00e9! no": "caf\u00e9!",
        "nothing</c>": "nothing</c>",
        "": "",
    }.items():
        token_ids = tokenizer(text)["input_ids"]
        length = ends.length_of(token_ids)
        assert tokenizer.decode(token_ids[:length]) == kept
        assert ends.are_in(token_ids[:length]) == (kept not in ("", "nothing</c>"))


def test_a_string_that_begins_in_the_prompt_is_none_of_the_response():
    tokenizer = byte_tokenizer("qwen2_5")
    ends = TurnEnds(tokenizer, [tokenizer.eos_token_id], strings=["\n\n"])
    rows = torch.tensor([tokenizer("ab\n\n")["input_ids"]])
    assert ends._just_ended(rows, prompt_length=3).tolist() == [False]
    assert ends._just_ended(rows, prompt_length=2).tolist() == [True]


def test_a_message_ends_with_its_stop_string():
    """The token that completes the string may hold more characters."""
    tokenizer = byte_tokenizer("qwen2_5")
    ends = TurnEnds(tokenizer, [tokenizer.eos_token_id], strings=["</search>"])
    assert ends.trimmed({"role": "assistant", "content": "a</search>\n\n"})["content"] == "a</search>"
    reasoning = {"reasoning_content": "b</search>\n", "thinking": "b</search>\n"}
    assert set(ends.trimmed(reasoning).values()) == {"b</search>"}
    assert ends.trimmed({"role": "assistant", "content": None}) == {"role": "assistant", "content": None}


@pytest.mark.parametrize(
    "options",
    [{"stop_strings": "</a>"}, {"stop_strings": [""]}, {"stop_token_ids": ["</a>"]}, {"stop_token_ids": [True]}],
)
def test_ends_that_are_none_are_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} is .*; give a list of"):
        SeeUPOConfig("x", use_cpu=True, bf16=False, **options)


def test_a_token_that_there_is_not_is_refused(make_trainer):
    rows = [row()]
    trainer = make_trainer(rows, script=["unused"])
    with pytest.raises(ValueError, match="stop_token_ids has 100000, but the tokenizer has"):
        play(trainer, rows, stop_token_ids=[100_000])


# --- the end of a message in the chat template -----------------------------------------------------------------------


def test_the_end_of_a_message_is_that_of_the_template(make_trainer):
    """A base model with a chat template: its end-of-sequence token is not what ends a message."""
    tokenizer = byte_tokenizer("qwen2_5")
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<|im_start|>"]})
    rows = [row([user("Go on.")])]
    trainer = make_trainer(rows, tokenizer=tokenizer, max_completion_length=20)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end not in trainer.eos_token_ids
    spell(trainer, "Yes.<|im_end|>")
    output = play(trainer, rows)
    assert output["stop_reason"] == ["completed"]
    (trajectory,) = output["trajectories"]
    assert [message["content"] for message in trajectory.info["read"]] == ["Yes.", "Yes."]
    assert all(turn.action_ids[-1] == end for turn in trajectory.turns)
    assert tokenizer.decode(trajectory.turns[1].context_ids).count("<|im_end|>\n<|im_start|>user\nGo on.") == 1


def test_a_template_without_an_end_is_named(make_trainer, caplog):
    tokenizer = byte_tokenizer("qwen2_5")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    rows = [row([user("Go on.")])]
    trainer = make_trainer(rows, tokenizer=tokenizer, generation_kwargs=forced_end())
    assert play(trainer, rows)["stop_reason"] == ["completed"]
    assert "ends messages with no special token" in caplog.text and "'<|im_end|>'" in caplog.text
