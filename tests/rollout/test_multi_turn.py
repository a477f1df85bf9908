"""Rollouts: what the policy sees and what is recorded, however an episode goes, with the shipped templates."""

import gc
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import trl
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from seeupo_trl.envs import MultiTurnEnvironment, Observation, StepResult, StopReason
from seeupo_trl.rollout import MultiTurnRollout, environment_reward
from seeupo_trl.rollout.chat_format import ChatFormat
from seeupo_trl.trajectory import Trajectory


TEMPLATES = ["qwen2_5", "qwen3", "qwen3_instruct_2507"]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Look at a thing.",
            "parameters": {"type": "object", "properties": {"thing": {"type": "string"}}, "required": ["thing"]},
        },
    }
]


def byte_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Every byte is a token, so any text and any token sequence can occur; TRL's own chat template."""
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.add_tokens(["<tool_call>", "</tool_call>", "<think>", "</think>"])
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja").read_text()
    return tokenizer


class Talk(MultiTurnEnvironment):
    """Replies with the scripted batches of messages, one batch a step, and ends the episode after the last one."""

    def __init__(self):
        self.resets = 0
        self.closed = 0
        self.read = []

    def reset(self, replies, tools=None, opening="Begin.", **task):
        self.resets += 1
        self.task = task
        self.read = []
        self.replies = [json.loads(reply) for reply in replies]
        return Observation([{"role": "user", "content": opening}], tools=json.loads(tools) if tools else None)

    def step(self, message):
        self.read.append(message)
        if not self.replies:
            return StepResult([], reward=1.0, terminated=True, info={"read": self.read})
        return StepResult(self.replies.pop(0), reward=0.25, info={"read": self.read})

    def close(self):
        self.closed += 1


def user(content):
    return {"role": "user", "content": content}


def result(content):
    return {"role": "tool", "name": "look", "content": content}


def row(*replies, **columns):
    """A dataset row for [`Talk`]; `prompt` is made unique by its content."""
    return {
        "prompt": [user(json.dumps([replies, columns], default=str))],
        "replies": [json.dumps(reply) for reply in replies],
        **columns,
    }


class ScriptedTrainer(GRPOTrainer):
    """A GRPOTrainer whose policy is a list of responses for each row (the rest of TRL is real)."""

    script: list[list[str]] = []

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        assert num_generations == 1
        self.contexts = [*getattr(self, "contexts", []), prompt_ids]
        responses = []
        for context in prompt_ids:
            responses.append(self.respond(context))
        ids = [self.processing_class(text)["input_ids"] for text in responses]
        return ids, [[-0.5 - i for i in range(len(row))] for row in ids] if self.use_vllm else None

    def respond(self, context):
        """The scripted response that follows the number of assistant turns the context holds."""
        text = self.processing_class.decode(context)
        script = next((script for opening, script in self.script if opening in text), self.script[0][1])
        return script[text.count("<|im_start|>assistant") - 1]


def tiny_model(tokenizer, positions=8192):
    """A random Qwen3 of one layer for the vocabulary of `tokenizer`."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=positions,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )


@pytest.fixture
def make_trainer(tmp_path):
    def make(rows=None, template="qwen2_5", script=None, rollout=None, tokenizer=None, **config):
        rows = rows or [row()]
        tokenizer = tokenizer or byte_tokenizer(template)
        model = tiny_model(tokenizer, positions=config.pop("positions", 8192))
        settings = {"max_completion_length": 6, "num_generations": 2, "per_device_train_batch_size": 2, "max_steps": 2}
        trainer = (ScriptedTrainer if script is not None else GRPOTrainer)(
            model=model,
            args=GRPOConfig(
                output_dir=str(tmp_path),
                report_to=[],
                use_cpu=True,
                bf16=False,
                logging_steps=1,
                save_strategy="no",
                **{**settings, **config},
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            reward_funcs=environment_reward,
            rollout_func=rollout or MultiTurnRollout(Talk, tasks=rows),
        )
        trainer.script = [("", script)] if script and isinstance(script[0], str) else script
        return trainer

    return make


def play(trainer, rows, **options):
    """Roll the rows out and return TRL's dict."""
    rollout = MultiTurnRollout(Talk, tasks=rows, **options)
    return rollout([r["prompt"] for r in rows], trainer)


