"""
Several real processes end where the oracle ends, whatever the data on each of them (see unkind_rollouts.py).

Each launch of processes trains several runs one after the other, because starting costs more than training. The oracle
is one process, one trajectory at a time, in float64; the processes compute in float32.
"""

from functools import cache
from typing import Any

import pytest
import torch
from launching import Finished, launch
from oracle import OracleSettings, seeupo_iteration
from tiny import save_tiny_model, tiny_config, tiny_tokenizer
from unkind_rollouts import NUM_TRAJECTORIES, TURNS, groups

from seeupo_trl.update.steps import assign_minibatches


pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow

TOLERANCE = 1e-3  # float32, relative to the distance moved
LEARNING_RATE = 0.005
SEED = 42  # the default

# Options of the run, and what the oracle needs to know beside them.
RUNS: dict[str, dict[str, Any]] = {
    "rows": {"packing": "rows"},
    "kl": {"packing": "rows", "beta": 0.1, "old_policy": "turn", "gradient_checkpointing": True},
    "trees": {"packing": "tree", "max_tokens_per_microbatch": 80, "beta": 0.1},
    "stripped": {"packing": "tree", "strip": True, "turn_weight_clip": None},
    "blocks": {"max_turn_updates": 3, "old_policy": "turn", "advantage_clip": 1.0},
    "entropy": {"packing": "rows", "entropy_coef": 0.02, "update_order": "forward", "num_iterations": 2},
    "lora": {"lora": True, "beta": 0.1, "gradient_checkpointing": True},
    "minibatches": {"packing": "rows", "per_device_train_batch_size": 1, "steps_per_generation": 6},
    "frozen": {"model": "tied", "frozen": ["model.layers.0", "model.norm"]},
    "reduced_always": {
        "packing": "rows",
        "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}},
    },
    # TRL adds the load-balancing loss of the architecture unless it is told not to
    "moe": {"model": "moe", "packing": "rows", "router_aux_loss_coef": 0.0},
    # beyond the oracle: these are compared with one process
    "adam": {"optim": "adamw_torch", "learning_rate": 1e-3},
    "plays": {"plays": True},
    "plays_lora": {"plays": True, "lora": True},
    "plays_to_go": {"plays": True, "turn_credit": "to_go"},
    # these only have to run
    "bf16": {"bf16": True, "beta": 0.1},
    "moe_with_auxiliary_loss": {"model": "moe_aux"},
    "evaluates_first": {"refused": True, "evaluates_first": True},
    "refused": {"refused": True, "packing": "tree", "max_tokens_per_microbatch": 16},
}
ORACLE_SETTINGS = ("beta", "old_policy", "turn_weight_clip", "max_turn_updates", "advantage_clip")
ORACLE_SETTINGS += ("entropy_coef", "update_order", "num_iterations")
ORACLE_RUNS = ("rows", "kl", "trees", "stripped", "blocks", "entropy", "lora", "minibatches", "frozen")
ORACLE_RUNS += ("reduced_always", "moe")
SINGLE_RUNS = ("adam", "plays", "plays_lora", "plays_to_go")

LAUNCHES: dict[str, tuple[str | None, int, list[str]]] = {
    "one": (None, 1, ["rows", "adam", "plays", "plays_lora", "plays_to_go"]),
    "ddp": (
        "ddp",
        2,
        ["rows", "kl", "lora", "minibatches", "frozen", "reduced_always", "moe", "moe_with_auxiliary_loss", "bf16"],
    ),
    "zero1": ("zero1", 2, ["kl", "lora", "minibatches"]),
    "zero2": ("zero2", 2, ["kl", "trees", "lora", "minibatches", "bf16"]),
    "zero3": (
        "zero3",
        2,
        [
            *("rows", "kl", "trees", "stripped", "entropy", "lora", "frozen", "moe", "adam", "bf16", "plays"),
            *("plays_lora", "moe_with_auxiliary_loss", "evaluates_first"),
        ],
    ),
    "zero3_offload_optimizer": ("zero3_offload_optimizer", 2, ["kl", "lora"]),
    "zero3_offload": ("zero3_offload", 2, ["trees", "lora"]),
    "torchrun-zero3": ("torchrun_zero3", 2, ["kl"]),
    "fsdp2": ("fsdp2", 2, ["kl", "trees", "lora", "frozen", "adam", "bf16", "plays", "plays_lora"]),
    "three-ddp": ("ddp", 3, ["blocks", "trees", "plays", "plays_to_go", "refused"]),
    "three-zero3": ("zero3", 3, ["kl", "trees", "plays"]),
}


