"""A script written for TRL's `GRPOTrainer` goes on working when the two class names are swapped."""

import inspect

import pytest
import torch
import trl
from grpo_script import PROMPTS, config, logged, moved, parameters_of, settings, small_tokens, text_dataset
from tiny import load_tiny_model
from transformers import AutoTokenizer
from trl import GRPOConfig, TrlParser

from seeupo_trl import SeeUPOConfig, SeeUPOTrainer


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


def test_trainer_and_config_take_whatever_grpo_takes():
    ours = inspect.signature(SeeUPOTrainer.__init__).parameters
    theirs = inspect.signature(trl.GRPOTrainer.__init__).parameters
    assert list(ours) == list(theirs)
    assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]
    assert set(GRPOConfig.__dataclass_fields__) <= set(SeeUPOConfig.__dataclass_fields__)