def forced_end(tokenizer=None):
    """Generation settings under which a random model ends each response at `max_completion_length`."""
    return {"forced_eos_token_id": (tokenizer or byte_tokenizer("qwen2_5")).eos_token_id}


def turns_in(mask):
    """Number of maximal runs of ones."""
    return sum(1 for i, bit in enumerate(mask) if bit and (i == 0 or not mask[i - 1]))


# --- tokens ---------------------------------------------------------------------------------------------------------


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


# --- what environments read -----------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "response",
    [
        '<tool_call>\n{"name": "look", "argum</tool_call><|im_end|>',
        '<tool_call>\n{"nam": "look", "arguments": {}}\n</tool_call><|im_end|>',
        "<tool_call>\n[1, 2]\n</tool_call><|im_end|>",
        "<tool_call>\n" + "[" * 100_000 + "\n</tool_call><|im_end|>",
    ],
    ids=["not json", "no name", "no object", "nested too deeply"],
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


# --- how episodes end -----------------------------------------------------------------------------------------------


def test_an_episode_ends_when_the_environment_ends_it(make_trainer):
    rows = [row([user("Go on.")])]
    trainer = make_trainer(rows, generation_kwargs=forced_end())
    output = play(trainer, rows)
    assert output["stop_reason"] == ["completed"] and output["environment_reward"] == [1.25]
    trajectory = output["trajectories"][0]
    assert isinstance(trajectory, Trajectory)
    assert trajectory.reward == 1.25 and trajectory.stop_reason is StopReason.completed
    assert [m["role"] for m in trajectory.messages] == ["assistant", "user", "assistant"]


def test_episodes_end_after_max_turns(make_trainer):
    rows = [row(*[[user("Go on.")]] * 12)]
    trainer = make_trainer(rows, generation_kwargs=forced_end())
    output = play(trainer, rows, max_turns=3)
    assert output["stop_reason"] == ["max_turns"] and len(output["trajectories"][0].turns) == 3
    assert len(play(trainer, rows)["trajectories"][0].turns) == 10, "the default for a stock GRPOConfig"
    trainer.args.max_turns = None
    assert play(trainer, rows)["stop_reason"] == ["completed"]
    trainer.args.max_turns = 2
    assert len(play(trainer, rows)["trajectories"][0].turns) == 2


def test_the_environment_sees_the_last_message_of_max_turns(make_trainer):
    rows = [row([user("Go on.")])]
    trainer = make_trainer(rows, generation_kwargs=forced_end())
    assert play(trainer, rows, max_turns=2)["stop_reason"] == ["completed"]


def test_a_response_without_end_token_ends_the_episode(make_trainer):
    rows = [row([user("Go on.")])]
    eos = byte_tokenizer("qwen2_5").eos_token_id
    trainer = make_trainer(rows, generation_kwargs={"suppress_tokens": [eos]})
    output = play(trainer, rows)
    assert output["stop_reason"] == ["response_truncated"]
    trajectory = output["trajectories"][0]
    assert len(trajectory.turns) == 1 and len(trajectory.turns[0].action_ids) == 6
    assert trajectory.reward == 0.0 and [m["role"] for m in trajectory.messages] == ["assistant"]


@pytest.mark.parametrize("room", range(1, 7))
def test_a_response_is_cut_at_the_context_limit(make_trainer, room):
    rows = [row()]
    trainer = make_trainer(rows, script=["ABCDE<|im_end|>"])
    trainer.use_vllm = True
    length = len(play(trainer, rows)["prompt_ids"][0])
    output = play(trainer, rows, max_context_length=length + room)
    action = output["trajectories"][0].turns[0]
    assert len(action.action_ids) == len(action.sampling_logps) == room
    assert output["stop_reason"] == ["completed" if room == 6 else "context_overflow"]
    assert output["environment_reward"] == [1.0 if room == 6 else 0.0]


def test_a_context_at_the_limit_ends_the_episode_without_another_turn(make_trainer):
    rows = [row([user("x" * 500)])]
    trainer = make_trainer(rows, generation_kwargs=forced_end())
    output = play(trainer, rows, max_context_length=300)
    assert output["stop_reason"] == ["context_overflow"] and len(output["trajectories"][0].turns) == 1
    assert output["env_mask"] == [[1] * 6]


