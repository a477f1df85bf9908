"""Training on a card ends where the oracle ends, moves what it should, and resumes."""

import signal
import sys
import warnings

import pytest
import torch
from against_oracle import load_model, oracle_on_ragged, parameters_of, relative_error, train
from cards import EVERYWHERE, arguments_for, on_a_card
from fixed_rollouts import NUM_TRAJECTORIES, ragged_rollouts
from launching import HELPERS, run_command
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import load_tiny_model, save_tiny_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


WHOLE_BATCH = {"per_device_train_batch_size": NUM_TRAJECTORIES, "gradient_accumulation_steps": 1}


@pytest.fixture(params=EVERYWHERE)
def device(request):
    return request.param


def movement(after, before) -> torch.Tensor:
    """The way that all parameters went, in float64 on the CPU."""
    return torch.cat([(after[name].cpu().double() - before[name].cpu().double()).flatten() for name in before])


@pytest.mark.parametrize("packing", ["rows", "tree"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_float32_ends_where_the_oracle_ends(packing, lora, checkpointing, device, tiny_dir, tmp_path):
    model = load_model(tiny_dir, torch.float32, lora=lora)
    start = parameters_of(model)
    options = {"gradient_checkpointing": checkpointing, "packing": packing, **arguments_for(device)}
    trained = train(model, ragged_rollouts(), tmp_path, **WHOLE_BATCH, **options)[-1]
    trained = {name: value.cpu() for name, value in trained.items()}
    assert relative_error(trained, oracle_on_ragged(tiny_dir, lora=lora), start) < 1e-3


@pytest.mark.parametrize("packing", ["rows", "tree"])
def test_bfloat16_goes_where_the_oracle_goes(packing, device, tiny_dir, tmp_path):
    """bfloat16 autocast over float32 weights, one iteration: the same way, up to rounding."""
    model = load_model(tiny_dir, torch.float32)
    start = parameters_of(model)
    options = {"bf16": True, "packing": packing, **arguments_for(device)}
    trained = train(model, ragged_rollouts(), tmp_path, **WHOLE_BATCH, **options)[-1]
    ways = movement(trained, start), movement(oracle_on_ragged(tiny_dir), start)
    assert torch.cosine_similarity(*ways, dim=0) > 0.97
    assert 0.9 < ways[0].norm() / ways[1].norm() < 1.1


def test_most_entries_move_at_a_small_learning_rate(device, tiny_dir, tmp_path):
    """Ten iterations of AdamW at 1e-6, as the recipes train: float32 weights or adapters under bfloat16."""
    model = load_tiny_model(tiny_dir)
    start = parameters_of(model)
    options = {"bf16": True, **arguments_for(device), **WHOLE_BATCH}
    adam = {"optimizer": torch.optim.AdamW, "optimizer_kwargs": {"lr": 1e-6}}
    trained = train(model, ragged_rollouts()[:1], tmp_path, **adam, **options)[-1]
    assert (movement(trained, start) != 0).double().mean() > 0.5


@on_a_card
def test_four_bits_with_lora_train_the_adapter_alone(tmp_path):
    pytest.importorskip("bitsandbytes")
    directory = save_tiny_model(tmp_path / "model", hidden_size=64, intermediate_size=128, head_dim=16)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    ways = {}
    for packing in ("rows", "tree"):
        model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=quantization, dtype=torch.bfloat16)
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
        before = parameters_of(model)
        options = {"bf16": True, "packing": packing, **arguments_for("cuda"), **WHOLE_BATCH}
        after = train(model, ragged_rollouts()[:1], tmp_path / packing, **options)[-1]
        moved = {name for name in before if not torch.equal(before[name].cpu(), after[name].cpu())}
        assert moved and all("lora_" in name for name in moved)
        ways[packing] = movement({n: after[n] for n in moved}, {n: before[n] for n in moved})
    assert torch.cosine_similarity(*ways.values(), dim=0) > 0.98


@on_a_card
def test_a_killed_run_resumes_bit_for_bit_under_full_determinism(tmp_path):
    model = save_tiny_model(tmp_path / "model")

    def run(output, *options):
        command = [sys.executable, str(HELPERS / "killable_run.py"), model, str(output), "--cuda", *options]
        process = run_command(command)
        assert process.returncode in (0, -signal.SIGKILL), process.stderr[-3000:]
        return process.returncode

    assert run(tmp_path / "whole") == 0
    assert run(tmp_path / "killed", "--kill", "4", "inside") == -signal.SIGKILL
    assert run(tmp_path / "killed", "--resume") == 0
    whole, resumed = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_nothing_is_said_about_a_run_that_keeps_its_promises(device, tiny_dir, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(float32 copy|Trees cannot be used).*")
        train(
            load_model(tiny_dir, torch.float32),
            ragged_rollouts()[:1],
            tmp_path,
            bf16=True,
            packing="tree",
            **arguments_for(device),
        )
