"""Generation, regularisation, precision and adapters of a script for TRL's `GRPOTrainer` go on working."""

import json

import pytest
import torch
from grpo_script import chat_dataset, logged, moved, parameters_of, small_tokens
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tiny import load_tiny_model, tiny_config, tiny_tokenizer
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM, TrainerCallback, TrainerState


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
        args = {"router_aux_loss_coef": 0.5, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        trainer = make(args, model=model, processing_class=tiny_tokenizer())
        before = parameters_of(trainer)
        trainer.train()
        assert moved(trainer, before) == set(before)
        balance = logged(trainer, "aux_loss")
        assert all(loss > 0 for loss in balance)
        assert len(balance) == 2
        # as in GRPO, the loss holds it; what is left is 0 at a ratio of 1
        for name in ("loss", "turn_1/loss"):
            assert logged(trainer, name) == pytest.approx([0.5 * loss for loss in balance], abs=1e-4)


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
