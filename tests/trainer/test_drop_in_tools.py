"""Tools and environments of a script for TRL's `GRPOTrainer`: each response between their results is a turn."""

import sys

import pandas as pd
import pytest
import torch
from datasets import Dataset
from grpo_script import chat_dataset, logged, moved, parameters_of, small_tokens
from tool_calls import (
    BARE_CALL,
    BOTTOMLESS,
    CALL,
    DEEP,
    MALFORMED,
    TEXT_CALL,
    WRONG_NAME,
    Counter,
    increment,
    only,
    save_calling_model,
)

from seeupo_trl.trainer_inputs import readable_tool


def look() -> str:
    """Looks around."""
    return "w1"


async def increment_later(step: int) -> int:
    return step


increment_later.__name__, increment_later.__doc__ = increment.__name__, increment.__doc__


class Silent:
    """An environment without tools."""

    def reset(self, **kwargs):
        return "w3"

    def get_reward(self) -> float:
        return 0.0


def responses(completion):
    return sum(message["role"] == "assistant" for message in completion)


def calls_and_tokens(completions, completion_ids, **kwargs):
    """Differs between completions, with or without calls."""
    return [responses(c) + 0.01 * r for c, r in zip(completions, small_tokens(completion_ids), strict=True)]


class TestToolsAndEnvironments:
    @pytest.fixture
    def make_agent(self, make, tool_dir):
        def build(args=None, **kwargs):
            args = {"max_completion_length": 60, "generation_kwargs": only(CALL, "w1"), **(args or {})}
            given = {"model": tool_dir, "train_dataset": chat_dataset(), "reward_funcs": calls_and_tokens}
            return make(args, **{**given, **kwargs})

        return build

    @pytest.mark.parametrize("tool", [increment, increment_later], ids=["sync", "async"])
    def test_each_response_between_tool_results_is_a_turn(self, make_agent, tool):
        seen = []

        def watching(completions, completion_ids, **kwargs):
            seen.append([responses(completion) for completion in completions])
            results = [m["content"] for completion in completions for m in completion if m["role"] == "tool"]
            assert set(results) <= {"2"}
            return calls_and_tokens(completions, completion_ids)

        trainer = make_agent({"max_steps": 3, "max_completion_length": 400}, tools=[tool], reward_funcs=watching)
        before = parameters_of(trainer)
        trainer.train()
        assert moved(trainer, before) == set(before)
        assert logged(trainer, "turns/mean") == pytest.approx([sum(counts) / len(counts) for counts in seen])
        assert logged(trainer, "turns/max") == [max(counts) for counts in seen]
        assert max(map(max, seen)) > 1
        assert max(logged(trainer, "tools/call_frequency")) > 0
        assert set(logged(trainer, "tools/failure_frequency")) == {0.0}

    def test_every_turn_of_an_episode_gets_its_own_update(self, make_agent):
        args = {"max_turns": 3, "generation_kwargs": {**only(CALL), "min_new_tokens": 1}, "max_completion_length": 400}
        trainer = make_agent(args, tools=[increment])
        trainer.train()
        for entry in trainer.state.log_history[:2]:
            assert entry["turns/min"] == entry["turns/max"] == 3
            assert entry["turn_updates"] == entry["optimizer_steps"] == 3
            assert [entry[f"turn_{turn}/pool"] for turn in (1, 2, 3)] == [4, 4, 4]

    @pytest.mark.parametrize("max_turns", [2, None])
    def test_an_episode_ends_at_max_turns_or_with_the_completion_length(self, make_agent, max_turns):
        args = {"max_turns": max_turns, "generation_kwargs": {**only(CALL), "min_new_tokens": 1}}
        trainer = make_agent(args, tools=[increment])
        trainer.train()
        turns = max(logged(trainer, "turns/max"))
        assert turns == 2 if max_turns else turns > 2
        assert max(logged(trainer, "completions/max_length")) <= 60

    def test_there_is_no_limit_of_tool_calls_unless_one_is_given(self, make_agent):
        assert make_agent(tools=[increment]).max_tool_calling_iterations == sys.maxsize
        assert make_agent({"max_turns": 10}, tools=[increment]).max_tool_calling_iterations == 9

    def test_an_explicit_limit_of_tool_calls_is_kept(self, make_agent):
        trainer = make_agent({"max_tool_calling_iterations": 1}, tools=[increment])
        trainer.train()
        assert trainer.max_tool_calling_iterations == 1
        assert max(logged(trainer, "turns/max")) <= 2

    def test_failed_and_malformed_calls_are_the_models_own_fault(self, make_agent):
        args = {"generation_kwargs": only(WRONG_NAME, MALFORMED), "max_steps": 3}
        trainer = make_agent(args, tools=[increment])
        trainer.train()
        assert trainer.state.global_step == 3
        assert max(logged(trainer, "tools/failure_frequency")) == 1.0

    @pytest.mark.parametrize("call", [DEEP, BOTTOMLESS], ids=["deep", "bottomless"])
    def test_calls_nested_too_deeply_are_text(self, make_agent, call):
        contents = []

        def watching(completions, **kwargs):
            contents.extend(message["content"] for completion in completions for message in completion)
            return calls_and_tokens(completions, **kwargs)

        trainer = make_agent(
            {"generation_kwargs": only(call), "max_steps": 1}, tools=[increment], reward_funcs=watching
        )
        trainer.train()
        assert any(call in content for content in contents)
        assert "parse_response" not in vars(trainer.processing_class)

    def test_a_call_is_executed_after_any_number_of_open_brackets(self, make_agent, tmp_path):
        response = "[0, 1) " * 300 + CALL
        args = {"generation_kwargs": only(response, calls=[response]), "max_steps": 1}
        trainer = make_agent(args, model=save_calling_model(tmp_path / "model", [response]), tools=[increment])
        trainer.train()
        assert max(logged(trainer, "tools/call_frequency")) > 0

    def test_a_parser_of_the_scripts_own_is_asked(self, make_agent):
        trainer = make_agent({"generation_kwargs": only(CALL), "max_steps": 1}, tools=[increment])
        tokenizer, asked = trainer.processing_class, []
        parse_response = tokenizer.parse_response
        tokenizer.parse_response = lambda *args, **kwargs: asked.append(args) or parse_response(*args, **kwargs)
        trainer.train()
        assert asked and max(logged(trainer, "turns/max")) > 1
        assert "parse_response" in vars(tokenizer)

    def test_a_script_may_parse_in_all_ways_that_its_tokenizer_knows(self, make_agent):
        def ways():
            parse, template = trainer.processing_class.parse_response, trainer.processing_class.response_template
            ids = trainer.processing_class(f"{CALL} w1")["input_ids"]
            return [
                parse(CALL, prefix=""),
                parse(response=ids, prefix="w1"),
                parse(ids, template, prefix=[]),
                parse([CALL, "w1"], prefix=""),
                parse([ids, ids], prefix=[[], []]),
                parse(torch.tensor(ids), prefix=""),
            ]

        def look() -> str:
            """Looks around."""
            parsed.append(ways())
            return "w1"

        parsed = []
        trainer = make_agent({"generation_kwargs": only(BARE_CALL), "max_steps": 1}, tools=[look])
        trainer.train()
        assert parsed == [ways()] * len(parsed) and parsed

    def test_a_tool_result_that_does_not_fit_ends_the_episode(self, make_agent):
        trainer = make_agent({"max_completion_length": 6, "generation_kwargs": only(CALL)}, tools=[increment])
        before = parameters_of(trainer)
        trainer.train()
        assert moved(trainer, before) == set(before)
        assert max(logged(trainer, "completions/max_length")) <= 6

    @pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
    @pytest.mark.parametrize(
        ("result", "read"),
        [
            (["w1", "w2"], '["w1", "w2"]'),
            ([{"type": "w1"}], '[{"type": "w1"}]'),
            ([{"type": "text", "text": None}], '[{"type": "text", "text": null}]'),
            ([{"type": "image", "image": "w1"}], '[{"type": "image", "image": "w1"}]'),
            ("\ud83d", "?"),
            (10**5000, "{'error"),
        ],
        ids=["list", "list of dicts", "data with a type", "image", "surrogate", "huge"],
    )
    def test_whatever_a_plain_tool_returns_is_read(self, make_agent, result, read, is_async):
        def look() -> str:
            """Looks around."""
            return result

        async def look_later() -> str:
            """Looks around."""
            return result

        look_later.__name__ = "look"
        contents = []

        def watching(completions, **kwargs):
            contents.extend(m["content"] for completion in completions for m in completion if m["role"] == "tool")
            return calls_and_tokens(completions, **kwargs)

        tools = [look_later if is_async else look]
        args = {"generation_kwargs": only(BARE_CALL, "w1"), "max_completion_length": 200, "max_steps": 1}
        trainer = make_agent(args, tools=tools, reward_funcs=watching)
        trainer.train()
        assert contents and all(content.startswith(read) for content in contents)

    def test_parts_are_one_text_where_the_policy_and_tables_show_them_and_stay_parts_for_rewards(
        self, make_agent, tmp_path
    ):
        def look() -> list:
            """Looks around."""
            return [{"type": "text", "text": "w5 "}, {"type": "input_text", "text": "w6"}]

        contents, read = [], []

        def watching(completions, completion_ids, **kwargs):
            contents.extend(m["content"] for completion in completions for m in completion if m["role"] == "tool")
            read.extend(trainer.processing_class.batch_decode(completion_ids))
            return calls_and_tokens(completions, completion_ids)

        args = {"generation_kwargs": {**only(BARE_CALL), "min_new_tokens": 1}, "max_turns": 2, "max_steps": 1}
        args |= {"log_completions": True, "max_completion_length": 100}
        trainer = make_agent(args, tools=[look], reward_funcs=watching)
        trainer.train()
        assert contents and all(content == look() for content in contents)
        assert all("tool w5 w6 <|im_end|>" in text for text in read)
        table = pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
        shown = [m["content"] for completion in table["completion"] for m in completion if m["role"] == "tool"]
        assert shown == ["w5 w6"] * len(contents)

    def test_a_policy_that_sees_gets_a_plain_tools_parts(self):
        parts = [{"type": "text", "text": "w1"}, {"type": "image", "image": "w1"}]
        assert readable_tool(lambda: parts, lambda: True)() == parts

    def test_an_environment_of_tools_owns_data_and_reward(self, make_agent):
        trainer = make_agent(
            {"max_completion_length": 100}, train_dataset=None, reward_funcs=None, environment_factory=Counter
        )
        before = parameters_of(trainer)
        trainer.train()
        assert trainer.reward_func_names == ["Counter"]
        assert max(logged(trainer, "rewards/Counter/mean")) > 0
        assert moved(trainer, before) == set(before)
        assert [environment.value for environment in trainer.environments][0] % 2 == 0

    def test_an_environment_is_reset_with_the_row(self, make_agent):
        starts = []

        def watching(environments, completions, completion_ids, **kwargs):
            starts.extend(environment.value for environment in environments)
            return calls_and_tokens(completions, completion_ids)

        make_agent(
            {"generation_kwargs": only("w1"), "shuffle_dataset": False},
            train_dataset=chat_dataset(start=list(range(8))),
            reward_funcs=watching,
            environment_factory=Counter,
        ).train()
        assert starts == [0, 0, 1, 1, 2, 2, 3, 3]

    def test_rows_choose_among_several_environments(self, make_agent):
        trainer = make_agent(
            {"shuffle_dataset": False, "max_completion_length": 100},
            train_dataset=Dataset.from_dict({"environment": ["counter", "silent"] * 4}),
            reward_funcs=None,
            environment_factory={"counter": Counter, "silent": Silent},
        )
        trainer.train()
        assert [type(environment) for environment in trainer.environments] == [Counter, Counter, Silent, Silent]
        assert set(logged(trainer, "rewards/Silent/mean")) == {0.0}

    @pytest.mark.parametrize("calls", [(BARE_CALL,), (CALL, TEXT_CALL)], ids=["no arguments", "mixed types"])
    def test_completions_with_any_arguments_are_logged(self, make_agent, tmp_path, calls):
        sampling = {**only(*calls), "min_new_tokens": 1}
        args = {"log_completions": True, "max_turns": 2, "max_steps": 1, "generation_kwargs": sampling}
        make_agent({**args, "max_completion_length": 100}, tools=[increment, look]).train()
        table = pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
        assert all(completion[0]["tool_calls"][0]["function"]["arguments"] for completion in table["completion"])

    def test_tools_work_in_evaluation(self, make_agent):
        trainer = make_agent({"max_completion_length": 400}, tools=[increment], eval_dataset=chat_dataset())
        metrics = trainer.evaluate()
        assert metrics["eval_turns/max"] > 1
        assert metrics["eval_tools/call_frequency"] > 0
