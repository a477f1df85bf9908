"""
Whatever the layout of the forward passes, the trainer ends where the naive implementation ends (see oracle.py).

Rollouts, training and comparison are those of `update/test_exactness.py`.
"""

import warnings

import pytest
import torch
from against_oracle import (
    TOLERANCE,
    assert_matches_oracle,
    load_model,
    parameters_of,
    relative_error,
    run_oracle,
    train,
)
from fixed_rollouts import NUM_TRAJECTORIES, as_groups, make_iteration, ragged_rollouts, rewrite_contexts
from tiny import VOCABULARY, load_tiny_model
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from seeupo_trl.scoring.rows import RowBatch
from seeupo_trl.scoring.tree_attention import reason_against_trees
from seeupo_trl.scoring.trees import TreeBatch, TreeScorer


GROUP = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": NUM_TRAJECTORIES // 6}
LONGEST = 60  # tokens of any trajectory below, all its turns together

LAYOUTS = {
    "trees": {"packing": "tree", **GROUP},
    "trees-of-one-trajectory": {
        "packing": "tree",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": NUM_TRAJECTORIES,
    },
    "trees-under-a-budget": {"packing": "tree", "max_tokens_per_microbatch": LONGEST},
    "trees-under-a-large-budget": {"packing": "tree", "max_tokens_per_microbatch": 300},
    "rows": {"packing": "rows", **GROUP},
    "rows-under-a-budget": {"packing": "rows", "max_tokens_per_microbatch": 120},
    "auto-under-a-budget": {"max_tokens_per_microbatch": 80},
}
SETTINGS = {
    "reverse": {},
    "forward-old-turn": {"update_order": "forward", "old_policy": "turn"},
    "simultaneous": {"update_order": "simultaneous"},
    "two-blocks-kl": {"max_turn_updates": 2, "beta": 1.0},
    "two-epochs": {"num_iterations": 2},
}


@pytest.fixture
def layouts_used(monkeypatch):
    """Types of the batches that are scored."""
    used = []
    score = TreeScorer.score

    def recording(self, model, batch):
        used.append((type(batch), batch.num_tokens))
        return score(self, model, batch)

    monkeypatch.setattr(TreeScorer, "score", recording)
    return used


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layout_does_not_change_the_result(
    layout,
    settings,
    tiny_dir,
    tmp_path,
    oracle_on_ragged,
    layouts_used,
):
    model = load_model(tiny_dir)
    start = parameters_of(model)
    trained = train(model, ragged_rollouts(), tmp_path, **layout, **settings)[-1]
    assert relative_error(trained, oracle_on_ragged(**settings), start) < TOLERANCE[torch.float64]
    budget = layout.get("max_tokens_per_microbatch")
    if layout.get("packing") == "tree":
        # besides the check of the first tree, whose rows of two trajectories may not fit a budget together
        in_a_check = 1 if budget is None else 2
        assert sum(kind is RowBatch for kind, _ in layouts_used) <= in_a_check * (1 + ("beta" in settings))
        assert budget is None or all(tokens <= budget for _, tokens in layouts_used)
    elif layout.get("packing") == "rows":
        assert all(kind is RowBatch for kind, _ in layouts_used)
    assert budget is None or all(tokens <= budget for kind, tokens in layouts_used if kind is TreeBatch)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_rewritten_contexts(layout, settings, tiny_dir, tmp_path):
    turns = [rewrite_contexts(episodes, seed) for seed, episodes in enumerate(ragged_rollouts())]
    if layout.get("packing") == "rows" and "max_tokens_per_microbatch" in layout:
        layout = {**layout, "max_tokens_per_microbatch": 300}  # a rewritten context takes a row of its own
    assert_matches_oracle(tiny_dir, ragged_rollouts(), tmp_path, turns, layout, **settings)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "gradient-checkpointing"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_lora_and_gradient_checkpointing(
    lora,
    checkpointing,
    tiny_dir,
    tmp_path,
    oracle_on_ragged,
):
    model = load_model(tiny_dir, lora=lora)
    start = parameters_of(model)
    config = {**LAYOUTS["trees"], "gradient_checkpointing": checkpointing}
    trained = train(model, ragged_rollouts(), tmp_path, **config, beta=1.0)[-1]
    assert relative_error(trained, oracle_on_ragged(lora=lora, beta=1.0), start) < TOLERANCE[torch.float64]


def test_trees_in_float32(tiny_dir, tmp_path, oracle_on_ragged):
    model = load_model(tiny_dir, torch.float32)
    start = parameters_of(model)
    trained = train(model, ragged_rollouts(), tmp_path, **LAYOUTS["trees"])[-1]
    assert relative_error(trained, oracle_on_ragged(), start) < TOLERANCE[torch.float32]