def cases(*runs: str) -> Any:
    """Every launch that has one of these runs."""
    pairs = [(name, run) for name, (_, _, there) in LAUNCHES.items() for run in there if run in runs]
    return pytest.mark.parametrize(("launched", "run"), pairs, ids=["-".join(pair) for pair in pairs])


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Directories of the tiny models."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    directory = tmp_path_factory.mktemp("models")
    paths = {
        "plain": save_tiny_model(directory / "plain"),
        "tied": save_tiny_model(directory / "tied", tie_word_embeddings=True),
    }
    dense = tiny_config()
    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    fields += ("num_key_value_heads", "head_dim", "max_position_embeddings", "initializer_range", "pad_token_id")
    fields += ("eos_token_id", "bos_token_id")
    for name, has_auxiliary_loss in (("moe", False), ("moe_aux", True)):
        config = Qwen3MoeConfig(
            **{field: getattr(dense, field) for field in fields},
            tie_word_embeddings=False,
            use_cache=False,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            output_router_logits=has_auxiliary_loss,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            Qwen3MoeForCausalLM(config).save_pretrained(directory / name)
        tiny_tokenizer().save_pretrained(directory / name)
        paths[name] = str(directory / name)
    return paths


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    """Results of a launch; each is started once."""

    @cache
    def start(name: str) -> Finished:
        backend, num_processes, names = LAUNCHES[name]
        runs = [{**RUNS[run], "name": run, "model": models[RUNS[run].get("model", "plain")]} for run in names]
        result = launch(tmp_path_factory.mktemp(name), backend, num_processes, runs)
        assert result.returncode == 0, result.stderr[-4000:]
        return result

    return start


def policy(directory: str, lora: bool, frozen: tuple[str, ...]) -> torch.nn.Module:
    from distributed_run import LORA, set_adapter
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        experts_implementation="eager",  # the others do not compute in float64
    )
    if lora:
        model = get_peft_model(model, LoraConfig(**LORA))
        set_adapter(model)
    for name, parameter in model.named_parameters():
        if name.startswith(frozen):
            parameter.requires_grad_(False)
    return model.double()


