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
HELPS = [[], ["--help"], ["train"], ["train", "--help"], ["evaluate", "-h"], ["doctor", "--help"]]
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


@pytest.mark.parametrize("arguments", [["--version"], ["view", "--help"]], ids=" ".join)
def test_version_and_view_need_no_torch(arguments):
    command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
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
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert str(tmp_path) in done.stderr


def test_every_command_is_in_the_help(capsys):
    main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"\n  {command} " in shown for command in COMMANDS)
