"""
`seeupo-trl train` and `seeupo-trl evaluate`: the scripts of `examples/`, which an installed package carries.

A script runs in this process, or, when its arguments have one of the launcher's, in several: then `accelerate launch`
starts `python -m seeupo_trl` again in each of them, without those arguments.
"""

import argparse
import os
import runpy
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from ..recipes import arguments as script_arguments
from ..recipes.mistakes import UsageError, call_program, nearest, program
from .parser import Parser


@dataclass(frozen=True)
class Script:
    """A script of `examples/`."""

    file: str
    arguments: type  # the dataclass of its own arguments
    summary: str
    examples: tuple[str, ...]
    packages: tuple[str, ...] = ()  # modules that it imports besides those of this package
    install: str = ""  # the command that brings them


SCRIPTS = {
    "train": {
        "bfcl": Script(
            "train_bfcl.py",
            script_arguments.BfclArguments,
            "Train an agent on the multi-turn tasks of the Berkeley Function-Calling Leaderboard. Without --config or "
            "--model_name_or_path: a demonstration on a CPU, a quarter of an hour (--config smollm2_bfcl).",
            (
                "seeupo-trl train bfcl",
                "seeupo-trl train bfcl --max_steps 20 --output_dir outputs/longer --config smollm2_bfcl",
                "seeupo-trl train bfcl --config qwen3_14b_bfcl_lora",
                "seeupo-trl train bfcl --config qwen3_14b_bfcl --accelerate_config zero3",
                "seeupo-trl train bfcl --config my_run.yaml --resume_from_checkpoint true",
            ),
        ),
        "appworld": Script(
            "train_appworld.py",
            script_arguments.AppWorldArguments,
            "Train an agent on AppWorld, which needs an environment of its own (`seeupo-trl doctor` says how to get "
            "it). The code that the model writes is executed, with your rights.",
            (
                "seeupo-trl train appworld --config qwen3_14b_appworld --accelerate_config zero3",
                "seeupo-trl train appworld --model_name_or_path Qwen/Qwen3-0.6B --num_servers 8 --max_steps 10",
            ),
        ),
        "openenv": Script(
            "train_openenv.py",
            script_arguments.OpenEnvArguments,
            "Train an agent on a game that an OpenEnv server plays: a demonstration, which starts the server itself.",
            (
                "seeupo-trl train openenv",
                "seeupo-trl train openenv --interface tools --model_name_or_path Qwen/Qwen3-0.6B",
                "seeupo-trl train openenv --serve 8000",
                "seeupo-trl train openenv --url http://127.0.0.1:8000",
            ),
            packages=("openenv", "uvicorn"),
            install="pip install openenv-core",
        ),
        "textarena": Script(
            "train_textarena.py",
            script_arguments.TextArenaArguments,
            "Train an agent on a single-player game of TextArena. Without --config or --model_name_or_path: a "
            "demonstration on a CPU (--config smollm2_textarena).",
            (
                "seeupo-trl train textarena",
                "seeupo-trl train textarena --config qwen2.5_0.5b_textarena",
                "seeupo-trl train textarena --config qwen2.5_0.5b_textarena --update_order simultaneous",
            ),
        ),
    },
    "evaluate": {
        "bfcl": Script(
            "evaluate_bfcl.py",
            script_arguments.EvaluationArguments,
            "Play each task k times, and report how often one attempt, any of k and all k succeed. Without --config "
            "or --model_name_or_path: a demonstration on a CPU (--config smollm2_evaluate).",
            (
                "seeupo-trl evaluate bfcl",
                "seeupo-trl evaluate bfcl --config smollm2_evaluate --model_name_or_path outputs/smollm2-bfcl",
                "seeupo-trl evaluate bfcl --config qwen3_14b_evaluate --accelerate_config ddp",
            ),
        ),
    },
}

WIDTH = 100

COMMON_OPTIONS = """\
common options, of some 200 (--help_all lists them all):
  --config FILE               YAML of options, or the name of a configuration below; options given beside it win
  --model_name_or_path MODEL  directory, or name on the Hub
  --output_dir DIRECTORY      where the results are written
  --learning_rate, --max_steps, --num_generations, --per_device_train_batch_size, --max_turns, ...
  --save_trajectories true    keep every episode, for `seeupo-trl view`
  --use_peft true             train an adapter
  --use_vllm true             sample with vLLM

several processes (this process starts them with `accelerate launch`):
  --num_processes N           how many; without these options there is one, on the first visible GPU or the CPU
  --accelerate_config FILE    YAML of `accelerate config`, or a name below
  --num_machines, --machine_rank, --main_process_ip, --main_process_port
                              as for `accelerate launch`, on each node

errors of yours take a line, and the exit code is 2; --traceback shows where they were found"""


def examples_directory() -> Path:
    """
    The directory of the scripts: inside an installed package, or beside it in a checkout.

    Raises:
        [`UsageError`]:
            When there is neither.
    """
    package = Path(__file__).resolve().parents[1]
    for directory in (package / "examples", package.parent / "examples"):
        if (directory / SCRIPTS["train"]["bfcl"].file).is_file():
            return directory
    raise UsageError(f"the scripts are neither in {package} nor beside it; install seeupo-trl again.")