@pytest.fixture(scope="module")
def oracle(models):
    """Trainable parameters at the start and at the end of a run, by the naive implementation."""

    @cache
    def final(run: str, num_processes: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        options = RUNS[run]
        directory = models[options.get("model", "plain")]
        lora = options.get("lora", False)
        model = policy(directory, lora, tuple(options.get("frozen", ())))
        reference = policy(directory, False, ("",))
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        settings = {name: options[name] for name in ORACLE_SETTINGS if name in options}
        per_process = NUM_TRAJECTORIES // num_processes
        steps = 1
        if "steps_per_generation" in options:
            steps = options["steps_per_generation"] * options["per_device_train_batch_size"] * num_processes
            steps = 2 * steps // NUM_TRAJECTORIES
        for iteration in range(len(TURNS)):
            # every process cuts its own trajectories into mini-batches
            minibatches = assign_minibatches(per_process, steps, SEED, iteration) * num_processes
            result = seeupo_iteration(
                model,
                groups(iteration, options.get("strip", False)),
                OracleSettings(lr=LEARNING_RATE, max_grad_norm=1.0, minibatches=tuple(minibatches), **settings),
                ref_model=reference,
            )
        end = result.parameters
        names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        rename = {name: name.replace(".default", "") for name in names}
        return {rename[n]: start[n] for n in names}, {rename[n]: end[n] for n in names}

    return final


def relative_error(actual, expected, start) -> float:
    difference = max((actual[name] - expected[name]).abs().max().item() for name in expected)
    return difference / max((expected[name] - start[name]).abs().max().item() for name in expected)


@cases(*ORACLE_RUNS)
def test_processes_end_where_the_oracle_ends(launched, run, finished, oracle):
    start, expected = oracle(run, LAUNCHES[launched][1])
    actual = finished(launched).parameters(run)
    assert expected.keys() <= actual.keys()
    assert relative_error(actual, expected, start) < TOLERANCE


@cases(*SINGLE_RUNS)
def test_processes_end_where_one_process_ends(launched, run, finished, models):
    """What the oracle cannot do: AdamW, and episodes that the policy plays in environments, without drawing tokens."""
    if launched == "one":
        pytest.skip("this is the one process")
    one = finished("one")
    expected = one.parameters(run)
    model = policy(models["plain"], RUNS[run].get("lora", False), frozen=())
    start = {name.replace(".default", ""): p.detach() for name, p in model.named_parameters()}
    assert relative_error(finished(launched).parameters(run), expected, start) < TOLERANCE


@cases("plays", "plays_lora")
def test_processes_generate_equally_often_whenever_their_episodes_end(launched, run, finished):
    notes = finished(launched).notes(run)
    assert len(notes) == LAUNCHES[launched][1]
    assert {note["generations"] for note in notes} == {8 * len(TURNS)}
    assert [log["turns/max"] for log in finished(launched).logs(run)[:-1]] == [8.0] * len(TURNS)
    assert [log["turns/min"] for log in finished(launched).logs(run)[:-1]] == [1.0] * len(TURNS)


def test_generation_from_partitioned_parameters_breaks_deepspeeds_backward_pass(models, tmp_path):
    """So it does in a stock GRPOTrainer (trl 1.16, deepspeed 0.19.8). When this fails, the README may say so."""
    run = {"name": "plays", "model": models["plain"], "plays": True, "ds3_gather_for_generation": False}
    finished = launch(tmp_path, "zero3", 2, [run])
    assert finished.returncode != 0
    assert "The size of tensor a (0) must match the size of tensor b" in finished.stderr


@cases("rows", "kl", "trees", "lora")
def test_processes_log_what_one_process_logs(launched, run, finished):
    """Means, extremes and pools are over all processes."""
    first, second, third = finished(launched).logs(run)[:3]
    assert [first[f"turn_{turn}/pool"] for turn in (1, 2, 8)] == [12, 6, 3]
    # the only trajectory of the second iteration with a fourth turn is in a group without variance
    assert second["optimizer_steps"] == (4 if RUNS[run].get("beta") else 3)
    assert third["optimizer_steps"] == (2 if RUNS[run].get("beta") else 0)
    if run == "rows":
        for log, reference in zip(finished(launched).logs(run)[:-1], finished("one").logs(run)[:-1], strict=True):
            names = ["loss", "grad_norm", "ratio/max", "turn_weight/mean", "turn_2/loss", "entropy", "reward_std"]
            logged = [name for name in names if name in reference]
            assert logged == [name for name in names if name in log]
            assert len(logged) == len(names) or reference["optimizer_steps"] == 0
            assert "entropy" in logged
            for name in logged:
                assert log[name] == pytest.approx(reference[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("launched", [name for name in LAUNCHES if name != "one"])
def test_launch_is_what_it_says(launched, finished):
    """A launcher's configuration that is ignored would run one process, or processes that know nothing of another."""
    backend, num_processes, runs = LAUNCHES[launched]
    wrapper = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPModule"}.get(backend, "DeepSpeedEngine")
    notes = finished(launched).notes(runs[0])
    assert len(notes) == num_processes
    assert all(note["num_processes"] == num_processes and wrapper in note["model"] for note in notes)
    assert all(note["lets Gloo finish"] for note in notes)  # what that is for: test_gloo_exit.py


@cases("bf16", "moe_with_auxiliary_loss")
def test_run_stays_finite(launched, run, finished, models):
    """bfloat16 rounds too much for parity, and the load-balancing loss is a mean over a micro-batch's tokens."""
    logs = finished(launched).logs(run)[:-1]
    assert len(logs) == len(TURNS)
    for name in ("loss", "grad_norm", "entropy", "ratio/max"):
        assert all(abs(log[name]) < 100 for log in logs if log["optimizer_steps"]), name
    assert all(p.isfinite().all() for p in finished(launched).parameters(run).values())
    if run == "moe_with_auxiliary_loss":
        assert all(log["aux_loss"] > 0 for log in logs if log["optimizer_steps"])


@cases("bf16")
def test_log_probabilities_are_not_rounded_to_bfloat16(launched, run, finished):
    """A ratio multiplies what is lost in every token."""
    assert not any(note["log-probabilities are bfloat16"] for note in finished(launched).notes(run))


def test_fsdp2_gathers_the_reference_layer_by_layer(finished):
    for note in finished("fsdp2").notes("kl"):
        assert note["units of the reference"] > tiny_config().num_hidden_layers


@cases("refused")
def test_trajectory_over_the_budget_stops_every_process(launched, run, finished):
    """Only one process has such a trajectory; the others must not wait for it."""
    notes = finished(launched).notes(run)
    assert len(notes) == LAUNCHES[launched][1]
    assert all("max_tokens_per_microbatch=16" in note["error"] for note in notes)


@cases("evaluates_first")
def test_training_after_an_evaluation_is_refused_under_deepspeed(launched, run, finished):
    """The Trainer destroys the evaluation's engine and makes no other one: the first backward pass would fail."""
    notes = finished(launched).notes(run)
    assert len(notes) == LAUNCHES[launched][1]
    assert all("eval_on_start=True" in note["error"] for note in notes)
