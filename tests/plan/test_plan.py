"""What `python -m seeupo_trl.plan` says, against what passes and runs really take."""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import warm_python
import yaml
from launching import FSDP2, LAUNCHER
from peft import LoraConfig, get_peft_model
from tiny import tiny_config
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config
from trl.trainer.utils import add_fused_lm_head

from seeupo_trl.plan import activations
from seeupo_trl.plan.__main__ import add_arguments, main, run
from seeupo_trl.plan.activations import Pass, measure_pass, trace_pass
from seeupo_trl.plan.live_bytes import LiveBytes
from seeupo_trl.plan.memory import estimate, estimate_all
from seeupo_trl.plan.recipes import from_accelerate_config, from_training_config, parse_bytes
from seeupo_trl.plan.report import library_estimates
from seeupo_trl.plan.run import GIB, PlannedRun, Strategy, all_strategies, model_shape
from seeupo_trl.scoring.rows import Row, RowBatch
from seeupo_trl.scoring.trees import TreeScorer
from seeupo_trl.scoring.turn_buffer import TurnBuffer
from seeupo_trl.trajectory import Trajectory, Turn


ROOT = Path(__file__).parents[2]
TOLERANCE = 0.15

SHAPE = "layers=2,hidden=64,intermediate=128,heads=4,kv_heads=2,head_dim=16,vocabulary=500"

QWEN3_14B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 5120,
    "intermediate_size": 17408,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def test_live_bytes_are_those_of_the_storages_that_are_alive():
    with LiveBytes() as memory:
        first = torch.zeros(1000)
        view = first[10:]
        second = first + 1
        del second
        assert (memory.live, memory.peak) == (4000, 8000)
        del first
        assert memory.live == 4000  # the view keeps it
        del view
        assert memory.live == 0
        without_memory = torch.zeros(1000, device="meta")
        assert memory.live == 0 and len(without_memory) == 1000


def test_live_bytes_follow_a_storage_that_is_resized():
    with LiveBytes() as memory:
        tensor = torch.zeros(1000)
        tensor.untyped_storage().resize_(0)
        assert (memory.live, memory.peak) == (0, 4000)
        tensor.untyped_storage().resize_(8000)
        assert (memory.live, memory.peak) == (8000, 8000)
    tensor.untyped_storage().resize_(0)
    assert memory.live == 8000  # it looks no more


def episodes(prompt: int, action: int, observation: int, turns: int, count: int = 4) -> TurnBuffer:
    trajectories = []
    for index in range(count):
        context, turns_of_one = [1] * prompt, []
        for _ in range(turns):
            turns_of_one.append(Turn(context, [2 + index] * action))
            context = context + [2 + index] * action + [7] * observation
        trajectories.append(Trajectory(turns_of_one))
    return TurnBuffer(trajectories)


