"""The check of the first tree: what it finds, and that it leaves a model as it was and keeps within the budget."""

import warnings

import pytest
import torch
from against_oracle import TOLERANCE, load_model, parameters_of, relative_error, train
from fixed_rollouts import NUM_TRAJECTORIES, make_iteration, ragged_rollouts, rewrite_contexts
from peft import LoraConfig, get_peft_model
from tiny import save_tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from seeupo_trl.scoring import tree_check, trees
from seeupo_trl.scoring.deterministic import without_noise
from seeupo_trl.scoring.tree_attention import BRANCHES, FLEX
from seeupo_trl.scoring.tree_check import logps_tolerance, reason_against_attention
from seeupo_trl.scoring.trees import TreeScorer


LONGEST = 60  # tokens of any trajectory, all its turns together


class PackedForInference(nn.Linear):
    """Packs its weight for good at the first forward pass outside training, as quantized layers may."""

    is_packed = False

    def forward(self, inputs):
        self.is_packed |= not self.training
        return super().forward(inputs.detach() if self.is_packed else inputs)


def test_layers_that_repack_outside_training_keep_their_gradients(tiny_dir, tmp_path):
    model = load_model(tiny_dir, torch.float32)
    for layer in model.model.layers:
        layer.mlp.up_proj.__class__ = PackedForInference
    train(model, ragged_rollouts()[:1], tmp_path, packing="tree")
    assert not any(layer.mlp.up_proj.is_packed for layer in model.model.layers)


def test_dropout_does_not_make_trees_and_rows_disagree(tiny_dir, tmp_path):
    model = load_model(tiny_dir)
    config = LoraConfig(r=4, lora_dropout=0.5, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(model, config, autocast_adapter_dtype=False).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    for layer in model.base_model.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Trees cannot be used for this model")
        train(model, ragged_rollouts()[:1], tmp_path, packing="tree")


def test_noise_is_back_afterwards_and_the_mode_untouched(tiny_dir):
    model = load_model(tiny_dir, torch.float32).train()
    model.config.attention_dropout = 0.25
    model.dropout = nn.Dropout(0.5)
    ids = torch.arange(6)[None]
    with pytest.raises(KeyError), without_noise(model):
        assert model.training
        assert (model.config.attention_dropout, model.dropout.p) == (0.0, 0.0)
        assert torch.equal(model(ids).logits, model(ids).logits)
        raise KeyError
    assert (model.config.attention_dropout, model.dropout.p) == (0.25, 0.5)


@pytest.mark.parametrize("budget", [LONGEST, 90])
@pytest.mark.parametrize("rewrites", [False, True])
def test_no_pass_of_the_check_is_over_the_budget(rewrites, budget, tiny_dir, tmp_path, monkeypatch):
    batches, check, score = [], TreeScorer.check, TreeScorer.score

    def checked(self, *args):
        monkeypatch.setattr(TreeScorer, "score", lambda *a: (batches.append(a[2]), score(*a))[1])
        check(self, *args)
        monkeypatch.setattr(TreeScorer, "score", score)

    monkeypatch.setattr(TreeScorer, "check", checked)
    iterations = [make_iteration(1, [4] * NUM_TRAJECTORIES)]
    turns = [rewrite_contexts(iterations[0], 0)] if rewrites else None
    config = {"packing": "tree", "max_tokens_per_microbatch": budget}
    train(load_model(tiny_dir), iterations, tmp_path, turns=turns, **config)
    assert len(batches) >= 2  # a tree, and its rows
    assert max(batch.num_tokens for batch in batches) <= budget


def test_quantized_weights_of_bitsandbytes_are_not_packed_by_the_check(tmp_path):
    pytest.importorskip("bitsandbytes")
    directory = save_tiny_model(tmp_path / "model", hidden_size=64, intermediate_size=128, head_dim=16)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    norms = {}
    for packing in ("rows", "tree"):
        model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=quantization, dtype=torch.float32)
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        config = {"per_device_train_batch_size": NUM_TRAJECTORIES, "gradient_accumulation_steps": 1}
        after = train(model, ragged_rollouts()[:1], tmp_path / packing, packing=packing, **config)[-1]
        norms[packing] = {name: after[name] - before[name] for name in before}
    flat = [torch.cat([change.flatten() for change in changes.values()]) for changes in norms.values()]
    assert flat[0].norm() > 0
    assert torch.cosine_similarity(*flat, dim=0) > 0.98


