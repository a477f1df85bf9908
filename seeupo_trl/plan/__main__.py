"""
What a run needs in memory before it is started: `python -m seeupo_trl.plan`.

No weights are loaded and no GPU is needed. Estimates are for GPUs; `memory.py` says what they rest on.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import fields, replace
from typing import Any

from .memory import estimate_all
from .recipes import (
    DTYPES,
    SHAPE_FIELDS,
    dtype_of,
    from_accelerate_config,
    from_training_config,
    load_config,
    parse_bytes,
)
from .report import as_json, as_text
from .run import GIB, PlannedRun, Strategy, all_strategies


DESCRIPTION = """\
What a run needs in memory before it is started. No weights are loaded and no GPU is needed. --model is a name on
the Hub, or a directory or config.json (which works offline); --shape describes a Qwen3-like model by hand."""

EXAMPLES = """\
examples:
  # a recipe, from its own files
  %(prog)s --config examples/configs/qwen3_14b_bfcl.yaml \\
      --accelerate-config examples/accelerate_configs/zero3.yaml --gpu-memory 80GiB --host-memory 1TiB
  # by hand, for all strategies
  %(prog)s --model Qwen/Qwen3-14B --gpus 8 --gpu-memory 80GiB"""


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a plan to a parser."""
    source = parser.add_argument_group("what is trained")
    source.add_argument("--config", help="training yaml, as for the examples; flags override it")
    source.add_argument("--accelerate-config", help="yaml of `accelerate config`: GPUs, nodes and strategy")
    source.add_argument("--model", help="name on the Hub, directory, or config.json")
    source.add_argument("--shape", help=f"shape by hand: {','.join(f'{name}=N' for name in SHAPE_FIELDS)}")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--gpus", type=int, help="GPUs over all nodes (default: 8)")
    machine.add_argument("--gpu-memory", type=_size, default=80 * GIB, metavar="SIZE", help="default: 80GiB")
    machine.add_argument("--nodes", type=int)
    machine.add_argument("--host-memory", type=_size, metavar="SIZE", help="of one host; not checked by default")
    machine.add_argument("--reserve", type=_size, metavar="SIZE", help="of a GPU, for what is no tensor (2GiB)")
    strategy = parser.add_argument_group("strategy (default: a table of all)")
    strategy.add_argument("--zero-stage", type=int, choices=(0, 1, 2, 3), help="0 is DDP")
    strategy.add_argument("--fsdp2", action="store_true")
    strategy.add_argument("--offload-optimizer", action="store_true")
    strategy.add_argument("--offload-param", action="store_true")
    strategy.add_argument("--lora-rank", type=int)
    run = parser.add_argument_group("run")
    run.add_argument("--dtype", choices=DTYPES, help="in which the model is loaded")
    run.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=None, help="mixed precision")
    run.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=None)
    run.add_argument("--optimizer", help="as `optim` of the training arguments")
    run.add_argument("--tokens", type=int, help="of the largest micro-batch (default: `max_tokens_per_microbatch`)")
    run.add_argument("--rows", type=int, help="rows that these are in, for `packing: rows`")
    run.add_argument("--prompt", type=int)
    run.add_argument("--action", type=int)
    run.add_argument("--observation", type=int)
    run.add_argument("--max-context", type=int)
    run.add_argument("--completions", type=int, help="episodes of a GPU, for transformers' key-value cache")
    run.add_argument("--reference", action=argparse.BooleanOptionalAction, default=None, help="`beta` is not 0")
    run.add_argument("--generation", choices=("transformers", "vllm-colocate", "vllm-server"))
    run.add_argument("--vllm-utilization", type=float)
    run.add_argument("--vllm-tensor-parallel", type=int)
    run.add_argument("--vllm-sleep", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--json", action="store_true", help="print everything as json, in bytes")


def build_parser(parser: argparse.ArgumentParser | None = None) -> argparse.ArgumentParser:
    """
    The parser of `python -m seeupo_trl.plan`.

    Args:
        parser (`argparse.ArgumentParser`, *optional*):
            An empty one to begin with, which knows what the program is called and how to report errors.
    """
    parser = parser or argparse.ArgumentParser(prog="python -m seeupo_trl.plan")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    add_arguments(parser)
    return parser


def planned(args: argparse.Namespace) -> tuple[PlannedRun, list[Strategy]]:
    """
    The run and the strategies that a command line asks for: its flags come before what its files say.

    Raises:
        `ValueError`:
            When something is missing or contradictory.
    """
    if (args.offload_optimizer or args.offload_param) and args.zero_stage is None and not args.fsdp2:
        raise ValueError("What can be offloaded depends on the strategy: give `--zero-stage` or `--fsdp2` with it.")
    values: dict[str, Any] = {"gpus": 8, "dtype": "bfloat16"}
    launched: Strategy | None = None
    if args.accelerate_config:
        machine, launched = from_accelerate_config(args.accelerate_config)
        values |= machine
    if args.config:
        values |= from_training_config(args.config, values["gpus"] if args.gpus is None else args.gpus)
    names = {field.name for field in fields(PlannedRun)} - {"config"} | {"model", "lora_rank"}
    values |= {name: value for name, value in vars(args).items() if name in names and value is not None}
    lora_rank = values.pop("lora_rank", None)
    config = load_config(values.pop("model", None), args.shape)
    values["dtype"] = dtype_of(values["dtype"], config)
    if args.zero_stage is not None or args.fsdp2:
        offloaded = {"offload_optimizer": args.offload_optimizer, "offload_param": args.offload_param}
        strategies = [Strategy(args.zero_stage or 0, fsdp=args.fsdp2, **offloaded, lora_rank=lora_rank)]
    elif launched is not None:
        strategies = [replace(launched, lora_rank=lora_rank)]
    else:
        strategies = all_strategies(16 if lora_rank is None else lora_rank)
    return PlannedRun(config=config, **values), strategies


def run(args: argparse.Namespace) -> None:
    """
    Print the plan that the options of [`add_arguments`] ask for.

    Raises:
        `ValueError`, `ImportError`:
            When an option or a file is wrong, or a library is missing; the message is for who gave it.
    """
    # libraries greet on the standard output when they are imported
    with redirect_stdout(sys.stderr):
        planned_run, strategies = planned(args)
        estimates = estimate_all(planned_run, strategies)
        report = as_json(planned_run, estimates) if args.json else as_text(planned_run, estimates)
    print(report)


def main(arguments: Sequence[str] | None = None, parser: argparse.ArgumentParser | None = None) -> None:
    """
    The command line, see `python -m seeupo_trl.plan --help`.

    Args:
        arguments (`Sequence[str]`, *optional*):
            Its words. Defaults to those of the process.
        parser (`argparse.ArgumentParser`, *optional*):
            As in [`build_parser`].
    """
    parser = build_parser(parser)
    args = parser.parse_args(arguments)
    try:
        run(args)
    except (ValueError, ImportError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
