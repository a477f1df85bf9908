"""Trees on a card: the kernel against float64, what is compiled, and trees against rows."""

import shutil
import warnings

import pytest
import torch
from against_oracle import train
from cards import CARD, EVERYWHERE, NUM_CARDS, arguments_for, on_a_card
from fixed_rollouts import NUM_TRAJECTORIES, ragged_rollouts
from tiny import load_tiny_model, save_tiny_model
from torch.nn.attention import flex_attention
from transformers.utils import is_triton_available
from tree_kernel import a_tree, attention_errors, num_graphs, score_trees_of_twenty_lengths, tree_kernel

from seeupo_trl.scoring import tree_attention
from seeupo_trl.scoring.tree_attention import attend_on_tree, flex_length, tree_block_mask
from seeupo_trl.scoring.tree_check import reason_against_attention
from seeupo_trl.update.turn_updater import TurnUpdater


@pytest.fixture(params=EVERYWHERE)
def device(request):
    with tree_kernel(request.param):
        yield request.param


@on_a_card
def test_what_compiles_kernels_is_there():
    assert torch.version.cuda and is_triton_available()
    assert shutil.which("gcc") or shutil.which("cc"), "Triton compiles its launchers with a C compiler"
    assert torch.cuda.get_device_capability() >= (8, 0), "bfloat16 needs Ampere or newer"


# heads, head size, tokens, and the dtype in which the errors of PyTorch's own attention are the measure
SMALL = [((4, 2), 16, 300), ((5, 1), 8, 700)]
FULL = [
    (heads, size, tokens)
    for heads, size in (((14, 2), 64), ((32, 8), 128), ((40, 8), 128), ((16, 8), 80), ((8, 4), 256))
    for tokens in (128, 1000, 9000, 32768)
]
SHAPES = [pytest.param("cpu", *shape) for shape in SMALL]
SHAPES += [pytest.param("cuda", *shape, marks=CARD) for shape in FULL]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("where", "heads", "head_dim", "num_tokens"), SHAPES)
def test_outputs_and_gradients_are_as_exact_as_those_of_pytorchs_attention(where, heads, head_dim, num_tokens, dtype):
    with tree_kernel(where):
        for name, (ours, theirs) in attention_errors(where, dtype, heads, head_dim, num_tokens).items():
            assert ours <= 2 * theirs + (1e-6 if dtype == torch.float32 else 1e-2), name


def test_the_kernel_gets_bfloat16_under_autocast(device, monkeypatch):
    seen = []
    compiled = tree_attention.compiled_attention()

    def watched(query, key, value, *args):
        seen.append({query.dtype, key.dtype, value.dtype})
        return compiled(query, key, value, *args)

    monkeypatch.setattr(tree_attention, "compiled_attention", lambda: watched)
    tree = a_tree(300)
    length = flex_length(len(tree))
    mask = tree_block_mask(tree.subtree_ends, length, torch.device(device))
    query, key, value = (torch.randn(1, heads, length, 16, device=device) for heads in (4, 2, 2))
    with torch.autocast(device, torch.bfloat16):
        output, _ = attend_on_tree(None, query, key, value.bfloat16(), mask)
    assert seen == [{torch.bfloat16}] and output.dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["", "non-reentrant", "reentrant"])
def test_a_run_compiles_at_most_eight_graphs(checkpointing, device, tmp_path):
    """Policy and reference, with and without gradient, over trees of twenty lengths."""
    directory = save_tiny_model(tmp_path, head_dim=16)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        score_trees_of_twenty_lengths(lambda: load_tiny_model(directory).to(device), checkpointing)
    assert 2 <= num_graphs() <= 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_check_finds_nothing_wrong_with_the_kernel(dtype, device, tmp_path):
    model = load_tiny_model(save_tiny_model(tmp_path, head_dim=16), dtype).to(device)
    reason = reason_against_attention(model, tree_attention.FLEX, dtype, torch.device(device))
    assert reason is None


@on_a_card
def test_pytorch_refuses_nothing_that_is_left_out_on_a_cpu():
    tensor = torch.zeros(1, 1, 128, 16, device="cuda", requires_grad=True)
    flex_attention._validate_device(tensor, tensor, tensor)


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("float32_head", [True, False])
def test_ratios_at_equal_parameters_are_one_up_to_rounding(where, float32_head, tmp_path, monkeypatch):
    """bfloat16: the tree of the check is kept, and with float32 logits the ratio's noise is below 1e-3."""
    logs = []
    original = TurnUpdater.logs
    monkeypatch.setattr(TurnUpdater, "logs", lambda self: logs.append(dict(original(self))) or list(logs[-1].items()))
    wide = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64} if where == "cuda" else {}
    model = load_tiny_model(save_tiny_model(tmp_path / "model", initializer_range=0.05, **wide), torch.bfloat16)
    batch = {"per_device_train_batch_size": NUM_TRAJECTORIES, "gradient_accumulation_steps": 1}
    options = {**arguments_for(where), **batch, "cast_lm_head_to_fp32": None if float32_head else False}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Trees cannot be used")
        train(model, ragged_rollouts()[:1], tmp_path, packing="tree", bf16=True, **options)
    assert logs[0]["ratio/noise_floor"] < (1e-3 if float32_head else 0.05)
    assert NUM_CARDS or where == "cpu"