def run_script(command: str, arguments: Sequence[str]) -> None:
    """
    `seeupo-trl train` or `seeupo-trl evaluate`.

    Args:
        command (`str`):
            `"train"` or `"evaluate"`.
        arguments (`Sequence[str]`):
            The words after it.

    Raises:
        [`UsageError`]:
            When there is no such script, or the launcher's arguments are wrong.
    """
    scripts = SCRIPTS[command]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_command_help(command))
        return
    name, *arguments = arguments
    if name not in scripts:
        known = ", ".join(scripts)
        raise UsageError(f"{command} what? {name!r} is not one of: {known}.{nearest(name, scripts)}")
    script = scripts[name]
    if {"-h", "--help"} & set(arguments):
        print(_script_help(command, name, script))
        return
    arguments = ["--help" if word == "--help_all" else word for word in arguments]
    call_program(f"seeupo-trl {command} {name}")
    launcher, arguments = _launcher_arguments(arguments)
    if launcher:
        _launch(launcher, [command, name, *arguments])
        return
    if "LOCAL_RANK" not in os.environ:
        # one process, one GPU: the Trainer would spread each batch over all that it sees
        os.environ["CUDA_VISIBLE_DEVICES"] = first_gpu(os.environ.get("CUDA_VISIBLE_DEVICES"))
    sys.argv[1:] = arguments
    try:
        runpy.run_path(str(examples_directory() / script.file), run_name="__main__")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in script.packages:
            raise
        raise UsageError(f"{missing} is not installed. Run\n    {script.install}") from error


def first_gpu(visible: str | None) -> str:
    """`CUDA_VISIBLE_DEVICES` for one process: the first device that is visible, if any is."""
    return "0" if visible is None else visible.partition(",")[0]


def _launcher_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Arguments of `accelerate launch`, and those of the script."""
    parser = Parser(prog=program(), add_help=False, allow_abbrev=False)
    parser.add_argument("--accelerate_config")
    parser.add_argument("--num_processes", type=int)
    parser.add_argument("--num_machines", type=int)
    parser.add_argument("--machine_rank", type=int)
    parser.add_argument("--main_process_ip")
    parser.add_argument("--main_process_port", type=int)
    options, rest = parser.parse_known_args(arguments)
    given = {name: value for name, value in vars(options).items() if value is not None}
    if options.num_processes is not None and options.num_processes < 1:
        raise UsageError(f"--num_processes must be at least 1; got {options.num_processes}.")
    config = given.pop("accelerate_config", None)
    if config is None and given == {"num_processes": 1}:
        return [], rest
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    if config is not None:
        words = ["--config_file", str(find_configuration("--accelerate_config", config, "accelerate_configs")), *words]
    elif words and not _has_default_launcher_config():
        # without the first, processes on a CPU would be one; the others are the launcher's defaults, said aloud
        words = ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", *words]
    return words, rest


def find_configuration(option: str, given: str, folder: str) -> Path:
    """
    The file that an option asks for, by its path or by the name of a configuration in a folder of the examples.

    Raises:
        [`UsageError`]:
            When there is neither.
    """
    if Path(given).is_file():
        return Path(given)
    shipped = examples_directory() / folder / f"{given}.yaml"
    if not shipped.is_file():
        names = _names(folder)
        raise UsageError(
            f"{option}: there is no file {given!r}, nor a configuration of that name."
            f"{nearest(given, names)} Configurations: {', '.join(names)}."
        )
    return shipped


def _has_default_launcher_config() -> bool:
    from accelerate.commands.config import default_config_file

    return os.path.isfile(default_config_file)


def _launch(launcher: list[str], words: list[str]) -> None:
    """Start processes of this command, and leave with their exit code if they fail: they have said why."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch_command(launch_command_parser().parse_args([*launcher, "--module", "seeupo_trl", *words]))
    except ChildFailedError as error:
        sys.exit(error.get_first_failure()[1].exitcode)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)


def _command_help(command: str) -> str:
    scripts = SCRIPTS[command]
    width = max(map(len, scripts))
    lines = [f"usage: seeupo-trl {command} {'|'.join(scripts)} [--config FILE] [options]", ""]
    lines += [
        f"  {name.ljust(width)}  {script.summary.split('. ')[0].rstrip('.')}" for name, script in scripts.items()
    ]
    lines += ["", f"seeupo-trl {command} {next(iter(scripts))} --help says more.", "", "examples:"]
    lines += [f"  {example}" for script in scripts.values() for example in script.examples[:2]]
    return "\n".join(lines)


def _script_help(command: str, name: str, script: Script) -> str:
    parser = argparse.ArgumentParser(
        prog=f"seeupo-trl {command} {name}",
        usage="%(prog)s [--config FILE] [options]",
        description=textwrap.fill(script.summary, WIDTH),
        epilog="\n".join(
            [
                COMMON_OPTIONS,
                "",
                "examples:",
                *(f"  {example}" for example in script.examples),
                "",
                "configurations:",
                textwrap.indent(textwrap.fill(", ".join(_names("configs")), WIDTH - 2), "  "),
                "accelerate configurations:",
                f"  {', '.join(_names('accelerate_configs'))}",
                "the script, to begin one of your own:",
                f"  {examples_directory() / script.file}",
            ]
        ),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=WIDTH),
        add_help=False,
    )
    own = parser.add_argument_group("options of the task")
    for option in fields(script.arguments):
        default = None if option.default is MISSING else option.default
        shown = "" if default is None else f" (default: {default})"
        own.add_argument(f"--{option.name}", metavar=_kind(option.type), help=option.metadata["help"] + shown)
    return parser.format_help().rstrip()


def _kind(annotation: object) -> str:
    """What a value is, in a word."""
    text = str(annotation)
    return "N" if "int" in text else "X" if "float" in text else "TEXT"


def _names(folder: str) -> list[str]:
    return sorted(path.stem for path in (examples_directory() / folder).glob("*.yaml"))