CONFIGS = {
    "qwen3": tiny_config(vocab_size=4000, hidden_size=192, intermediate_size=512, num_hidden_layers=5, head_dim=32),
    "qwen3-tied": tiny_config(vocab_size=9000, num_hidden_layers=4, tie_word_embeddings=True),
    "qwen2": Qwen2Config(
        vocab_size=1000,
        hidden_size=128,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
}


@pytest.mark.parametrize(
    ("config", "packing", "lengths", "options"),
    [
        ("qwen3", "tree", (300, 20, 10, 4), {}),
        ("qwen3", "tree", (300, 20, 10, 4), {"gradient_checkpointing": False, "dtype": torch.bfloat16}),
        ("qwen3", "rows", (100, 60, 10, 2), {"gradient_checkpointing": False, "autocast": True}),
        ("qwen3-tied", "tree", (600, 10, 5, 3), {"keeps_gradients": True}),
        ("qwen2", "rows", (500, 40, 10, 2), {"autocast": True}),
        ("qwen2", "tree", (200, 40, 10, 3), {"lora_rank": 4}),
    ],
)
def test_peak_of_a_pass_is_predicted_without_the_model(config, packing, lengths, options):
    config = CONFIGS[config]
    one = Pass(tokens=0, scored=0, **{"dtype": torch.float32, **options})
    model = AutoModelForCausalLM.from_config(config, dtype=one.dtype)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    causal_lm = model
    if one.lora_rank is not None:
        adapters = LoraConfig(r=one.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, adapters)
    if one.gradient_checkpointing:
        causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        causal_lm.enable_input_require_grads()
    model.train()
    scorer = TreeScorer(model, pad_token_id=0, temperature=1.0, packing=packing)
    buffer = episodes(*lengths)
    keys = [(index, turn) for index in range(4) for turn in (buffer.num_turns - 1, buffer.num_turns)]
    (batch,) = scorer.micro_batches(buffer, keys, max_rows=4)
    assert isinstance(batch, RowBatch) == (packing == "rows")

    def forward():
        with torch.autocast("cpu", torch.bfloat16, enabled=one.autocast):
            scores, _ = scorer.score(model, batch)
        return sum(score.logps.sum() for score in scores.values())

    with scorer.attention(batch):
        measured = measure_pass(model, forward, one.keeps_gradients)
    assert trace_pass(config, one, batch).peak == pytest.approx(measured.peak, rel=TOLERANCE)


def test_layers_are_extrapolated_exactly():
    config = tiny_config(num_hidden_layers=6)
    one = Pass(tokens=300, scored=50)
    assert trace_pass(config, one) == activations._trace(config, one, None)


RESIDENT = """
import sys, torch
from pathlib import Path
from transformers import AutoConfig, AutoModelForCausalLM
from seeupo_trl.plan.activations import _forward_on_cpu
from seeupo_trl.scoring.rows import Row, RowBatch
from trl.trainer.utils import add_fused_lm_head
torch.set_num_threads(1)
config = AutoConfig.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
add_fused_lm_head(model, outputs=("log_probs", "entropy"))
def resident(name):
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024
def step(length):
    loss = _forward_on_cpu(model, RowBatch([Row([1] * length, {(0, 1): (length - 100, length)})]))()
    loss.backward()
step(200)
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
step(2000)
print(resident("VmHWM") - before)
"""


@pytest.mark.slow
def test_predicted_peak_is_what_the_operating_system_sees(tmp_path):
    config = Qwen3Config(
        vocab_size=2000,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
    )
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(tmp_path)
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RESIDENT, str(tmp_path)]
    process = subprocess.run(command, env=env, check=True, capture_output=True, text=True, timeout=300)
    measured = int(process.stdout.splitlines()[-1])
    one = Pass(2000, 100, rows=1, dtype=torch.float32, gradient_checkpointing=False, keeps_gradients=True)
    batch = RowBatch([Row([1] * 2000, {(0, 1): (1900, 2000)})])
    assert trace_pass(config, one, batch).peak == pytest.approx(measured, rel=TOLERANCE)


def deepspeed(stage: int) -> dict:
    zero3 = {"zero3_init_flag": True, "zero3_save_16bit_model": True} if stage == 3 else {}
    offload = {"offload_optimizer_device": "none", "offload_param_device": "none"}
    options = {"zero_stage": stage, "deepspeed_multinode_launcher": "standard", **offload, **zero3}
    return {"distributed_type": "DEEPSPEED", "deepspeed_config": options}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "options"),
    [
        ({"distributed_type": "MULTI_GPU"}, []),
        (deepspeed(2), []),
        (deepspeed(3), []),
        (FSDP2, []),
        (FSDP2, ["--lora_rank", "8"]),
    ],
    ids=["ddp", "zero2", "zero3", "fsdp2", "fsdp2-lora"],
)
def test_two_processes_take_what_was_planned_and_reload_what_they_saved(launcher, options, tmp_path):
    pytest.importorskip("deepspeed")
    config = {**LAUNCHER, "mixed_precision": "bf16", "num_processes": 2, **launcher}
    path = tmp_path / "launcher.yaml"
    path.write_text(yaml.safe_dump(config))
    script = str(ROOT / "benchmarks" / "dry_run_14b.py")
    command = [*warm_python.interpreter(), script, str(path), "--shape", "1,4,4000", *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path)}
    env |= {"PYTHONPATH": str(ROOT), "TRL_EXPERIMENTAL_SILENCE": "1", **warm_python.environment(2)}
    process = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr[-4000:]
    assert "reloaded bit by bit: True" in process.stdout
    rows = dict(re.findall(r"\| (kept|peak) \|.*\| ([0-9.]+) \|", process.stdout))
    for name in ("kept", "peak"):
        assert float(rows[name]) == pytest.approx(1.0, abs=TOLERANCE), process.stdout


# --- The command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def qwen3_14b(tmp_path) -> str:
    directory = tmp_path / "qwen3-14b"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(QWEN3_14B))
    return str(directory)


