"""Rollouts on a card: kept keys and values, what the allocator keeps, and vLLM where it is installed."""

import hashlib

import pytest
import torch
from cards import EVERYWHERE, arguments_for, on_a_card
from count_down import CountDown
from datasets import Dataset
from peft import LoraConfig
from tiny import ON_CPU, load_tiny_model, save_tiny_model, tiny_tokenizer
from transformers import TrainerCallback

from seeupo_trl import SeeUPOConfig, SeeUPOTrainer
from seeupo_trl.rollout.cached_generation import CachedGeneration


WIDE = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "head_dim": 64}
LONG = {"max_position_embeddings": 8192}


def make_trainer(
    directory, tmp_path, environment=None, peft_config=None, callbacks=None, dtype=torch.float32, turns=3, **options
):
    settings = {**ON_CPU, **arguments_for("cuda"), "num_generations": 4, "per_device_train_batch_size": 8}
    settings |= {"max_steps": 3, "max_completion_length": 24, "disable_tqdm": True, "output_dir": str(tmp_path)}
    chat = [[{"role": "user", "content": f"w{i}"}] for i in range(6)]
    return SeeUPOTrainer(
        model=load_tiny_model(directory, dtype),
        reward_funcs=lambda completion_ids, **kwargs: [float(sum(ids) % 7) for ids in completion_ids],
        args=SeeUPOConfig(**{**settings, **options}),
        train_dataset=Dataset.from_dict({"prompt": chat, "turns": [turns] * len(chat)}),
        processing_class=tiny_tokenizer(),
        environment_factory=environment,
        peft_config=peft_config,
        callbacks=callbacks,
    )


@pytest.mark.parametrize("device", EVERYWHERE)
def test_greedy_tokens_with_kept_keys_and_values_are_those_of_encoding_anew(device, tmp_path):
    directory = save_tiny_model(tmp_path / "model", **(WIDE if device == "cuda" else {}), **LONG)
    trainer = make_trainer(directory, tmp_path, generation_kwargs={"do_sample": False}, **arguments_for(device))
    generation = CachedGeneration(trainer)
    contexts = [[5 + i % 50 for i in range(n)] for n in (700, 300, 650)]
    for _ in range(3):
        kept = generation.generate(list(range(3)), contexts)
        anew, _ = trainer._generate_single_turn(contexts, None, {}, 1)
        assert [list(ids) for ids in kept] == [list(ids) for ids in anew]
        contexts = [context + list(ids) + [9] * 40 for context, ids in zip(contexts, kept, strict=True)]


class Reserved(TrainerCallback):
    """What the allocator keeps beside what is in use, as a share of the card."""

    def __init__(self):
        self.shares = []

    def on_step_end(self, *args, **kwargs):
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        self.shares.append(kept / torch.cuda.get_device_properties(0).total_memory)


@on_a_card
def test_the_allocator_keeps_little_after_ten_turns(tmp_path):
    directory = save_tiny_model(tmp_path / "model", **WIDE, **LONG)
    reserved = Reserved()
    make_trainer(directory, tmp_path, environment=CountDown, callbacks=[reserved], turns=10, bf16=True).train()
    assert max(reserved.shares) < 0.2


def digest_of_base(model) -> str:
    sha = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            sha.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return sha.hexdigest()


@on_a_card
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_colocated_vllm_samples_from_the_policy(lora, tmp_path):
    pytest.importorskip("vllm")
    directory = save_tiny_model(tmp_path / "model", **WIDE, **LONG)
    trainer = make_trainer(
        directory,
        tmp_path,
        environment=CountDown,
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
        dtype=torch.bfloat16,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=0.2,
        vllm_enable_sleep_mode=True,
        vllm_max_model_length=2048,
        vllm_importance_sampling_mode="token_truncate",
        max_steps=5,
        bf16=True,
        logging_steps=1,
    )
    base = digest_of_base(trainer.model)
    syncs = []
    sync = trainer.vllm_generation.sync_weights
    trainer.vllm_generation.sync_weights = lambda: (syncs.append(trainer.state.global_step), sync())[1]
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "sampling/sampling_logp_difference/mean" in entry]
    assert len(logs) == 5
    assert all(entry["sampling/sampling_logp_difference/mean"] < 0.03 for entry in (logs[0], logs[2]))
    masked = [value for entry in logs for name, value in entry.items() if name.startswith("sampling/masked_")]
    assert masked and max(masked) < 0.05
    assert sorted(set(syncs)) == syncs  # one an iteration
    assert not lora or digest_of_base(trainer.model) == base
