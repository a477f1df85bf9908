"""A script written for TRL's `GRPOTrainer` goes on working when the two class names are swapped."""

import functools
import inspect
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
import trl
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tiny import VOCABULARY, load_tiny_model, tiny_config, tiny_tokenizer
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainerCallback,
    TrainerState,
)
from trl import GRPOConfig, TrlParser

from seeupo_trl import SeeUPOConfig, SeeUPOTrainer


PROMPTS = [f"w{i} w{i + 1}" for i in range(8)]
CONVERSATIONS = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]


def settings(directory, **overrides):
    """Two prompts in groups of two an iteration, short completions, steps large enough to see."""
    return {
        "output_dir": str(directory),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "max_steps": 2,
        "max_completion_length": 6,
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        **overrides,
    }


def config(directory, **overrides):
    return SeeUPOConfig(**settings(directory, **overrides))


def small_tokens(completion_ids, **kwargs):
    """Different for almost any two completions, so that there is always something to learn."""
    return [-sum(ids) / len(ids) for ids in completion_ids]


def text_dataset(**columns):
    return Dataset.from_dict({"prompt": PROMPTS, **columns})


def chat_dataset(**columns):
    return Dataset.from_dict({"prompt": CONVERSATIONS, **columns})


@pytest.fixture
def make(tiny_dir, tmp_path):
    """Build a trainer with settings like those of a short GRPO script; keywords of the config are given in `args`."""

    def build(args=None, **kwargs):
        given = {"model": tiny_dir, "reward_funcs": small_tokens, "train_dataset": text_dataset(), **kwargs}
        return SeeUPOTrainer(args=args if isinstance(args, GRPOConfig) else config(tmp_path, **(args or {})), **given)

    return build