def planned(capsys, *arguments: str) -> dict:
    main([*arguments, "--json"])
    return json.loads(capsys.readouterr().out)


QWEN2_5_14B = {
    **{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 5120},
    **{"intermediate_size": 13824, "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8},
    **{"max_position_embeddings": 32768, "tie_word_embeddings": False, "dtype": "bfloat16"},
}


@pytest.mark.parametrize("task", ["bfcl", "appworld"])
@pytest.mark.parametrize(
    ("name", "config", "parameters"),
    [("qwen3", QWEN3_14B, 14_768_307_200), ("qwen2.5", QWEN2_5_14B, 14_770_033_664)],
    ids=["qwen3", "qwen2.5"],
)
def test_the_14b_recipe_fits_eight_gpus_of_80_gib(name, config, parameters, task, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = ["--config", str(ROOT / f"examples/configs/{name}_14b_{task}.yaml"), "--model", str(tmp_path)]
    arguments += ["--accelerate-config", str(ROOT / "examples/accelerate_configs/zero3.yaml")]
    output = planned(capsys, *arguments, "--host-memory", "512GiB")
    assert output["model"]["total"] == parameters
    (row,) = output["strategies"]
    assert row["verdict"] == "fits"
    assert row["max_tokens"] >= output["tokens"] >= 24000


def test_the_lora_recipe_fits_one_gpu_of_80_gib(qwen3_14b, capsys):
    arguments = ["--config", str(ROOT / "examples/configs/qwen3_14b_bfcl_lora.yaml"), "--model", qwen3_14b]
    output = planned(capsys, *arguments, "--gpus", "1", "--zero-stage", "0", "--host-memory", "64GiB")
    (row,) = output["strategies"]
    assert row["verdict"] == "fits"
    assert row["max_tokens"] >= output["tokens"] >= 24000


def test_fsdp2_is_planned_from_its_launcher_file(qwen3_14b, tmp_path, capsys):
    arguments = ["--model", qwen3_14b, "--generation", "vllm-server", "--reference", "--accelerate-config"]

    def row(name: str) -> dict:
        (one,) = planned(capsys, *arguments, str(ROOT / f"examples/accelerate_configs/{name}.yaml"))["strategies"]
        return one

    fsdp2, zero3 = row("fsdp2"), row("zero3")
    assert fsdp2["strategy"] == "FSDP2" and fsdp2["fits"]
    # float32 parameters, gradients and moments, against bfloat16 ones with float32 master weights and moments
    states = [sum(one["kept"].get(name, 0) for name in ("parameters", "optimizer")) for one in (fsdp2, zero3)]
    assert states[0] == pytest.approx(12 * 14_768_307_200 / 8) == pytest.approx(states[1] * 12 / 14, rel=0.01)

    options = yaml.safe_load((ROOT / "examples/accelerate_configs/fsdp2.yaml").read_text())
    for name, value, message in (
        ("fsdp_version", 1, "FSDP 1 is not supported"),
        ("fsdp_reshard_after_forward", False, "is not planned here"),
    ):
        changed = {**options, "fsdp_config": {**options["fsdp_config"], name: value}}
        path = tmp_path / "changed.yaml"
        path.write_text(yaml.safe_dump(changed))
        with pytest.raises(ValueError, match=message):
            from_accelerate_config(str(path))
    offloading = {**options, "fsdp_config": {**options["fsdp_config"], "fsdp_offload_params": True}}
    path.write_text(yaml.safe_dump(offloading))
    run = PlannedRun(CONFIGS["qwen3"], gpus=2, gpu_memory=GIB, generation="vllm-server")
    one = estimate(run, from_accelerate_config(str(path))[1])
    assert not one.kept and one.host["optimizer"] == 8 * model_shape(CONFIGS["qwen3"]).total


def test_a_deepspeed_json_is_read_as_transformers_reads_it(tmp_path):
    def strategy(**zero) -> Strategy:
        (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": zero}))
        options = {"deepspeed_config_file": str(tmp_path / "zero.json")}
        (tmp_path / "launcher.yaml").write_text(
            yaml.safe_dump({"distributed_type": "DEEPSPEED", "deepspeed_config": options, "num_processes": 2})
        )
        return from_accelerate_config(str(tmp_path / "launcher.yaml"))[1]

    one = strategy(stage=3, reduce_bucket_size="auto", stage3_max_live_parameters=1e6, offload_param={"device": "cpu"})
    assert one == Strategy(3, offload_param=True, reduce_bucket_size=None, max_live_parameters=1_000_000)
    run = PlannedRun(CONFIGS["qwen3"], gpus=2, gpu_memory=GIB, generation="vllm-server")
    assert estimate(run, one).kept["buckets"] == 2 * CONFIGS["qwen3"].hidden_size ** 2
    with pytest.raises(ValueError, match="offloading to 'nvme' is not planned here"):
        strategy(stage=3, offload_optimizer={"device": "nvme"})


def test_full_training_of_14b_needs_zero_and_more_than_a_small_card(qwen3_14b, capsys):
    shared = ["--model", qwen3_14b, "--generation", "vllm-server", "--tokens", "16384"]

    def row(*arguments: str) -> dict:
        (one,) = planned(capsys, *shared, *arguments)["strategies"]
        return one

    ddp, zero3 = row("--zero-stage", "0"), row("--zero-stage", "3")
    assert not ddp["fits"] and ddp["max_tokens"] == 0 and "GiB too much" in ddp["verdict"]
    assert zero3["fits"]
    assert row("--zero-stage", "3", "--offload-optimizer")["max_tokens"] > zero3["max_tokens"]
    assert row("--zero-stage", "3", "--gpu-memory", "8GiB")["max_tokens"] == 0


def test_the_largest_budget_fits_and_a_larger_one_does_not():
    config = tiny_config(num_hidden_layers=3, max_position_embeddings=8192)
    run = PlannedRun(config, gpus=2, gpu_memory=GIB // 2, reserve=0, generation="vllm-server", prompt=10)
    strategy = Strategy(3, reduce_bucket_size=10_000)
    (one,) = estimate_all(run, [strategy])
    for tokens, fits in ((one.max_tokens, True), (one.max_tokens * 21 // 20, False)):
        assert estimate(PlannedRun(**{**run.__dict__, "tokens": tokens}), strategy).fits == fits


def test_vllm_without_room_for_one_context_is_a_problem_whatever_the_memory(qwen3_14b, capsys):
    arguments = ["--model", qwen3_14b, "--generation", "vllm-colocate", "--vllm-utilization", "0.35"]
    (row,) = planned(capsys, *arguments, "--zero-stage", "3", "--gpu-memory", "80GiB")["strategies"]
    assert row["verdict"].startswith("cannot start")
    assert "vllm_tensor_parallel_size" in row["problems"][0]


def test_table_names_what_differs_from_the_libraries_own_estimators(qwen3_14b, capsys):
    shape = "layers=2,hidden=64,intermediate=128,heads=4,kv_heads=2,head_dim=16,vocabulary=500"
    main(["--shape", shape, "--zero-stage", "0"])
    output = capsys.readouterr().out
    assert "| DDP |" in output and "accelerate estimate-memory" in output
    shape = model_shape(CONFIGS["qwen3"])
    run = PlannedRun(CONFIGS["qwen3"], gpus=8, gpu_memory=GIB)
    assert len(all_strategies(lora_rank=8)) == len({one.name for one in all_strategies(lora_rank=8)})
    assert library_estimates(shape, run, Strategy(0))["accelerate estimate-memory"] > 16 * shape.total


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such-model"], "describe its shape with `--shape`"),
        ([], "Which model?"),
        (["--shape", "layers=2"], "head_dim=<number>"),
        (["--model", "x", "--offload-optimizer"], "give `--zero-stage` or `--fsdp2`"),
        (["--model", "x", "--gpu-memory", "lots"], "write it as 80GiB"),
        (["--model", "x", "--config", "no-such.yaml"], "no-such.yaml"),
        (["--shape", SHAPE.replace("layers=2", "layers=0")], "layers=<number>"),
        (["--shape", SHAPE, "--gpus", "0"], "`gpus` must be at least 1; got 0."),
        (["--shape", SHAPE, "--tokens", "0"], "`tokens` must be at least 1; got 0."),
        (["--shape", SHAPE, "--rows", "0"], "`rows` must be at least 1; got 0."),
        (["--shape", SHAPE, "--completions", "0"], "`completions` must be at least 1; got 0."),
        (["--shape", SHAPE, "--max-context", "-3"], "`max_context` must be at least 1; got -3."),
        (["--shape", SHAPE, "--lora-rank", "0"], "`lora_rank` must be at least 1; got 0."),
        (["--shape", SHAPE, "--vllm-utilization", "1.5"], "more than 0 and at most 1; got 1.5."),
        (
            ["--shape", SHAPE, "--generation", "vllm-colocate", "--vllm-tensor-parallel", "3"],
            "8 GPUs cannot be grouped by `vllm_tensor_parallel=3`",
        ),
    ],
)
def test_bad_arguments_say_what_to_do(arguments, message, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--config", "--accelerate-config"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; it must contain a YAML mapping"),
        (b"- 1", "holds a list; it must contain a YAML mapping"),
        (b"a: [1", "is not YAML: .* expected"),
        (b"1: 2", "has the key 1, which is no name"),
        (b"\xff\xfe\x00", "is no text"),
        (None, "cannot be read: Is a directory"),
    ],
    ids=str,
)
def test_a_file_without_settings_is_named(option, content, message, tmp_path, capsys):
    path = tmp_path / "settings.yaml"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(SystemExit) as end:
        main(["--shape", SHAPE, option, str(path)])
    assert end.value.code == 2
    assert re.search(f"error: {path} {message}", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("settings", "completions"),
    [
        ({"per_device_train_batch_size": None}, 8),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}, 6),
        ({"per_device_train_batch_size": "2", "steps_per_generation": 4, "gradient_accumulation_steps": 3}, 8),
        ({"per_device_train_batch_size": 2, "generation_batch_size": 512}, 64),
    ],
    ids=str,
)
def test_episodes_of_a_gpu_are_those_that_the_trainer_would_generate(settings, completions, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert from_training_config(str(path), gpus=8)["completions"] == completions


def test_values_in_a_file_may_be_texts_as_trl_takes_them(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("per_device_train_batch_size: '2'\nuse_vllm: 'false'\nuse_peft: 'true'\nbeta: '0.0'\nlora_r: '4'")
    fields = from_training_config(str(path), gpus=8)
    assert "generation" not in fields
    assert (fields["completions"], fields["lora_rank"], fields["reference"]) == (2, 4, False)


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("per_device_train_batch_size: many", "is no number"),
        ("beta: [1]", "is no number"),
        ("use_vllm: perhaps", "is neither true nor false"),
        ("use_peft: 3", "is neither true nor false"),
    ],
)
def test_a_value_in_a_file_that_cannot_be_is_named(setting, problem, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(setting)
    with pytest.raises(ValueError, match=re.escape(f"{path}: `{setting}` {problem}.")):
        from_training_config(str(path), gpus=8)


def test_how_the_model_is_loaded_may_be_written_as_json(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("""model_init_kwargs: '{"dtype": "bfloat16"}'""")
    assert from_training_config(str(path), gpus=8)["dtype"] == "bfloat16"
    path.write_text("model_init_kwargs: '{'")
    with pytest.raises(ValueError, match="`model_init_kwargs` is a text that is not JSON"):
        from_training_config(str(path), gpus=8)


def test_a_plan_can_be_a_part_of_another_command_line(capsys):
    options = ["--shape", SHAPE, "--zero-stage", "2"]
    parser = argparse.ArgumentParser()
    add_arguments(parser.add_subparsers().add_parser("plan"))
    run(parser.parse_args(["plan", *options]))
    output = capsys.readouterr().out
    main(options)
    assert capsys.readouterr().out == output
    with pytest.raises(ValueError, match="3 GPUs cannot be spread evenly over 2 nodes"):
        run(parser.parse_args(["plan", *options, "--gpus", "3", "--nodes", "2"]))


@pytest.mark.parametrize(("text", "size"), [("80GiB", 80 * GIB), ("80GB", 80e9), ("1.5 TiB", 1.5 * 2**40), ("42", 42)])
def test_sizes_are_read_with_their_units(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zero_stage": 4}, "zero_stage"),
        ({"offload_optimizer": True}, "ZeRO only"),
        ({"zero_stage": 2, "offload_param": True}, "ZeRO-3 and FSDP2 only"),
        ({"zero_stage": 3, "fsdp": True}, "not both"),
        ({"fsdp": True, "offload_optimizer": True}, "ZeRO only"),
    ],
)
def test_strategies_that_do_not_exist_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Strategy(**options)


def test_ddp_in_bfloat16_warns_of_missing_master_weights():
    one = estimate(PlannedRun(CONFIGS["qwen3"], gpus=2, gpu_memory=GIB, generation="vllm-server"), Strategy(0))
    assert any("float32 copy" in note for note in one.notes)
