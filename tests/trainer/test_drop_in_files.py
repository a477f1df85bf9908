"""Files, callbacks and logs of a script for TRL's `GRPOTrainer` go on working."""

import json

import pandas as pd
import pytest
import torch
from grpo_script import chat_dataset, logged, moved, parameters_of
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM, TrainerCallback

from seeupo_trl import SeeUPOConfig


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
