"""A run that cannot do what its options promise in its precision says so at its start."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from tiny import ON_CPU, load_tiny_model, tiny_tokenizer

from seeupo_trl import SeeUPOConfig, SeeUPOTrainer
from seeupo_trl.distributed.precision import check_precision


def make(directory, tmp_path, dtype=torch.float32, peft_config=None, **options):
    options = {**ON_CPU, "max_steps": 1, "num_generations": 2, "per_device_train_batch_size": 2, **options}
    return SeeUPOTrainer(
        model=load_tiny_model(directory, dtype),
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
        args=SeeUPOConfig(output_dir=str(tmp_path), **options),
        train_dataset=Dataset.from_dict({"prompt": ["w1"] * 4}),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
    )


def said(trainer) -> list[str]:
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        check_precision(trainer)
    return [str(warning.message) for warning in record]


LORA = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, None),
        ({"bf16": True}, None),
        ({"dtype": torch.bfloat16}, "nothing keeps a float32 copy"),
        ({"dtype": torch.bfloat16, "bf16": True}, "nothing keeps a float32 copy"),
        ({"dtype": torch.bfloat16, "bf16": True, "peft_config": LORA}, None),
        ({"bf16": True, "turn_ratio": "product"}, "`turn_ratio='product'` multiplies"),
        ({"bf16": True, "surrogate_ratio": "product"}, "`surrogate_ratio='product'` multiplies"),
        ({"turn_ratio": "product"}, None),
        ({"bf16": True, "loss_type": "vespo"}, "`loss_type='vespo'` multiplies"),
    ],
)
def test_what_does_not_go_with_the_precision_is_said(options, message, tiny_dir, tmp_path):
    messages = said(make(tiny_dir, tmp_path, **options))
    assert len(messages) == (message is not None)
    assert message is None or message in messages[0]


def test_it_is_said_when_the_trainer_is_made(tiny_dir, tmp_path):
    with pytest.warns(UserWarning, match="nothing keeps a float32 copy"):
        make(tiny_dir, tmp_path, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("distributed_type", "mixed_precision", "keeps"),
    [
        (DistributedType.DEEPSPEED, "bf16", True),
        (DistributedType.FSDP, "bf16", True),
        (DistributedType.FSDP, "no", False),
        (DistributedType.MULTI_GPU, "bf16", False),
    ],
)
def test_deepspeed_and_fsdp_keep_float32_weights(distributed_type, mixed_precision, keeps, tiny_dir, tmp_path):
    trainer = make(tiny_dir, tmp_path, dtype=torch.bfloat16)
    launched = SimpleNamespace(distributed_type=distributed_type, mixed_precision=mixed_precision)
    seen = SimpleNamespace(args=trainer.args, model=trainer.model, accelerator=launched)
    assert bool(said(seen)) != keeps


def test_steps_of_bfloat16_weights_are_lost(tiny_dir):
    """The numbers behind the warning: entries that ten steps of AdamW move."""
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        weight = torch.nn.Parameter((torch.randn(300, 300) * 0.02).to(dtype))
        before = weight.detach().clone()
        optimizer = torch.optim.AdamW([weight], lr=1e-6, weight_decay=0.0)
        for _ in range(10):
            weight.grad = torch.randn(300, 300).to(dtype)
            optimizer.step()
        moved[dtype] = (weight.detach() != before).float().mean().item()
    assert moved[torch.float32] > 0.9 and moved[torch.bfloat16] < 0.1


def test_samplers_and_adapters_in_16_bits_are_said(tiny_dir, tmp_path):
    trainer = make(tiny_dir, tmp_path, peft_config=LORA)
    config = {**vars(trainer.args), "use_vllm": True}
    seen = SimpleNamespace(model=trainer.model, accelerator=trainer.accelerator)
    for length, mode, expected in (
        (4000, "sequence_mask", 2),
        (4000, "token_truncate", 1),
        (500, "sequence_mask", 1),
    ):
        seen.args = SimpleNamespace(**config | {"max_completion_length": length})
        seen.args.vllm_importance_sampling_mode = mode
        messages = said(seen)
        assert len(messages) == expected and "rounded to its own dtype" in messages[0]
        assert expected == 1 or "Use 'token_truncate'" in messages[1]