def test_the_models_positions_limit_the_context(make_trainer):
    rows = [row([user("x" * 500)])]
    trainer = make_trainer(rows, generation_kwargs=forced_end(), positions=256)
    assert play(trainer, rows)["stop_reason"] == ["context_overflow"]
    trainer.args.max_context_length = 2000
    assert play(trainer, rows)["stop_reason"] == ["completed"]


def test_an_opening_over_the_limit_gives_an_episode_without_turns(make_trainer):
    rows = [row(opening="x" * 500), row()]
    trainer = make_trainer(rows, generation_kwargs=forced_end())
    output = play(trainer, rows, max_context_length=300)
    assert output["stop_reason"] == ["context_overflow", "completed"]
    assert output["trajectories"][0].turns == [] and output["trajectories"][0].reward == 0.0
    assert output["completion_ids"][0] == [trainer.processing_class.eos_token_id]
    assert output["env_mask"][0] == [0]
    assert len(output["prompt_ids"][0]) > 500


def test_no_policy_call_is_made_when_no_episode_is_left(make_trainer):
    rows = [row(opening="x" * 500)]
    trainer = make_trainer(rows, script=["never"])
    assert play(trainer, rows, max_context_length=300)["stop_reason"] == ["context_overflow"]
    assert not hasattr(trainer, "contexts")


def test_episodes_of_different_lengths_share_the_batch(make_trainer):
    rows = [row(*[[user("Go on.")]] * n) for n in (0, 3, 1)]
    trainer = make_trainer(rows, script=["Yes.<|im_end|>"] * 4)
    output = play(trainer, rows)
    assert [len(t.turns) for t in output["trajectories"]] == [1, 4, 2]
    assert [len(batch) for batch in trainer.contexts] == [3, 2, 1, 1]
    assert output["stop_reason"] == ["completed"] * 3


# --- faults of environments -----------------------------------------------------------------------------------------


class Fragile(Talk):
    """Raises where the task says."""

    def reset(self, fails_in=None, **task):
        self.fails_in = fails_in
        if fails_in == "reset":
            raise OSError("no server")
        if fails_in == "reset type":
            return "hello"
        return super().reset(**task)

    def step(self, message):
        if self.fails_in == "step":
            raise KeyError("lost")
        if self.fails_in == "silence":
            return StepResult([])
        return super().step(message)


@pytest.mark.parametrize(
    ("fails_in", "text", "turns"),
    [
        ("reset", "OSError: no server", 0),
        ("reset type", "TypeError: reset() must return an Observation", 0),
        ("step", "KeyError: 'lost'", 1),
        ("silence", "ValueError: step() returned no messages", 1),
    ],
)
def test_an_environment_error_costs_its_own_episode_only(make_trainer, caplog, fails_in, text, turns):
    rows = [row(fails_in=fails_in, name="broken one"), row(fails_in=None)]
    trainer = make_trainer(rows, generation_kwargs=forced_end())
    rollout = MultiTurnRollout(Fragile, tasks=rows)
    output = rollout([r["prompt"] for r in rows], trainer)

    assert output["stop_reason"] == ["env_error", "completed"]
    assert output["environment_reward"] == [None, 1.0]
    broken = output["trajectories"][0]
    assert broken.reward is None and text in broken.info["error"] and len(broken.turns) == turns
    assert "broken one" in caplog.text and text in caplog.text
    assert all(
        len(ids) == len(mask) > 0 for ids, mask in zip(output["completion_ids"], output["env_mask"], strict=True)
    )
    assert all(output["prompt_ids"])


def test_when_every_environment_fails_the_first_error_is_raised(make_trainer):
    rows = [row(fails_in="reset", number=i) for i in range(2)]
    trainer = make_trainer(rows, generation_kwargs=forced_end())
    with pytest.raises(RuntimeError, match="All 2 environments of the batch failed.*OSError: no server") as caught:
        MultiTurnRollout(Fragile, tasks=rows)([r["prompt"] for r in rows], trainer)
    assert isinstance(caught.value.__cause__, OSError)


