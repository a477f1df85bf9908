"""Reward functions of a script for TRL's `GRPOTrainer` go on working."""

import functools
from pathlib import Path

import pandas as pd
import pytest
import torch
from count_down import CountDown
from grpo_script import PROMPTS, chat_dataset, logged, moved, parameters_of, small_tokens, text_dataset
from tiny import tiny_config, tiny_tokenizer
from transformers import Qwen3ForSequenceClassification


class TestRewards:
    def test_a_reward_function_sees_columns_state_and_tokens(self, make):
        seen = []

        def watching(prompts, completions, completion_ids, answer, trainer_state, **kwargs):
            seen.append(trainer_state.global_step)
            expected = [f"answer to {prompt}" for prompt in prompts]
            assert answer == expected
            assert all(isinstance(text, str) for text in completions)
            assert all(isinstance(token, int) for ids in completion_ids for token in ids)
            return small_tokens(completion_ids)

        dataset = text_dataset(answer=[f"answer to {prompt}" for prompt in PROMPTS])
        make(reward_funcs=watching, train_dataset=dataset).train()
        assert seen == [0, 1]

    def test_conversations_are_completed_by_messages(self, make):
        def watching(prompts, completions, completion_ids, **kwargs):
            for prompt, completion in zip(prompts, completions, strict=True):
                assert [message["role"] for message in prompt + completion] == ["user", "assistant"]
            return small_tokens(completion_ids)

        trainer = make(reward_funcs=watching, train_dataset=chat_dataset())
        trainer.train()
        assert trainer.state.global_step == 2

    def test_sync_and_async_rewards_are_weighted_and_added(self, make):
        async def constant(completions, **kwargs):
            return [0.5] * len(completions)

        trainer = make({"reward_weights": [2.0, 3.0]}, reward_funcs=[small_tokens, constant])
        trainer.train()
        rows = zip(
            *(logged(trainer, key) for key in ("reward", "rewards/small_tokens/mean", "rewards/constant/mean")),
            strict=True,
        )
        for reward, first, second in rows:
            assert second == 0.5
            assert reward == pytest.approx(2.0 * first + 3.0 * 0.5, rel=1e-5)

    def test_functions_of_one_name_are_told_apart(self, make):
        functions = [lambda completions, value=value, **kwargs: [value] * len(completions) for value in (0.25, 0.75)]
        with pytest.warns(UserWarning, match="called small_tokens, <lambda>, <lambda>_2 "):
            trainer = make({"max_steps": 1}, reward_funcs=[small_tokens, *functions], eval_dataset=text_dataset())
        trainer.train()
        metrics = trainer.evaluate()
        for name, value in {"<lambda>": 0.25, "<lambda>_2": 0.75}.items():
            assert logged(trainer, f"rewards/{name}/mean") == [value]
            assert metrics[f"eval_rewards/{name}/mean"] == value
            assert {outcome.rewards[name] for outcome in trainer.last_evaluation} == {value}

    def test_a_callable_object_and_a_partial_are_reward_functions(self, make):
        class Scaled:
            def __call__(self, completion_ids, scale=1.0, **kwargs):
                return [scale * reward for reward in small_tokens(completion_ids)]

        trainer = make(reward_funcs=[Scaled(), functools.partial(Scaled(), scale=2.0)])
        trainer.train()
        assert trainer.state.global_step == 2

    def test_none_leaves_a_function_out_for_that_row_and_an_unscored_row_out_of_training(self, make):
        def first_of_a_pair(completion_ids, **kwargs):
            return [1.0 if index % 2 == 0 else None for index in range(len(completion_ids))]

        trainer = make(reward_funcs=first_of_a_pair)
        before = parameters_of(trainer)
        trainer.train()
        assert logged(trainer, "rewards/first_of_a_pair/mean") == [1.0, 1.0]
        assert not moved(trainer, before)  # one scored row a group: nothing to compare with

        mixed = make(reward_funcs=[first_of_a_pair, small_tokens])
        before = parameters_of(mixed)
        mixed.train()
        assert moved(mixed, before) == set(before)

    def test_an_error_in_a_reward_function_surfaces(self, make):
        def broken(completions, **kwargs):
            raise ZeroDivisionError("no such luck")

        with pytest.raises(ZeroDivisionError, match="no such luck"):
            make(reward_funcs=broken).train()

    def test_an_error_in_an_async_reward_function_surfaces(self, make):
        async def broken(completions, **kwargs):
            raise ZeroDivisionError("no such luck")

        with pytest.raises(ZeroDivisionError, match="no such luck"):
            make(reward_funcs=broken).train()

    def test_too_few_rewards_are_refused(self, make):
        def short(completions, **kwargs):
            return [1.0]

        with pytest.raises(ValueError, match="short"):
            make(reward_funcs=short).train()

    def test_equal_rewards_change_nothing(self, make):
        def always_one(completions, **kwargs):
            return [1.0] * len(completions)

        trainer = make({"weight_decay": 0.1}, reward_funcs=always_one)
        before = parameters_of(trainer)
        trainer.train()
        assert not moved(trainer, before)
        assert logged(trainer, "frac_reward_zero_std") == [1.0, 1.0]

    @pytest.fixture
    def reward_model_directory(self, tmp_path_factory):
        directory = str(tmp_path_factory.mktemp("reward_model"))
        torch.manual_seed(1)
        Qwen3ForSequenceClassification(tiny_config(num_labels=1)).save_pretrained(directory)
        tiny_tokenizer().save_pretrained(directory)
        return directory

    @pytest.mark.parametrize("by_path", [True, False])
    def test_a_reward_model_scores_completions(self, make, reward_model_directory, by_path):
        directory = reward_model_directory
        reward_model = Qwen3ForSequenceClassification.from_pretrained(directory)
        trainer = make(reward_funcs=directory if by_path else reward_model, train_dataset=chat_dataset())
        before = parameters_of(trainer)
        trainer.train()
        assert moved(trainer, before) == set(before)
        assert logged(trainer, f"rewards/{Path(directory).name}/std")[0] > 0

    @pytest.mark.parametrize("tokenizers", [None, tiny_tokenizer(), [tiny_tokenizer()], [tiny_tokenizer(), None]])
    def test_a_reward_model_scores_episodes_of_messages(self, make, reward_model_directory, tokenizers):
        given = {"reward_funcs": reward_model_directory, "environment_factory": CountDown}
        given["reward_processing_classes"] = tokenizers  # TRL makes one for each environment's reward itself
        trainer = make({"max_steps": 1}, train_dataset=chat_dataset(), **given)
        trainer.train()
        assert logged(trainer, f"rewards/{Path(reward_model_directory).name}/std")[0] > 0
        with pytest.raises(ValueError, match="the dataset's prompts are texts"):
            make(train_dataset=text_dataset(), **given).train()

    def test_metrics_and_columns_of_a_reward_function_are_logged(self, make, tmp_path):
        def talkative(completion_ids, log_metric, log_extra, **kwargs):
            log_metric("answered", 0.25)
            log_extra("length", [len(ids) for ids in completion_ids])
            return small_tokens(completion_ids)

        trainer = make({"log_completions": True, "max_steps": 1}, reward_funcs=talkative)
        trainer.train()
        assert logged(trainer, "answered") == [0.25]
        table = pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
        assert table["length"].between(1, 6).all()
