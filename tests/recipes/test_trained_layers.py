"""A model of which only the last layers are trained: what changes, and what does not."""

from importlib.resources import files

import pytest
import torch
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM

from seeupo_trl.recipes.warm_up import train_last_layers, warm_up


CONVERSATION = [
    {"role": "user", "content": "a b"},
    {"role": "assistant", "content": "b a"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "a"},
]


def test_the_warm_up_changes_the_last_layers_alone(tmp_path):
    start = save_tiny_model(tmp_path / "start", num_hidden_layers=3)
    template = files("trl").joinpath("chat_templates/qwen3_instruct_2507.jinja").read_text()
    (tmp_path / "start" / "chat_template.jinja").write_text(template)
    warm_up(start, tmp_path / "end", [(CONVERSATION, None)] * 2, steps=2, learning_rate=1e-2, trained_layers=1)
    before = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "end", dtype=torch.float32).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith(("model.layers.2.", "model.norm.")) for name in changed)
    assert any("mlp" in name for name in changed) and any("self_attn" in name for name in changed)


@pytest.mark.parametrize("count", [0, 4])
def test_a_number_that_the_model_does_not_have_is_refused(tmp_path, count):
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "start", num_hidden_layers=3))
    with pytest.raises(ValueError, match=f"trained_layers is {count}; this model has 3 layers"):
        train_last_layers(model, count)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_gradient_checkpointing_over_layers_that_are_not_trained_is_said(tmp_path, caplog):
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "start", num_hidden_layers=3))
    train_last_layers(model, 1)
    assert not caplog.records
    model.gradient_checkpointing_enable()
    train_last_layers(model, 1)
    assert "Set gradient_checkpointing to false" in caplog.text