def test_a_wrong_factory_is_refused(make_trainer):
    with pytest.raises(TypeError, match="environment_factory is a Talk"):
        MultiTurnRollout(Talk())
    rows = [row()]
    trainer = make_trainer(rows, generation_kwargs=forced_end())
    with pytest.raises(TypeError, match="returned a dict"):
        MultiTurnRollout(dict, tasks=rows)([rows[0]["prompt"]], trainer)


# --- the pool -------------------------------------------------------------------------------------------------------


def test_environments_are_reused_and_closed(make_trainer):
    made = []

    def factory():
        made.append(Talk())
        return made[-1]

    rows = [row(number=i) for i in range(3)]
    trainer = make_trainer(rows, generation_kwargs=forced_end())
    rollout = MultiTurnRollout(factory, tasks=rows)
    for _ in range(3):
        rollout([r["prompt"] for r in rows], trainer)
    assert len(made) == 3 and [environment.resets for environment in made] == [3, 3, 3]
    rollout.close()
    assert [environment.closed for environment in made] == [1, 1, 1]
    rollout([rows[0]["prompt"]], trainer)
    assert len(made) == 4
    del rollout
    gc.collect()
    assert [environment.closed for environment in made] == [1, 1, 1, 1]


def test_a_failed_environment_is_closed_and_replaced(make_trainer):
    made = []

    def factory():
        made.append(Fragile())
        return made[-1]

    rows = [row(fails_in="step"), row(fails_in=None)]
    trainer = make_trainer(rows, generation_kwargs=forced_end())
    rollout = MultiTurnRollout(factory, tasks=rows)
    for _ in range(2):
        rollout([r["prompt"] for r in rows], trainer)
    assert len(made) == 3 and sum(environment.closed for environment in made) == 2
    assert sorted(environment.resets for environment in made) == [1, 1, 2]


def test_environments_run_at_the_same_time(make_trainer):
    """Each reset waits for all the others, which only works if they overlap."""
    barrier = threading.Barrier(4, timeout=30)

    class Together(Talk):
        def reset(self, **task):
            barrier.wait()
            return super().reset(**task)

    rows = [row(number=i) for i in range(4)]
    trainer = make_trainer(rows, generation_kwargs=forced_end())
    output = MultiTurnRollout(Together, tasks=rows)([r["prompt"] for r in rows], trainer)
    assert output["stop_reason"] == ["completed"] * 4


# --- dataset rows ---------------------------------------------------------------------------------------------------


def test_reset_receives_every_column(make_trainer):
    rows = [row(number=7, label="x")]
    trainer = make_trainer(rows, generation_kwargs=forced_end())
    environments = []

    class Keep(Talk):
        def __init__(self):
            super().__init__()
            environments.append(self)

    MultiTurnRollout(Keep, tasks=Dataset.from_list(rows))([rows[0]["prompt"]], trainer)
    assert environments[0].task == {"prompt": rows[0]["prompt"], "number": 7, "label": "x"}


def test_rows_of_the_trainer_come_before_a_look_up(make_trainer):
    trainer = make_trainer([row()], generation_kwargs=forced_end())
    trainer.rollout_inputs = [row([user("Go on.")])]
    output = MultiTurnRollout(Talk)(["any prompt"], trainer)
    assert len(output["trajectories"][0].turns) == 2


def test_an_environment_cannot_change_the_dataset(make_trainer):
    class Greedy(Talk):
        def reset(self, replies, **task):
            observation = super().reset(replies, **task)
            replies.clear()
            return observation

    rows = [row([user("Go on.")])]
    trainer = make_trainer(rows, generation_kwargs=forced_end())
    MultiTurnRollout(Greedy, tasks=rows)([rows[0]["prompt"]], trainer)
    assert len(rows[0]["replies"]) == 1


def test_a_stock_trainer_needs_tasks(make_trainer):
    trainer = make_trainer([row()], generation_kwargs=forced_end())
    with pytest.raises(ValueError, match="tasks=dataset"):
        MultiTurnRollout(Talk)([row()["prompt"]], trainer)


def test_a_prompt_without_row_is_an_error(make_trainer):
    trainer = make_trainer([row()], generation_kwargs=forced_end())
    with pytest.raises(ValueError, match="No row of `tasks` has this prompt.*unheard"):
        MultiTurnRollout(Talk, tasks=[row()])([[user("unheard")]], trainer)


