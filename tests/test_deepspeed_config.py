"""What a DeepSpeed configuration may hold, checked before a model is loaded."""

import pytest

from seeupo_trl import SeeUPOConfig, SeeUPOTrainer


pytest.importorskip("deepspeed")


@pytest.fixture
def no_deepspeed_afterwards(monkeypatch):
    """The Trainer's arguments announce a DeepSpeed configuration to everything that loads a model later."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    yield
    unset_hf_deepspeed_config()


def test_scheduler_that_would_step_at_every_turn_is_refused(tiny_dir, tmp_path, no_deepspeed_afterwards):
    config = {
        "zero_optimization": {"stage": 2},
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
    }
    args = SeeUPOConfig(
        output_dir=str(tmp_path), deepspeed=config, use_cpu=True, bf16=False, max_steps=1, num_generations=2
    )
    with pytest.raises(ValueError, match="`scheduler` section.*`lr_scheduler_type`"):
        SeeUPOTrainer(model=tiny_dir, reward_funcs=lambda completions, **kwargs: [0.0], args=args)
