"""Datasets and evaluation of a script for TRL's `GRPOTrainer` go on working."""

import math
from contextlib import nullcontext

import pytest
import torch
from datasets import IterableDataset
from grpo_script import PROMPTS, logged, moved, parameters_of, small_tokens, text_dataset
from transformers import EarlyStoppingCallback

from seeupo_trl import SeeUPOTrainer


class TestEvaluation:
    def test_evaluate_reports_rewards_and_leaves_the_model_alone(self, make):
        trainer = make(eval_dataset=text_dataset())
        before = parameters_of(trainer)
        metrics = trainer.evaluate()
        assert {"eval_loss", "eval_reward", "eval_rewards/small_tokens/mean", "eval_entropy"} <= metrics.keys()
        assert metrics["eval_reward"] < 0
        assert not moved(trainer, before)

    @pytest.mark.parametrize("end", [nullcontext(), pytest.raises(ValueError)], ids=["whole", "failed"])
    def test_an_evaluation_in_16_bits_gives_the_weights_back(self, end, make):
        dtypes = set()

        def reward(completion_ids, **kwargs):
            dtypes.update(p.dtype for p in trainer.model.parameters())
            return small_tokens(completion_ids) if isinstance(end, nullcontext) else [math.inf] * len(completion_ids)

        def weights():
            buffers = dict(trainer.model.named_buffers())
            return {name: value.clone() for name, value in {**trainer.model.state_dict(), **buffers}.items()}

        trainer = make({"bf16_full_eval": True}, reward_funcs=reward, eval_dataset=text_dataset())
        before = weights()
        with end:
            trainer.evaluate()
        assert dtypes == {torch.bfloat16}
        after = weights()
        assert all(after[name].dtype == torch.float32 and torch.equal(after[name], before[name]) for name in before)

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

    @pytest.mark.parametrize(
        ("args", "eval_dataset"),
        [
            ({"load_best_model_at_end": True}, text_dataset()),
            ({"save_strategy": "best", "metric_for_best_model": "loss"}, text_dataset()),
            ({"lr_scheduler_type": "reduce_lr_on_plateau"}, text_dataset()),
            ({"lr_scheduler_type": "greedy"}, text_dataset()),
            (
                {"load_best_model_at_end": True, "metric_for_best_model": "easy_loss"},
                {"easy": text_dataset(), "hard": text_dataset()},
            ),
        ],
    )
    def test_a_loss_that_is_the_same_for_all_models_chooses_none(self, args, eval_dataset, make):
        steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
        with pytest.raises(ValueError, match="metric_for_best_model.*eval_reward"):
            make(steps | args, eval_dataset=eval_dataset)

    def test_it_ends_no_run_early(self, make):
        args = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_loss"}
        with pytest.raises(ValueError, match="metric_for_best_model.*eval_reward"):
            make(args, eval_dataset=text_dataset(), callbacks=[EarlyStoppingCallback()])

    @pytest.mark.parametrize(
        "args",
        [
            {"load_best_model_at_end": True, "eval_strategy": "no", "save_strategy": "no"},
            {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_loss"},
        ],
        ids=["no evaluation", "a record only"],
    )
    def test_it_may_be_named_where_it_decides_nothing(self, args, make):
        trainer = make(args, eval_dataset=text_dataset())
        trainer.train()
        assert trainer.state.global_step == 2

    def test_a_subclass_may_judge_by_a_loss_of_its_own(self, make_of):
        losses = iter([3.0, 1.0])

        class Judging(SeeUPOTrainer):
            def evaluate(self, *args, **kwargs):
                return super().evaluate(*args, **kwargs) | {"eval_loss": next(losses)}

        steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
        with pytest.warns(UserWarning, match="metric_for_best_model.*eval_reward"):
            trainer = make_of(Judging, steps | {"load_best_model_at_end": True}, eval_dataset=text_dataset())
        trainer.train()
        assert trainer.state.best_metric == 1.0

    def test_a_schedule_follows_the_reward_as_the_error_says(self, make):
        args = {"eval_strategy": "steps", "eval_steps": 1, "lr_scheduler_type": "reduce_lr_on_plateau", "max_steps": 3}
        args |= {"metric_for_best_model": "eval_reward", "lr_scheduler_kwargs": {"mode": "max", "patience": 0}}
        trainer = make(args, eval_dataset=text_dataset())
        trainer.train()
        rewards, rates = logged(trainer, "eval_reward"), logged(trainer, "learning_rate")
        assert (rates[2] < rates[1]) == (rewards[1] <= rewards[0])


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
            make(train_dataset=text_dataset().select(range(1))).train()