def test_one_prompt_for_different_rows_is_an_error():
    rows = [{"prompt": [user("Same.")], "answer": answer} for answer in (1, 2)]
    with pytest.raises(ValueError, match="Different rows of `tasks` have the same prompt"):
        MultiTurnRollout(Talk, tasks=rows)
    MultiTurnRollout(Talk, tasks=[rows[0], dict(rows[0])])


@pytest.mark.parametrize("option", ["max_turns", "max_context_length"])
def test_limits_below_one_are_refused(option):
    with pytest.raises(ValueError, match=f"{option} is 0"):
        MultiTurnRollout(Talk, **{option: 0})


# --- with trainers --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(trl.__version__.startswith("1.15"), reason="GRPOTrainer of trl 1.15 needs a GPU to train")
@pytest.mark.parametrize("template", ["qwen2_5", "qwen3"])
def test_it_trains_a_stock_grpo_trainer(make_trainer, template):
    rows = [row([user("Go on.")], number=i) for i in range(4)]

    class Lengthy(Talk):
        def step(self, message):
            result = super().step(message)
            result.reward = float(len(message["content"]))
            return result

    rollout = MultiTurnRollout(Lengthy, tasks=rows)
    trainer = make_trainer(rows, template, rollout=rollout, generation_kwargs=forced_end(), learning_rate=1e-2)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.global_step == 2
    assert "rewards/environment_reward/mean" in trainer.state.log_history[0]
    assert any(not p.equal(before[name]) for name, p in trainer.model.named_parameters())


@pytest.mark.skipif(trl.__version__.startswith("1.15"), reason="GRPOTrainer of trl 1.15 needs a GPU to train")
def test_a_failed_episode_does_not_stop_a_stock_grpo_trainer(make_trainer):
    rows = [row(fails_in=None), row(fails_in="step")]
    rollout = MultiTurnRollout(Fragile, tasks=rows)
    trainer = make_trainer(
        rows, rollout=rollout, generation_kwargs=forced_end(), per_device_train_batch_size=4, steps_per_generation=1
    )
    trainer.train()
    assert trainer.state.log_history[0]["rewards/environment_reward/mean"] == 1.0


def test_the_same_rollout_serves_two_trainers(make_trainer):
    rows = [row([user("Go on.")])]
    rollout = MultiTurnRollout(Talk, tasks=rows)
    for template in ("qwen2_5", "qwen3"):
        trainer = make_trainer(rows, template, generation_kwargs=forced_end())
        (trajectory,) = rollout([rows[0]["prompt"]], trainer)["trajectories"]
        text = trainer.processing_class.decode(trajectory.turns[0].context_ids)
        assert ("You are Qwen" in text) == (template == "qwen2_5")


# --- several processes ----------------------------------------------------------------------------------------------

# for each process, the number of replies and the fault of each of its environments; whether on vLLM; options
SCENARIOS = {
    "ragged": ([[0, 0], [3, 1]], [[None, None], [None, None]], False, {}),
    "ragged, vLLM": ([[0, 0], [3, 1]], [[None, None], [None, None]], True, {}),
    "waves": ([[0, 0], [3, 1]], [[None, None], [None, None]], False, {"max_concurrent_envs": 1}),
    "one fails": ([[0, 0], [1, 0]], [["reset", "step"], [None, None]], False, {}),
    "one fails too often": ([[0, 0], [1, 0]], [["reset", "step"], [None, None]], False, {"max_env_failure_rate": 0.4}),
    "all fail": ([[0, 0], [0, 0]], [["reset", "reset"], ["step", "step"]], False, {}),
}

TWO_PROCESSES = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from datasets import Dataset
from test_multi_turn import SCENARIOS, Fragile, GRPOConfig, GRPOTrainer, MultiTurnRollout, byte_tokenizer
from test_multi_turn import environment_reward, forced_end, row, tiny_model, user

