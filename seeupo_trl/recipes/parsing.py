"""How a script reads its command line and its YAML file, as TRL's scripts do, and says what is wrong with them."""

import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from transformers import TrainingArguments
from trl import TrlParser

from ..envs.plain import is_number, is_whole
from ..plan.settings_file import read_settings
from .mistakes import UsageError, nearest, program, replace_what_cannot_be_printed, reported


class ScriptParser(TrlParser):
    """`TrlParser` whose errors are a [`UsageError`], in place of the usage of 200 options."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. See `{self.prog} --help`.")

    def set_defaults_with_config(self, **settings: Any) -> list[str]:
        for dataclass in self.dataclass_types:
            for name, kind in get_type_hints(dataclass).items():
                if name in settings:
                    settings[name] = _with_whole_numbers(settings[name], kind)
        return super().set_defaults_with_config(**settings)


def run(
    main: Callable[..., Any],
    dataclasses: Sequence[type],
    configs: Path,
    demonstration: str | None = None,
    arguments: Sequence[str] | None = None,
) -> None:
    """
    Run a script: parse its arguments, call its function, and report the user's mistakes without a traceback.

    Args:
        main (`Callable`):
            Called with an instance of each dataclass.
        dataclasses (`Sequence[type]`):
            What the arguments are.
        configs (`Path`):
            Directory of the configurations that `--config` may give by name.
        demonstration (`str`, *optional*):
            Name of the configuration that is used when neither `--config` nor `--model_name_or_path` is given.
        arguments (`Sequence[str]`, *optional*):
            Arguments. Defaults to those of the process.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    replace_what_cannot_be_printed()
    with reported():
        parsed = parse(dataclasses, configs, demonstration, arguments)
        for options in parsed:
            if isinstance(options, TrainingArguments):
                check_output_dir(options.output_dir)
        main(*parsed)


def parse(
    dataclasses: Sequence[type], configs: Path, demonstration: str | None, arguments: Sequence[str]
) -> tuple[Any, ...]:
    """
    Instances of the dataclasses, see [`run`].

    Raises:
        [`UsageError`]:
            When an option or a key of the file is unknown, or a value cannot be.
    """
    arguments = _named_config(list(arguments), configs, demonstration)
    parser = ScriptParser(dataclasses, prog=program())
    if "--config" in arguments:
        path = arguments[arguments.index("--config") + 1]
        try:
            settings = read_settings(path)
        except ValueError as error:
            raise UsageError(str(error)) from error
        _check_types(dataclasses, settings, path)
    try:
        *parsed, from_file, from_command_line = parser.parse_args_and_config(
            arguments, return_remaining_strings=True, separate_remaining_strings=True
        )
    except UsageError:
        raise
    except (ValueError, TypeError, ImportError, OSError) as error:
        # what the dataclasses say to their values
        raise UsageError(str(error)) from error
    if from_command_line:
        word = from_command_line[0]
        options = parser._option_string_actions
        raise UsageError(f"unknown option: {word}.{nearest(word.split('=')[0], options)} See `{parser.prog} --help`.")
    if from_file:
        key = from_file[0].removeprefix("--")
        keys = {action.dest for action in parser._actions}
        raise UsageError(f"unknown key in {arguments[arguments.index('--config') + 1]}: {key}.{nearest(key, keys)}")
    return tuple(parsed)


def _check_types(dataclasses: Sequence[type], settings: dict[str, Any], path: str) -> None:
    """
    What argparse does with the words of a command line, and not with the values of a file.

    Raises:
        [`UsageError`]:
            When a value is of another type than its field. Text is not looked at: argparse makes of it what it makes
            of a word.
    """
    for dataclass in dataclasses:
        for name, kind in get_type_hints(dataclass).items():
            value = settings.get(name)
            passes = name in _WIDER or isinstance(value, str) or (value is None and name in _MAY_BE_NULL)
            if name in settings and not passes and not _fits(value, kind):
                shown = json.dumps(value, default=str, skipkeys=True)
                raise UsageError(f"--{name} is {shown} in {path}; give {_described(kind)}.")


# transformers takes lists or mappings for these, too
_WIDER = ("fsdp", "attn_implementation", "dtype")
# no restriction of what is sampled, and no evaluation, whatever their types say
_MAY_BE_NULL = ("top_k", "top_p", "repetition_penalty", "per_device_eval_batch_size")

_DESCRIBED = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text (in quotes)",
    dict: "a mapping",
    NoneType: "null",
}


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value that YAML has read is of a field's type."""
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, *arguments) for item in value)
    if origin in (int, float):
        # without a limit; NaN is equal to nothing
        is_one = is_whole(_with_whole_numbers(value, int)) if origin is int else is_number(value)
        return (is_one and value == value) or value == math.inf
    if origin is bool:
        return value is None or value in (False, True)
    if origin is str:
        # `no` and an empty value are no text to YAML; whether they can be, the option says
        return value is None or isinstance(value, (str, bool))
    return isinstance(value, origin) if origin in _DESCRIBED else True


def _with_whole_numbers(value: Any, kind: Any) -> Any:
    """A value with its numbers such as 8.0 as whole ones, where its field counts."""
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        for one in arguments:
            value = _with_whole_numbers(value, one)
    elif origin is list and isinstance(value, list):
        return [_with_whole_numbers(item, *arguments) for item in value]
    elif origin is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _described(kind: Any) -> str:
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(_described, arguments)))
    if origin is list:
        return f"a list, each of it {_described(*arguments)}"
    return _DESCRIBED.get(origin, "one of its names")


def check_output_dir(output_dir: str) -> None:
    """
    Whether results can be written, tried before anything is computed. Nothing is left behind.

    Raises:
        [`UsageError`]:
            When they cannot.
    """
    if not output_dir:
        raise UsageError("--output_dir is empty; give the directory that the results are written to.")
    # the directory is made when there is something to write; until then what it will lie in says whether it can be
    path = Path(output_dir).absolute()
    there = next(directory for directory in (path, *path.parents) if os.path.lexists(directory))
    if not there.is_dir():
        raise UsageError(f"--output_dir {output_dir}: {there} is a file; give a directory.")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UsageError(
            f"--output_dir {output_dir}: nothing can be written to {there} ({error.strerror})."
        ) from error


def _named_config(arguments: list[str], configs: Path, demonstration: str | None) -> list[str]:
    """The arguments with `--config` as TRL's parser takes it: two words, the second one the path of a file."""
    words = []
    for argument in arguments:
        words += argument.split("=", 1) if argument.startswith("--config=") else [argument]
    if "--config" not in words:
        names_model = any(word.split("=")[0] == "--model_name_or_path" for word in words)
        if demonstration is None or names_model:
            return words
        return ["--config", str(configs / f"{demonstration}.yaml"), *words]
    position = words.index("--config") + 1
    if position == len(words):
        raise UsageError("--config needs a file, or the name of one of the configurations: " + _names(configs) + ".")
    given = words[position]
    if not Path(given).is_file():
        shipped = configs / f"{given}.yaml"
        if not shipped.is_file():
            names = [path.stem for path in configs.glob("*.yaml")]
            raise UsageError(
                f"there is no file {given!r}, nor a configuration of that name.{nearest(given, names)} "
                f"Configurations: {_names(configs)}."
            )
        words[position] = str(shipped)
    return words


def _names(configs: Path) -> str:
    return ", ".join(sorted(path.stem for path in configs.glob("*.yaml")))