def parameters_of(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def moved(trainer, before):
    """Names of the parameters that are no longer what they were."""
    now = parameters_of(trainer)
    return {name for name in before if not torch.equal(before[name], now[name])}


def logged(trainer, key):
    """The values of a metric over the run, in order."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


class TestModelAndArguments:
    def test_every_parameter_of_a_model_given_by_path_is_trained(self, make):
        trainer = make()
        before = parameters_of(trainer)
        trainer.train()
        assert moved(trainer, before) == set(before)

    def test_a_model_instance_with_its_tokenizer_is_trained_in_place(self, make, tiny_dir):
        model = load_tiny_model(tiny_dir)
        trainer = make(model=model, processing_class=AutoTokenizer.from_pretrained(tiny_dir))
        before = parameters_of(trainer)
        trainer.train()
        assert trainer.accelerator.unwrap_model(trainer.model) is model
        assert moved(trainer, before) == set(before)

    def test_model_init_kwargs_reach_the_model(self, make):
        trainer = make({"model_init_kwargs": {"dtype": "bfloat16", "attn_implementation": "eager"}})
        assert trainer.model.dtype == torch.bfloat16
        assert trainer.model.config._attn_implementation == "eager"

    def test_arguments_may_be_positional_in_the_order_of_grpo(self, tiny_dir, tmp_path):
        SeeUPOTrainer(tiny_dir, small_tokens, config(tmp_path, max_steps=1), text_dataset()).train()

    def test_a_grpo_config_is_accepted_and_left_as_it_was(self, make, tmp_path):
        given = GRPOConfig(**settings(tmp_path, learning_rate=3e-3, epsilon=0.1, epsilon_high=0.3, beta=0.05))
        as_given = dict(vars(given))
        trainer = make(given)
        before = parameters_of(trainer)
        trainer.train()
        assert moved(trainer, before) == set(before)
        assert vars(given) == as_given
        assert isinstance(trainer.args, SeeUPOConfig)
        for name in ("learning_rate", "epsilon", "epsilon_high", "beta", "max_completion_length", "temperature"):
            assert getattr(trainer.args, name) == getattr(given, name)

    def test_a_grpo_config_trains_like_the_seeupo_config_with_the_same_values(self, make, tmp_path):
        runs = []
        for config_class in (GRPOConfig, SeeUPOConfig):
            trainer = make(config_class(**settings(tmp_path)))
            trainer.train()
            runs.append(parameters_of(trainer))
        assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])

    @pytest.mark.skipif(trl.__version__.startswith("1.15"), reason="GRPOTrainer of trl 1.15 needs a GPU")
    def test_the_first_batch_is_the_one_grpo_samples(self, make, tiny_dir, tmp_path):
        seen = []

        def watching(prompts, completion_ids, **kwargs):
            seen.append((prompts, completion_ids))
            return small_tokens(completion_ids)

        given = {"model": tiny_dir, "reward_funcs": watching, "train_dataset": text_dataset()}
        trl.GRPOTrainer(args=GRPOConfig(**settings(tmp_path, max_steps=1)), **given).train()
        make({"max_steps": 1}, reward_funcs=watching).train()
        assert seen[0] == seen[1]

    def test_the_config_is_read_from_the_command_line(self, tmp_path):
        arguments = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false", "--update_order", "forward"]
        arguments += ["--max_turn_updates", "3", "--turn_weight_clip", "0.1", "--num_generations", "4"]
        (parsed,) = TrlParser((SeeUPOConfig,)).parse_args_and_config(arguments)
        assert (parsed.update_order, parsed.max_turn_updates, parsed.turn_weight_clip) == ("forward", 3, 0.1)
        assert parsed.num_generations == 4

    def test_an_optimizer_and_a_schedule_of_ones_own_are_used(self, make, tiny_dir):
        model = load_tiny_model(tiny_dir)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        trainer = make({"max_steps": 3}, model=model, optimizers=(optimizer, schedule))
        trainer.train()
        assert trainer.optimizer.optimizer is optimizer
        assert logged(trainer, "learning_rate") == pytest.approx([0.1, 0.05, 0.025])

    @pytest.mark.parametrize(
        "option",
        [
            {"loss_type": "cispo"},
            {"loss_type": "sapo"},
            {"loss_type": "luspo"},
            {"loss_type": "vespo"},
            {"top_entropy_quantile": 0.2},
            {"steps_per_generation": 3, "gradient_accumulation_steps": 2},
            {"scale_rewards": "sometimes"},
        ],
        ids=str,
    )
    def test_an_option_without_a_meaning_here_is_refused_by_name(self, tmp_path, option):
        with pytest.raises(ValueError, match=next(iter(option))):
            config(tmp_path, **option)

    @pytest.mark.parametrize(
        "option", [{"loss_type": "dapo"}, {"scale_rewards": "group"}, {"importance_sampling_level": "token"}], ids=str
    )
    def test_an_option_that_has_no_effect_warns(self, tmp_path, option):
        with pytest.warns(UserWarning, match=next(iter(option))):
            config(tmp_path, **option)


class TestCounting:
    def test_one_step_is_one_generation_batch(self, make):
        calls = []

        def counting(completion_ids, **kwargs):
            calls.append(len(completion_ids))
            return small_tokens(completion_ids)

        trainer = make({"max_steps": 3, "gradient_accumulation_steps": 2}, reward_funcs=counting)
        trainer.train()
        assert trainer.state.global_step == 3
        assert calls == [8, 8, 8]  # per_device_train_batch_size x gradient_accumulation_steps completions
        assert logged(trainer, "optimizer_steps") == [1, 1, 1]

    @pytest.mark.parametrize(("generation", "steps_an_epoch"), [({}, 4), ({"steps_per_generation": 2}, 2)])
    def test_an_epoch_visits_every_prompt_once(self, make, generation, steps_an_epoch):
        seen = []

        def watching(prompts, completion_ids, **kwargs):
            seen.append(prompts[::2])
            return small_tokens(completion_ids)

        trainer = make({"max_steps": -1, "num_train_epochs": 2, **generation}, reward_funcs=watching)
        trainer.train()
        assert trainer.state.global_step == 2 * steps_an_epoch
        for epoch in (seen[:steps_an_epoch], seen[steps_an_epoch:]):
            assert sorted(sum(epoch, [])) == PROMPTS

    def test_prompts_come_in_order_without_shuffling_and_in_groups(self, make):
        seen = []

        def watching(prompts, completion_ids, **kwargs):
            seen.extend(prompts)
            return small_tokens(completion_ids)

        make({"shuffle_dataset": False, "max_steps": 4}, reward_funcs=watching).train()
        assert seen == [prompt for prompt in PROMPTS for _ in range(2)]

    def test_steps_per_generation_over_accumulation_is_the_number_of_optimizer_steps(self, make):
        sizes = {"per_device_train_batch_size": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 2}
        trainer = make(sizes)
        trainer.train()
        assert trainer.state.global_step == 2
        assert logged(trainer, "optimizer_steps") == [2, 2]

    def test_num_iterations_repeats_the_optimizer_steps_of_a_turn(self, make):
        trainer = make({"num_iterations": 3})
        trainer.train()
        assert logged(trainer, "optimizer_steps") == [3, 3]

    def test_the_learning_rate_moves_once_an_iteration(self, make):
        trainer = make({"max_steps": 4, "num_iterations": 2, "lr_scheduler_type": "linear"})
        trainer.train()
        assert logged(trainer, "learning_rate") == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])

    def test_the_learning_rate_moves_in_an_iteration_without_an_update_too(self, make):
        def always_one(completions, **kwargs):
            return [1.0] * len(completions)

        trainer = make({"max_steps": 4, "lr_scheduler_type": "linear"}, reward_funcs=always_one)
        trainer.train()
        assert logged(trainer, "learning_rate") == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])

    def test_more_generations_than_a_micro_batch_holds(self, make):
        trainer = make({"per_device_train_batch_size": 2, "num_generations": 6, "gradient_accumulation_steps": 3})
        trainer.train()
        assert trainer.state.global_step == 2


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

    @pytest.mark.parametrize("by_path", [True, False])
    def test_a_reward_model_scores_completions(self, make, tmp_path_factory, by_path):
        directory = str(tmp_path_factory.mktemp("reward_model"))
        torch.manual_seed(1)
        Qwen3ForSequenceClassification(tiny_config(num_labels=1)).save_pretrained(directory)
        tiny_tokenizer().save_pretrained(directory)
        reward_model = Qwen3ForSequenceClassification.from_pretrained(directory)
        trainer = make(reward_funcs=directory if by_path else reward_model, train_dataset=chat_dataset())
        before = parameters_of(trainer)
        trainer.train()
        assert moved(trainer, before) == set(before)
        assert logged(trainer, f"rewards/{Path(directory).name}/std")[0] > 0

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


class TestEvaluation:
    def test_evaluate_reports_rewards_and_leaves_the_model_alone(self, make):
        trainer = make(eval_dataset=text_dataset())
        before = parameters_of(trainer)
        metrics = trainer.evaluate()
        assert {"eval_loss", "eval_reward", "eval_rewards/small_tokens/mean", "eval_entropy"} <= metrics.keys()
        assert metrics["eval_reward"] < 0
        assert not moved(trainer, before)

    def test_evaluation_during_training_happens_when_asked(self, make):
        args = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, "per_device_eval_batch_size": 4}
        trainer = make(args, eval_dataset=text_dataset())
        trainer.train()
        steps = [entry["step"] for entry in trainer.state.log_history if "eval_reward" in entry]
        assert steps == [2, 4]

    def test_training_is_the_same_with_evaluation_on_start_as_far_as_data_goes(self, make):
        seen = {}

        def watching(prompts, completion_ids, run, **kwargs):
            seen.setdefault(run[0], []).extend(prompts)
            return small_tokens(completion_ids)

        train = text_dataset(run=["train"] * 8)
        make(reward_funcs=watching, train_dataset=train).train()
        expected, seen["train"] = seen["train"], []
        args = {"eval_strategy": "epoch", "eval_on_start": True}
        make(args, reward_funcs=watching, train_dataset=train, eval_dataset=text_dataset(run=["eval"] * 8)).train()
        assert seen["train"] == expected
        assert sorted(set(seen["eval"])) == PROMPTS

    def test_num_generations_eval_sets_the_completions_of_a_prompt(self, make):
        seen = []

        def watching(prompts, completion_ids, **kwargs):
            seen.extend(prompts)
            return small_tokens(completion_ids)

        args = {"num_generations_eval": 4, "per_device_eval_batch_size": 8}
        make(args, reward_funcs=watching, eval_dataset=text_dataset()).evaluate()
        assert {prompt: seen.count(prompt) for prompt in PROMPTS} == dict.fromkeys(PROMPTS, 4)

    def test_one_generation_a_prompt_is_enough_to_evaluate(self, make):
        trainer = make({"num_generations_eval": 1}, eval_dataset=text_dataset())
        assert trainer.evaluate()["eval_reward"] < 0

    def test_several_evaluation_datasets_are_reported_by_name(self, make):
        datasets = {"easy": text_dataset().select(range(4)), "hard": text_dataset().select(range(4, 8))}
        trainer = make({"eval_strategy": "steps", "eval_steps": 2}, eval_dataset=datasets)
        trainer.train()
        assert len(logged(trainer, "eval_easy_loss")) == len(logged(trainer, "eval_hard_loss")) == 1
        assert len(logged(trainer, "eval_reward")) == 2  # TRL's own metrics do not carry the name

    def test_evaluation_has_the_kl_term_too(self, make):
        trainer = make({"beta": 0.1}, eval_dataset=text_dataset())
        assert trainer.evaluate()["eval_kl"] == pytest.approx(0.0, abs=1e-6)

    def test_the_best_model_is_kept(self, make):
        args = {
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_strategy": "best",
            "metric_for_best_model": "eval_reward",
            "load_best_model_at_end": True,
        }
        trainer = make(args, eval_dataset=text_dataset())
        trainer.train()
        assert trainer.state.best_metric == pytest.approx(max(logged(trainer, "eval_reward")))


class TestDatasets:
    @pytest.mark.parametrize("split", ["train", "eval"])
    def test_a_stream_is_a_dataset(self, make, split):
        def rows():
            yield from ({"prompt": prompt} for prompt in PROMPTS)

        datasets = {"train_dataset": text_dataset(), "eval_dataset": text_dataset()}
        datasets[f"{split}_dataset"] = IterableDataset.from_generator(rows)
        trainer = make({"max_steps": 3, "eval_strategy": "steps", "eval_steps": 3}, **datasets)
        trainer.train()
        assert trainer.state.global_step == 3
        assert len(logged(trainer, "eval_reward")) == 1

    def test_a_stream_comes_in_groups(self, make):
        seen = []

        def watching(prompts, completion_ids, **kwargs):
            seen.append(prompts)
            return small_tokens(completion_ids)

        stream = text_dataset().to_iterable_dataset()
        make({"shuffle_dataset": False}, reward_funcs=watching, train_dataset=stream).train()
        assert seen == [["w0 w1"] * 2 + ["w1 w2"] * 2, ["w2 w3"] * 2 + ["w3 w4"] * 2]

    def test_data_loader_workers_feed_the_run(self, make):
        trainer = make({"dataloader_num_workers": 1})
        trainer.train()
        assert trainer.state.global_step == 2

    def test_too_few_prompts_for_a_batch_are_refused(self, make):
        with pytest.raises(ValueError, match="rows"):
            make(train_dataset=text_dataset().select(range(1)))


class TestGeneration:
    def test_generation_kwargs_reach_the_sampler(self, make):
        def watching(completion_ids, **kwargs):
            assert all(len(ids) == 6 for ids in completion_ids)
            return small_tokens(completion_ids)

        args = {"generation_kwargs": {"min_new_tokens": 6}, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1}
        trainer = make(args, reward_funcs=watching)
        trainer.train()
        assert logged(trainer, "completions/mean_length") == [6.0, 6.0]

    def test_chat_template_kwargs_reach_the_template(self, make, tiny_dir):
        seen = []

        def watching(prompts, completion_ids, **kwargs):
            return small_tokens(completion_ids)

        class Watch(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                seen.append(state.num_input_tokens_seen)

        tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
        tokenizer.chat_template = "{% if shout %}w50 {% endif %}" + tokenizer.chat_template
        counts = []
        for kwargs in ({}, {"chat_template_kwargs": {"shout": True}}):
            args = {"max_steps": 1, "generation_kwargs": {"min_new_tokens": 6}, **kwargs}
            trainer = make(args, processing_class=tokenizer, train_dataset=chat_dataset(), callbacks=[Watch()])
            trainer.train()
            counts.append(seen[-1])
        assert counts[1] - counts[0] == 4  # one token more in each of four prompts

    def test_masking_truncated_completions_takes_them_out_of_training(self, make):
        # no end of sequence can be sampled, so every completion is cut
        args = {"mask_truncated_completions": True, "generation_kwargs": {"min_new_tokens": 6}}
        trainer = make(args)
        before = parameters_of(trainer)
        trainer.train()
        assert logged(trainer, "completions/clipped_ratio") == [1.0, 1.0]
        assert not moved(trainer, before)

    def test_a_truncated_completion_still_counts_when_not_masked(self, make):
        trainer = make({"generation_kwargs": {"min_new_tokens": 6}})
        before = parameters_of(trainer)
        trainer.train()
        assert moved(trainer, before) == set(before)

    def test_padding_to_a_multiple_changes_nothing(self, make):
        runs = []
        for multiple in (None, 16):
            trainer = make({"pad_to_multiple_of": multiple, "optim": "sgd", "learning_rate": 0.1})
            trainer.train()
            runs.append(parameters_of(trainer))
        for name in runs[0]:
            torch.testing.assert_close(runs[0][name], runs[1][name])

    def test_a_rollout_function_replaces_generation(self, make, tiny_dir):
        tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
        asked = []

        def two_turns(prompts, trainer):
            asked.append((list(prompts), trainer))
            prompt_ids = tokenizer(prompts)["input_ids"]
            completion_ids = [[20 + i, 21, 22, 23 + i, 3] for i in range(len(prompts))]
            env_mask = [[1, 1, 0, 1, 1]] * len(prompts)
            return {
                "prompt_ids": prompt_ids,
                "completion_ids": completion_ids,
                "logprobs": [[0.0] * 5 for _ in prompts],
                "env_mask": env_mask,
                "score": [float(i) for i in range(len(prompts))],
            }

        def score(score, **kwargs):
            return score

        trainer = make(rollout_func=two_turns, reward_funcs=score)
        trainer.train()
        assert asked[0][1] is trainer
        assert len(asked[0][0]) == 4
        assert logged(trainer, "turns/mean") == [2.0, 2.0]
        assert logged(trainer, "optimizer_steps") == [2, 2]
        assert logged(trainer, "rewards/score/mean") == [1.5, 1.5]


class TestRegularisation:
    def test_the_reference_model_is_the_initial_policy(self, make):
        trainer = make({"beta": 0.1, "max_steps": 3})
        reference = {name: p.detach().clone() for name, p in trainer.ref_model.named_parameters()}
        trainer.train()
        kl = logged(trainer, "kl")
        assert kl[0] == pytest.approx(0.0, abs=1e-6)
        assert kl[-1] > 1e-4
        assert all(torch.equal(reference[name], p) for name, p in trainer.ref_model.named_parameters())

    def test_without_beta_there_is_no_reference_model(self, make):
        trainer = make({"max_steps": 1})
        trainer.train()
        assert trainer.ref_model is None
        assert not logged(trainer, "kl")

    def test_the_reference_follows_the_policy_when_synchronised(self, make):
        args = {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0}
        trainer = make(args)
        trainer.train()
        for policy, reference in zip(trainer.model.parameters(), trainer.ref_model.parameters(), strict=True):
            torch.testing.assert_close(policy, reference)

    def test_an_entropy_bonus_is_applied(self, make):
        def always_one(completions, **kwargs):
            return [1.0] * len(completions)

        trainer = make({"entropy_coef": 0.1, "max_steps": 4}, reward_funcs=always_one)
        trainer.train()
        entropy = logged(trainer, "entropy")
        assert entropy[-1] > entropy[0]

    def test_an_adaptive_entropy_bonus_moves_its_coefficient(self, make):
        bounds = {"entropy_coef_min": 0.0, "entropy_coef_max": 0.03, "entropy_coef_delta": 0.01}
        trainer = make({"use_adaptive_entropy": True, "entropy_target": 100.0, "max_steps": 5, **bounds})
        trainer.train()
        coefficients = logged(trainer, "entropy_coef")
        assert coefficients == sorted(coefficients)
        assert coefficients[-1] == pytest.approx(0.03)
        assert trainer.entropy_coef == pytest.approx(0.03)

    def test_the_entropy_coefficient_is_saved_before_the_checkpoint_counts_as_whole(self, make, monkeypatch, tmp_path):
        def killed(state, path):
            raise KeyboardInterrupt

        bounds = {"entropy_coef_min": 0.0, "entropy_coef_max": 0.03, "entropy_coef_delta": 0.01}
        args = {"use_adaptive_entropy": True, "entropy_target": 100.0, "save_strategy": "steps", "save_steps": 2}
        trainer = make({**args, **bounds, "max_steps": 2, "output_dir": str(tmp_path)})
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(TrainerState, "save_to_json", killed)
            trainer.train()
        (early,) = tmp_path.glob("checkpoint-2/entropy_ctrl_state.json")
        written = early.read_text()
        early.unlink()
        trainer._save_checkpoint(trainer.model, trial=None)
        assert early.read_text() == written
        assert json.loads(written)["entropy_coef"] == pytest.approx(0.02)

    def test_a_mixture_of_experts_is_balanced(self, make, tmp_path):
        torch.manual_seed(0)
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        shape = tiny_config().to_dict()
        shape = {name: shape[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "head_dim")}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **experts, num_attention_heads=4, eos_token_id=3))
        trainer = make(model=model, processing_class=tiny_tokenizer())
        before = parameters_of(trainer)
        trainer.train()
        assert moved(trainer, before) == set(before)
        assert all(loss > 0 for loss in logged(trainer, "aux_loss"))
        assert len(logged(trainer, "aux_loss")) == 2


class TestPrecisionAndMemory:
    def test_gradient_checkpointing_changes_no_parameter(self, make):
        runs = []
        for enabled in (False, True):
            trainer = make({"gradient_checkpointing": enabled, "optim": "sgd", "learning_rate": 0.1})
            trainer.train()
            runs.append(parameters_of(trainer))
        for name in runs[0]:
            torch.testing.assert_close(runs[0][name], runs[1][name])

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing_kwargs_are_taken(self, make, reentrant):
        args = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        trainer = make(args)
        before = parameters_of(trainer)
        trainer.train()
        assert moved(trainer, before) == set(before)

    def test_bf16_autocast_keeps_float32_parameters(self, make):
        trainer = make({"bf16": True})
        before = parameters_of(trainer)
        trainer.train()
        assert moved(trainer, before) == set(before)
        assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}

    def test_a_bf16_model_is_trained_with_a_float32_head(self, make):
        args = {"bf16": True, "cast_lm_head_to_fp32": True, "model_init_kwargs": {"dtype": "bfloat16"}}
        trainer = make(args)
        before = parameters_of(trainer)
        trainer.train()
        assert moved(trainer, before)
        assert trainer.model.lm_head.weight.dtype == torch.float32


LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


class TestPeft:
    @pytest.mark.parametrize("beta", [0.0, 0.1])
    def test_only_the_adapter_is_trained(self, make, beta):
        trainer = make({"beta": beta, "max_steps": 3}, peft_config=LORA)
        assert trainer.ref_model is None
        before = parameters_of(trainer)
        trainer.train()
        changed = moved(trainer, before)
        assert changed == {name for name in before if "lora_" in name}
        if beta:
            kl = logged(trainer, "kl")
            assert kl[0] == pytest.approx(0.0, abs=1e-6)
            assert kl[-1] > 0

    @pytest.mark.parametrize("beta", [0.0, 0.1])
    def test_training_goes_on_from_an_adapter(self, make, tiny_dir, beta):
        model = get_peft_model(load_tiny_model(tiny_dir), LORA)
        trainer = make({"beta": beta}, model=model)
        before = parameters_of(trainer)
        trainer.train()
        changed = moved(trainer, before)
        assert changed
        assert all("lora_" in name and ".ref." not in name for name in changed)

    def test_a_saved_adapter_gives_the_trained_policy(self, make, tiny_dir, tmp_path):
        trainer = make({"gradient_checkpointing": True}, peft_config=LORA)
        trainer.train()
        trainer.save_model(str(tmp_path / "adapter"))
        again = PeftModel.from_pretrained(load_tiny_model(tiny_dir), str(tmp_path / "adapter"))
        ids = torch.arange(20, 30)[None]
        trainer.model.eval()
        torch.testing.assert_close(again(ids).logits, trainer.model(ids).logits)

    def test_virtual_prompt_tokens_are_trained(self, make, tiny_dir):
        prompt_tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        model, tokenizer = load_tiny_model(tiny_dir), AutoTokenizer.from_pretrained(tiny_dir)
        trainer = make({"beta": 0.1}, model=model, processing_class=tokenizer, peft_config=prompt_tuning)
        before = parameters_of(trainer)
        trainer.train()
        assert [name for name in before if "prompt_encoder" in name] == list(moved(trainer, before))

    def test_an_adapter_on_the_head_is_refused(self, make):
        with pytest.raises(ValueError, match="lm_head"):
            make(peft_config=LoraConfig(r=2, target_modules=["lm_head"]))


class TestFilesAndCallbacks:
    def test_a_saved_model_is_a_plain_transformers_model(self, make, tmp_path):
        trainer = make()
        trainer.train()
        trainer.save_model(str(tmp_path / "saved"))
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert type(again) is Qwen3ForCausalLM
        for name, parameter in trainer.model.named_parameters():
            assert torch.equal(again.get_parameter(name), parameter)
        assert AutoTokenizer.from_pretrained(tmp_path / "saved").eos_token == "<|im_end|>"

    def test_a_run_resumed_from_a_checkpoint_ends_where_the_uninterrupted_one_does(self, make, tmp_path):
        args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "beta": 0.1}
        whole = make(args)
        whole.train()
        resumed = make({**args, "output_dir": str(tmp_path / "resumed")})
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert resumed.state.global_step == 4
        for name, parameter in whole.model.named_parameters():
            torch.testing.assert_close(resumed.model.get_parameter(name), parameter)

    def test_the_model_card_names_the_method_and_its_paper(self, make, tmp_path):
        trainer = make()
        trainer.create_model_card(model_name="my-agent")
        card = (tmp_path / "README.md").read_text()
        assert "2602.06554" in card
        assert "SeeUPO" in card
        assert "GRPO" not in card
        assert {"trl", "seeupo"} <= set(trainer.model.model_tags)

    def test_the_saved_arguments_are_those_of_the_run(self, make, tmp_path):
        trainer = make({"beta": 0.1, "update_order": "forward"})
        trainer.save_model(str(tmp_path / "saved"))
        saved = torch.load(tmp_path / "saved" / "training_args.bin", weights_only=False)
        assert (type(saved), saved.beta, saved.update_order) == (SeeUPOConfig, 0.1, "forward")

    def test_a_checkpoint_holds_the_model_card(self, make, tmp_path):
        make({"save_strategy": "steps", "save_steps": 1, "max_steps": 1}).train()
        assert "2602.06554" in (tmp_path / "README.md").read_text()
        assert json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())["global_step"] == 1

    def test_completions_are_written_with_rewards_and_advantages(self, make, tmp_path, capsys):
        make({"log_completions": True}, train_dataset=chat_dataset()).train()
        for step in (1, 2):
            table = pd.read_parquet(tmp_path / "completions" / f"completions_{step:05d}.parquet")
            assert {"step", "prompt", "completion", "small_tokens", "advantage"} <= set(table.columns)
            assert len(table) == 4
            assert (table["step"] == step).all()
            assert table["advantage"].abs().max() > 0
            for group in (table[:2], table[2:]):
                assert group["advantage"].sum() == pytest.approx(0.0, abs=1e-6)
                assert group.sort_values("small_tokens")["advantage"].is_monotonic_increasing

    def test_callbacks_see_every_iteration(self, make):
        events = []

        class Watch(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                events.append(("begin", state.global_step))

            def on_step_end(self, args, state, control, model, **kwargs):
                events.append(("end", state.global_step))

            def on_log(self, args, state, control, logs, **kwargs):
                if "reward" in logs:
                    events.append(("log", state.global_step))

        make(callbacks=[Watch()]).train()
        assert events == [("begin", 0), ("end", 1), ("log", 1), ("begin", 1), ("end", 2), ("log", 2)]

    def test_callbacks_see_every_optimizer_step(self, make):
        events = []

        class Watch(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, **kwargs):
                events.append("before")

            def on_optimizer_step(self, args, state, control, **kwargs):
                events.append("after")

        make({"max_steps": 1, "num_iterations": 3}, callbacks=[Watch()]).train()
        assert events == ["before", "after"] * 3

    def test_a_callback_can_end_the_run(self, make):
        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_training_stop = True

        trainer = make({"max_steps": 5}, callbacks=[Stop()])
        trainer.train()
        assert trainer.state.global_step == 1

    def test_the_metrics_grpo_users_watch_are_logged(self, make):
        trainer = make()
        trainer.train()
        expected = {
            *("loss", "grad_norm", "learning_rate", "num_tokens", "reward", "reward_std", "frac_reward_zero_std"),
            *("completions/mean_length", "completions/clipped_ratio", "rewards/small_tokens/mean", "entropy"),
            *("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "step_time"),
        }
        for entry in trainer.state.log_history[:2]:
            assert expected <= entry.keys()
            assert entry["grad_norm"] > 0
        assert "train_loss" in trainer.state.log_history[-1]

    def test_logging_less_often_averages(self, make):
        trainer = make({"logging_steps": 2, "max_steps": 4})
        trainer.train()
        assert len(logged(trainer, "reward")) == 2

    def test_a_second_run_goes_on_from_the_first(self, make):
        trainer = make()
        trainer.train()
        before = parameters_of(trainer)
        trainer.train()
        assert moved(trainer, before) == set(before)


# One token each: a call that works, the same with text for a number, one without arguments, one that names no tool,
# and one that is not JSON
CALL = '<tool_call> {"name": "increment", "arguments": {"step": 2}} </tool_call>'
TEXT_CALL = '<tool_call> {"name": "increment", "arguments": {"step": "w2"}} </tool_call>'
BARE_CALL = '<tool_call> {"name": "look", "arguments": {}} </tool_call>'
WRONG_NAME = '<tool_call> {"name": "decrement", "arguments": {"step": 2}} </tool_call>'
MALFORMED = "<tool_call> {increment </tool_call>"
CALLS = [CALL, TEXT_CALL, BARE_CALL, WRONG_NAME, MALFORMED]


@pytest.fixture(scope="session")
def tool_dir(tmp_path_factory) -> str:
    """A tiny model whose vocabulary has whole tool calls as single tokens, so that it makes calls at random."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in CALLS])
    tokenizer.response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor": "<|im_start|> assistant",
        "fields": {
            "tool_calls": {
                "open": "<tool_call>",
                "close_pattern": r"</tool_call>\s*",
                "repeats": True,
                "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
        },
    }
    directory = str(tmp_path_factory.mktemp("tools"))
    torch.manual_seed(0)
    Qwen3ForCausalLM(tiny_config(vocab_size=len(tokenizer), initializer_range=0.02)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def only(*texts):
    """Sampling settings under which the policy can say nothing but these tokens and the end of its turn."""
    vocabulary = [*VOCABULARY, *CALLS]
    allowed = {*texts, "<|im_end|>"}
    return {"suppress_tokens": [index for index, token in enumerate(vocabulary) if token not in allowed]}


def increment(step: int) -> int:
    """
    Adds to a counter.

    Args:
        step: What to add.

    Returns:
        What was added.
    """
    return step


def look() -> str:
    """Looks around."""
    return "w1"


async def increment_later(step: int) -> int:
    """
    Adds to a counter.

    Args:
        step: What to add.

    Returns:
        What was added.
    """
    return step


increment_later.__name__ = "increment"


class Counter:
    """An environment of TRL: public methods are tools, and it owns its reward."""

    def reset(self, start=0, **kwargs):
        self.value = start
        return f"w{start}"

    def increment(self, step: int) -> int:
        """
        Adds to the counter.

        Args:
            step: What to add.

        Returns:
            The counter.
        """
        self.value += step
        return self.value

    def get_reward(self) -> float:
        return float(self.value)


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

    def test_a_tool_result_that_does_not_fit_ends_the_episode(self, make_agent):
        trainer = make_agent({"max_completion_length": 6, "generation_kwargs": only(CALL)}, tools=[increment])
        before = parameters_of(trainer)
        trainer.train()
        assert moved(trainer, before) == set(before)
        assert max(logged(trainer, "completions/max_length")) <= 6

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


def test_trainer_and_config_take_whatever_grpo_takes():
    ours = inspect.signature(SeeUPOTrainer.__init__).parameters
    theirs = inspect.signature(trl.GRPOTrainer.__init__).parameters
    assert list(ours) == list(theirs)
    assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]
    assert set(GRPOConfig.__dataclass_fields__) <= set(SeeUPOConfig.__dataclass_fields__)