tokenizer = byte_tokenizer("qwen2_5")
trainer = GRPOTrainer(
    model=tiny_model(tokenizer),
    args=GRPOConfig(output_dir=sys.argv[2], report_to=[], use_cpu=True, bf16=False, num_generations=2,
                    per_device_train_batch_size=2, max_completion_length=4, generation_kwargs=forced_end()),
    train_dataset=Dataset.from_list([row(number=i) for i in range(4)]), processing_class=tokenizer,
    reward_funcs=environment_reward, rollout_func=lambda *args: None,
)
assert trainer.accelerator.num_processes == 2
rank, generate, found = trainer.accelerator.process_index, trainer._generate_single_turn, {}
for name, (lengths, faults, vllm, options) in SCENARIOS.items():
    calls = []
    def counted(prompts, *args):
        calls.append(len(prompts))
        torch.distributed.barrier()  # stands for the collectives of ZeRO-3: hangs unless all processes come
        trainer.use_vllm = False
        completion_ids, _ = generate(prompts, *args)
        trainer.use_vllm = vllm
        return completion_ids, [[-1.0] * len(ids) for ids in completion_ids] if vllm else None
    trainer._generate_single_turn = counted
    trainer.use_vllm = vllm
    trainer.rollout_inputs = [
        row(*[[user("Go on.")]] * n, fails_in=fault) for n, fault in zip(lengths[rank], faults[rank])
    ]
    try:
        output = MultiTurnRollout(Fragile, **options)([None] * 2, trainer)
        found[name] = {"turns": [len(t.turns) for t in output["trajectories"]], "stop": output["stop_reason"]}
    except RuntimeError as error:
        found[name] = {"error": str(error)}
    found[name]["calls"] = calls
Path(sys.argv[2], f"rank{rank}.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What each of two processes found in each scenario."""
    return run_on_two_processes(TWO_PROCESSES, tmp_path_factory.mktemp("two_processes"))


def run_on_two_processes(code, directory, *arguments, timeout=240):
    """
    Run a script with the directories of the tests and of its output, and further arguments, and return what each
    process wrote there.
    """
    script, config = directory / "script.py", directory / "ddp.yaml"
    script.write_text(code)
    config.write_text(
        "{distributed_type: MULTI_GPU, num_processes: 2, num_machines: 1, machine_rank: 0, use_cpu: false,"
        " mixed_precision: 'no', main_training_function: main, rdzv_backend: static, same_network: true}"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", f"--config_file={config}", "--main_process_port=0"]
    command = [*launch, str(script), str(Path(__file__).parent), str(directory), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    files = [directory / f"rank{rank}.json" for rank in range(2)]
    assert all(file.exists() for file in files), done.stderr[-3000:]
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.slow
def test_processes_generate_equally_often(two_processes):
    first, second = (results["ragged"] for results in two_processes)
    assert first == {"turns": [1, 1], "stop": ["completed"] * 2, "calls": [2, 1, 1, 1]}
    assert second == {"turns": [4, 2], "stop": ["completed"] * 2, "calls": [2, 2, 1, 1]}


@pytest.mark.slow
def test_processes_send_equally_many_rows_to_vllm(two_processes):
    first, second = (results["ragged, vLLM"] for results in two_processes)
    assert first["calls"] == second["calls"] == [2, 2, 1, 1]
    assert (first["turns"], second["turns"]) == ([1, 1], [4, 2])


@pytest.mark.slow
def test_a_process_whose_environments_all_failed_goes_on(two_processes):
    first, second = (results["one fails"] for results in two_processes)
    assert first == {"turns": [0, 1], "stop": ["env_error"] * 2, "calls": [1, 1]}
    assert second == {"turns": [2, 1], "stop": ["completed"] * 2, "calls": [2, 1]}


@pytest.mark.slow
def test_processes_with_waves_of_different_number_generate_equally_often(two_processes):
    first, second = (results["waves"] for results in two_processes)
    assert (first["turns"], second["turns"]) == ([1, 1], [4, 2])
    assert first["calls"] == second["calls"] == [1] * 6


@pytest.mark.slow
def test_processes_without_a_fault_raise_with_the_others(two_processes):
    for results in two_processes:
        assert "2 of 4 environments of the batch failed" in results["one fails too often"]["error"]
        assert "OSError: no server" in results["one fails too often"]["error"]


@pytest.mark.slow
def test_all_processes_raise_when_all_environments_failed(two_processes):
    for results in two_processes:
        assert "All 4 environments of the batch failed" in results["all fail"]["error"]
