"""The command answers at once: help with examples, the version, and the nearest name for an unknown one."""

import json
import subprocess
import sys

import pytest
from command import environment, seeupo_trl

from seeupo_trl import __version__
from seeupo_trl.command_line.main import COMMANDS, main
from seeupo_trl.command_line.scripts import SCRIPTS


NAMES = [(command, name) for command, scripts in SCRIPTS.items() for name in scripts]
HELPS = [[], ["--help"], ["train"], ["train", "--help"], ["evaluate", "-h"], ["doctor", "--help"], ["view", "-h"]]
HELPS += [[command, name, "--help"] for command, name in NAMES]

WITHOUT_TORCH = """
import sys
from seeupo_trl.command_line.main import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
finally:
    print(sorted({"torch", "transformers"} & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", HELPS, ids=" ".join)
def test_help_shows_examples_without_torch(arguments):
    command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment())
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert done.stdout.startswith("usage: seeupo-trl")
    examples = done.stdout.partition("examples:\n")[2]
    assert examples.lstrip().startswith("seeupo-trl ")
    assert max(map(len, done.stdout.splitlines())) < 120


def test_version_needs_no_torch():
    command = [sys.executable, "-c", WITHOUT_TORCH, "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment())
    assert (done.returncode, done.stderr) == (0, "[]\n")


@pytest.mark.parametrize("name", NAMES, ids=" ".join)
def test_help_of_a_script_has_its_options_and_configurations(name, capsys):
    main([*name, "--help"])
    shown = capsys.readouterr().out
    script = SCRIPTS[name[0]][name[1]]
    for option in script.arguments.__dataclass_fields__:
        assert f"--{option} " in shown
    for word in ("smollm2_bfcl", "zero3_offload", "--num_processes", f"examples/{script.file}"):
        assert word in shown


def test_version():
    done = seeupo_trl("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"seeupo-trl {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command: trian. Did you mean 'train'?"),
        (["--versoin"], "unknown option: --versoin. Did you mean '--version'?"),
        (["train", "bfc"], "'bfc' is not one of: bfcl, appworld, openenv, textarena. Did you mean 'bfcl'?"),
        (["evaluate", "appworld"], "'appworld' is not one of: bfcl."),
        (["train", "bfcl", "--num_processes", "two"], "argument --num_processes: invalid int value: 'two'"),
        (["train", "bfcl", "--num_processes", "0"], "--num_processes must be at least 1; got 0."),
        (["train", "bfcl", "--accelerate_config", "zero4"], "nor a configuration of that name. Did you mean 'zero3"),
        (["plan", "--gpuss", "8"], "unknown option: --gpuss. Did you mean '--gpus'? See `seeupo-trl plan --help`."),
        (["plan", "--config", "smollm2_bfc"], "no file 'smollm2_bfc', nor a configuration of that name. Did you mean"),
        (["plan"], "Which model?"),
        (["view"], "the following arguments are required: run_dir. See `seeupo-trl view --help`."),
        (["view", "run", "--itertion", "2"], "unknown option: --itertion. Did you mean '--iteration'?"),
        (["view", "no/such/run"], "no/such/run has no saved trajectories"),
        (["doctor", "--jsn"], "unknown option: --jsn. Did you mean '--json'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_unknown_name_is_a_line_with_the_nearest_one(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    captured = capsys.readouterr()
    assert (end.value.code, captured.out, captured.err.count("\n")) == (2, "", 1)
    assert captured.err.startswith("seeupo-trl")
    assert message in captured.err


def test_a_closed_pipe_ends_the_command_without_a_word():
    command = [sys.executable, "-u", "-m", "seeupo_trl", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        process.stdout.close()
        assert process.stderr.read() == b""


def test_plan_and_view_are_the_modules_commands(tmp_path):
    shape = "layers=4,hidden=64,intermediate=128,heads=4,kv_heads=2,head_dim=16,vocabulary=1000"
    done = seeupo_trl("plan", "--shape", shape, "--zero-stage", "3", "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["strategies"]) == 1
    done = seeupo_trl("view", tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert str(tmp_path) in done.stderr


def test_plan_takes_the_names_of_configurations(capsys):
    shape = "layers=4,hidden=64,intermediate=128,heads=4,kv_heads=2,head_dim=16,vocabulary=1000"
    main(["plan", "--config", "qwen3_14b_bfcl_lora", "--accelerate-config", "zero3", "--shape", shape, "--json"])
    (strategy,) = json.loads(capsys.readouterr().out)["strategies"]
    assert strategy["strategy"] == "ZeRO-3, LoRA r=32"


def test_help_of_a_plan_calls_it_by_its_name(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    shown = capsys.readouterr().out
    assert shown.startswith("usage: seeupo-trl plan")
    assert "examples:" in shown and "  seeupo-trl plan --model Qwen/Qwen3-14B" in shown
    assert "python -m" not in shown


def test_every_command_is_in_the_help(capsys):
    main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"\n  {command} " in shown for command in COMMANDS)
    assert all(f" {name}" in shown for name in SCRIPTS["train"])