def test_an_iteration_asks_once_whether_it_has_a_branching_tree(tiny_dir, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(TreeScorer, "_branching_sample", lambda self, buffer, keys: asked.append(buffer) or [])
    train(load_model(tiny_dir), ragged_rollouts()[:2], tmp_path, packing="tree", beta=0.1)
    # of the policy and of the reference, in each of two iterations
    assert len(asked) == 4 and len(set(map(id, asked))) == 2


# --- What it finds ---------------------------------------------------------------------------------------------------


@pytest.fixture
def kernel_without_backward(monkeypatch):
    """`flex_attention` on a CPU, which PyTorch compiles for forward passes only."""
    monkeypatch.setattr(trees, "tree_implementation", lambda model, device: FLEX)


def test_a_backward_pass_that_fails_ends_in_rows(kernel_without_backward, tiny_dir, tmp_path, oracle_on_ragged):
    model = load_model(tiny_dir)
    start = parameters_of(model)
    with pytest.warns(UserWarning, match="Trees cannot be used for this model: its attention on a tree fails"):
        trained = train(model, ragged_rollouts(), tmp_path, packing="tree")[-1]
    assert relative_error(trained, oracle_on_ragged(), start) < TOLERANCE[torch.float64]


def test_rows_after_trees_keep_within_the_budget_or_are_refused(tiny_dir, tmp_path, monkeypatch):
    """Two turns with rewritten contexts share a tree, but not a row."""
    iterations = [make_iteration(1, [4] * NUM_TRAJECTORIES)]
    settings = {
        "turns": [rewrite_contexts(iterations[0], 0)],
        "packing": "tree",
        "max_tokens_per_microbatch": LONGEST,
    }
    train(load_model(tiny_dir), iterations, tmp_path, **settings)
    monkeypatch.setattr(trees, "reason_against_attention", lambda *args: "its attention does not compile")
    model = load_model(tiny_dir)
    start = parameters_of(model)
    with pytest.warns(UserWarning, match="Trees cannot be used"), pytest.raises(ValueError, match="Raise it to at"):
        train(model, iterations, tmp_path, **settings)
    assert all(torch.equal(start[name], value) for name, value in parameters_of(model).items())


def test_wrong_gradients_are_found_where_the_output_is_right(tiny_dir, monkeypatch):
    model = load_model(tiny_dir, torch.float32)
    cpu = torch.device("cpu")
    assert reason_against_attention(model, BRANCHES, torch.float32, cpu) is None
    assert reason_against_attention(model, BRANCHES, torch.bfloat16, cpu) is None
    attend = tree_check.AttentionInterface()[BRANCHES]

    def doubled_gradient(module, query, key, value, mask, **kwargs):
        value = 2 * value - value.detach()
        return attend(module, query, key, value, mask, **kwargs)

    monkeypatch.setattr(tree_check, "AttentionInterface", lambda: {BRANCHES: doubled_gradient})
    assert "is off by" in reason_against_attention(model, BRANCHES, torch.float32, cpu)


def test_the_tolerance_is_that_of_the_precision(monkeypatch):
    cpu = torch.device("cpu")
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    tolerances = [logps_tolerance(dtype, cpu) for dtype in dtypes]
    assert tolerances == sorted(set(tolerances))
    # TensorFloat-32 has the digits of float16
    monkeypatch.setattr(tree_check, "rounds_float32", lambda device: True)
    assert logps_tolerance(torch.float32, cpu) == tolerances[2]
    assert logps_tolerance(torch.bfloat16, cpu) == tolerances[3]


def test_float32_is_not_rounded_on_a_cpu():
    assert not tree_check.rounds_float32(torch.device("cpu"))
