"""What a DeepSpeed configuration may hold, checked before a model is loaded."""

import json

import pytest

from seeupo_trl import SeeUPOConfig, SeeUPOTrainer
from seeupo_trl.distributed.backends import check_deepspeed


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


BATCH = {"train_batch_size": 12, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 6}


def launched_with(path, monkeypatch, **values) -> dict:
    """The launcher's DeepSpeed configuration, checked against arguments that say `BATCH`."""
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, **values}))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
    args = SeeUPOConfig(
        output_dir=str(path.parent),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=6,
        use_cpu=True,
        bf16=False,
        max_steps=1,
        num_generations=2,
    )
    check_deepspeed(args)
    return args.deepspeed_plugin.deepspeed_config


@pytest.mark.parametrize("values", [BATCH, {**BATCH, "gradient_accumulation_steps": 1}, dict.fromkeys(BATCH, "auto")])
def test_batch_sizes_of_the_launcher_that_agree_with_the_arguments_are_taken(
    values, tmp_path, monkeypatch, no_deepspeed_afterwards
):
    config = launched_with(tmp_path / "deepspeed.json", monkeypatch, **values)
    assert {name: config[name] for name in BATCH} == dict.fromkeys(BATCH, "auto")


@pytest.mark.parametrize("name", BATCH)
def test_batch_sizes_of_the_launcher_that_disagree_with_the_arguments_are_refused(
    name, tmp_path, monkeypatch, no_deepspeed_afterwards
):
    with pytest.raises(ValueError, match=f"`{name}=5`.*training arguments say {BATCH[name]}"):
        launched_with(tmp_path / "deepspeed.json", monkeypatch, **{**BATCH, name: 5})
