"""
The command `seeupo-trl`: one word says what is to be done, and its module does it.

Modules are imported when they are needed: help and the version come without torch.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from .. import __version__
from ..recipes.mistakes import (
    TRACEBACK_VARIABLE,
    UsageError,
    call_program,
    nearest,
    replace_what_cannot_be_printed,
    reported,
)
from .parser import Parser


HELP = f"""\
usage: seeupo-trl COMMAND ...

Train LLM agents turn by turn, from the last turn to the first (SeeUPO, arXiv 2602.06554).

commands:
  train NAME     train an agent: bfcl, appworld, openenv or textarena
  evaluate bfcl  success of a model over several attempts, with confidence intervals
  plan           what a run needs in memory, before it is started
  view RUN       the trajectories of a run as a page
  doctor         versions, devices, what is installed and what brings the rest

options:
  --version      the version
  --traceback    show where a mistake was found, too (as {TRACEBACK_VARIABLE}=1 does)
  -h, --help     this text; every command has its own

examples:
  seeupo-trl doctor
  seeupo-trl train bfcl
  seeupo-trl train bfcl --config qwen3_14b_bfcl --accelerate_config zero3
  seeupo-trl evaluate bfcl --model_name_or_path outputs/smollm2-bfcl
  seeupo-trl view outputs/smollm2-evaluate --open
  seeupo-trl plan --model Qwen/Qwen3-14B --gpus 8 --gpu-memory 80GiB"""

COMMANDS = ("train", "evaluate", "plan", "view", "doctor")


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Run a command and leave with its exit code: 2 after a mistake of the user.

    Args:
        arguments (`Sequence[str]`, *optional*):
            The words after `seeupo-trl`. Defaults to those of the process.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "--traceback" in arguments:
        arguments.remove("--traceback")
        os.environ[TRACEBACK_VARIABLE] = "1"
    call_program("seeupo-trl")
    replace_what_cannot_be_printed()
    try:
        with reported():
            _dispatch(arguments)
            sys.stdout.flush()
    except BrokenPipeError:
        trains = arguments[:1] in (["train"], ["evaluate"]) and not {"-h", "--help"} & set(arguments)
        if trains:
            raise
        # `| head` has seen enough; what is left in the buffer would raise again at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _dispatch(arguments: list[str]) -> None:
    command, *rest = arguments or ["--help"]
    if command in ("-h", "--help"):
        print(HELP)
    elif command == "--version":
        print(f"seeupo-trl {__version__}")
    elif command in ("train", "evaluate"):
        from .scripts import run_script

        run_script(command, rest)
    elif command == "plan":
        from ..plan.__main__ import main as plan

        plan(rest, _PlanParser(prog="seeupo-trl plan"))
    elif command == "view":
        from ..view.__main__ import main as view

        view(rest, Parser(prog="seeupo-trl view"))
    elif command == "doctor":
        from .doctor import main as doctor

        sys.exit(doctor(rest))
    else:
        kind = "option" if command.startswith("-") else "command"
        names = COMMANDS if kind == "command" else ("--help", "--version", "--traceback")
        raise UsageError(f"unknown {kind}: {command}.{nearest(command, names)} See `seeupo-trl --help`.")


class _PlanParser(Parser):
    """Files may be given by the names that `train` takes, too."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        from .scripts import find_configuration

        options = super().parse_args(args, namespace)
        for name, folder in (("config", "configs"), ("accelerate_config", "accelerate_configs")):
            given = getattr(options, name)
            if given is not None:
                option = f"--{name.replace('_', '-')}"
                setattr(options, name, str(find_configuration(option, given, folder)))
        return options
