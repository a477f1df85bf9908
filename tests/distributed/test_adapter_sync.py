"""What vLLM is sent of a policy with adapters: merged weights, the base left as it is, bit for bit."""

import hashlib
import warnings
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import load_tiny_model
from torch import nn
from trl.generation.vllm_generation import VLLMGeneration

from seeupo_trl.distributed.adapter_sync import merged_parameters


TARGETS = ["q_proj", "v_proj", "down_proj"]
SYNCS = 5


def backend_of(model) -> VLLMGeneration:
    """TRL's backend as far as it reads parameters: there is no engine here to send them to."""
    vllm = VLLMGeneration.__new__(VLLMGeneration)
    vllm.model = model
    vllm._dist = SimpleNamespace(gather_params=lambda parameters: warnings.catch_warnings(), is_fsdp=False)
    return vllm


def adapted(directory, dtype, **options):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM", **options)
    model = get_peft_model(load_tiny_model(directory, dtype), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=1e-3)
    return model


def digest(model) -> str:
    sha = hashlib.sha256()
    for name, parameter in model.named_parameters():
        sha.update(name.encode())
        sha.update(parameter.detach().contiguous().view(torch.uint8).numpy())
    return sha.hexdigest()


def sync(model) -> dict[str, torch.Tensor]:
    vllm = backend_of(model)
    return {name: tensor.clone() for name, tensor in merged_parameters(vllm, vllm._iter_named_params)}


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_the_base_is_the_same_bit_for_bit_after_syncs(dtype, options, tiny_dir):
    model = adapted(tiny_dir, dtype, **options)
    before, parameters = digest(model), dict(model.named_parameters())
    ids = torch.arange(5, 12)[None]
    with torch.no_grad():
        logits = model(ids).logits
        for _ in range(SYNCS):
            sync(model)
        assert torch.equal(model(ids).logits, logits)
    assert digest(model) == before
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())  # the optimizer's


def test_merging_in_place_as_trl_does_moves_the_base(tiny_dir):
    """The reason why it is not done here; should it ever fail, this module is no longer needed."""
    model = adapted(tiny_dir, torch.bfloat16)
    before = digest(model)
    for _ in range(SYNCS):
        list(backend_of(model)._iter_named_params())
    assert digest(model) != before


def test_what_is_sent_is_what_trl_sends(tiny_dir):
    model = adapted(tiny_dir, torch.float32)
    sent = sync(model)
    expected = {name: tensor.clone() for name, tensor in backend_of(model)._iter_named_params()}
    assert list(sent) == list(expected)
    assert all(torch.equal(sent[name], tensor) for name, tensor in expected.items())
    base = load_tiny_model(tiny_dir)
    with torch.no_grad():
        merged = base.load_state_dict(sent)
        assert not merged.missing_keys and not merged.unexpected_keys
        ids = torch.arange(5, 12)[None]
        torch.testing.assert_close(base(ids).logits, model(ids).logits, atol=1e-5, rtol=0)


def test_a_kept_tensor_is_not_written_by_the_next(tiny_dir):
    """A server's client may hold several tensors before it sends them."""
    model = adapted(tiny_dir, torch.float32)
    vllm = backend_of(model)
    held = list(merged_parameters(vllm, vllm._iter_named_params))
    sent = sync(model)
    assert all(torch.equal(tensor, sent[name]) for name, tensor in held)


def test_a_weight_that_is_left_out_is_an_error(tiny_dir):
    model = adapted(tiny_dir, torch.float32)
    vllm = backend_of(model)
    with pytest.raises(RuntimeError, match="left out .*down_proj"):
        list(merged_parameters(vllm, lambda: (pair for pair in vllm._iter_named_params() if "down" not in pair[0])))