def test_attention_implementation_is_the_users_outside_of_the_update(tiny_dir, tmp_path):
    model = load_model(tiny_dir)
    model.set_attn_implementation("eager")
    train(model, ragged_rollouts()[:1], tmp_path, **LAYOUTS["trees"])
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("packing", ["tree", "rows"])
def test_old_log_probabilities_that_the_first_turns_pass_yields_cost_no_pass(packing, tiny_dir, tmp_path, monkeypatch):
    """With append-only contexts the history of the last turn holds all others, at the policy that sampled."""
    with_gradient = []
    score = TreeScorer.score

    def recording(self, model, batch):
        with_gradient.append(torch.is_grad_enabled())
        return score(self, model, batch)

    monkeypatch.setattr(TreeScorer, "score", recording)
    iterations = [make_iteration(seed, [4] * NUM_TRAJECTORIES) for seed in (21, 22)]
    assert_matches_oracle(tiny_dir, iterations, tmp_path, config={"packing": packing, **GROUP})
    assert with_gradient.count(False) == (2 if packing == "tree" else 0)  # the check of the first tree


# --- A trajectory over the budget ------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["tree", "rows", "auto"])
def test_trajectory_over_the_budget_is_an_error_before_anything_moves(packing, tiny_dir, tmp_path):
    model = load_model(tiny_dir)
    start = parameters_of(model)
    with pytest.raises(ValueError, match=r"Trajectory \d+ of this process has \d+ tokens .* at least \d+"):
        train(model, ragged_rollouts(), tmp_path, packing=packing, max_tokens_per_microbatch=15)
    assert all(torch.equal(parameter, start[name]) for name, parameter in model.named_parameters())


# --- The check of the first tree -------------------------------------------------------------------------------------


def without_position_ids(module, args, kwargs):
    return args, {name: value for name, value in kwargs.items() if name != "position_ids"}


def without_extra_arguments(module, args, kwargs):
    return args, {name: value for name, value in kwargs.items() if name != "tree_branches"}


@pytest.mark.parametrize("hook", [without_position_ids, without_extra_arguments])
def test_model_that_does_not_honour_trees_is_trained_in_rows(
    hook,
    tiny_dir,
    tmp_path,
    oracle_on_ragged,
    layouts_used,
):
    model = load_model(tiny_dir)
    model.base_model.register_forward_pre_hook(hook, with_kwargs=True)
    start = parameters_of(model)
    with pytest.warns(UserWarning, match="differ from those of plain rows") as record:
        trained = train(model, ragged_rollouts(), tmp_path, **LAYOUTS["trees"])[-1]
    assert sum("differ from those of plain rows" in str(warning.message) for warning in record) == 1
    assert relative_error(trained, oracle_on_ragged(), start) < TOLERANCE[torch.float64]
    assert [kind for kind, _ in layouts_used].count(TreeBatch) == 1


# --- Models without full causal attention ----------------------------------------------------------------------------

COMMON = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 3,
    "tie_word_embeddings": False,
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 512}


def sliding_window_model():
    layers = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(
        **COMMON, **HEADS, head_dim=8, sliding_window=4, layer_types=layers, query_pre_attn_scalar=8
    )
    return Gemma3ForCausalLM(config)


def state_space_model():
    return MambaForCausalLM(MambaConfig(**COMMON, state_size=4, use_mambapy=False))


def convolution_model():
    return Lfm2ForCausalLM(Lfm2Config(**COMMON, **HEADS, layer_types=["conv", "full_attention"]))


@pytest.mark.parametrize(
    ("make", "reason"),
    [(sliding_window_model, "sliding"), (state_space_model, "state"), (convolution_model, "conv")],
)
@pytest.mark.parametrize("packing", ["auto", "tree"])
def test_models_without_full_attention_are_computed_in_rows(make, reason, packing, tmp_path, layouts_used):
    torch.manual_seed(0)
    model = make().double()
    assert reason in reason_against_trees(model)
    start = parameters_of(model)
    iterations = ragged_rollouts()[:2]
    results = run_oracle(model, map(as_groups, iterations))
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        trained = train(model, iterations, tmp_path, packing=packing)
    assert any("Using rows" in str(warning.message) for warning in record) == (packing == "tree")
    assert all(kind is RowBatch for kind, _ in layouts_used)
    # parts of these models compute in float32 whatever their dtype
    assert relative_error(trained[-1], results[-1].parameters, start) < TOLERANCE[torch.float32]


def test_full_attention_is_no_reason_against_trees(tiny_dir):
    assert reason_against_trees(load_tiny_model(tiny_dir)) is None
