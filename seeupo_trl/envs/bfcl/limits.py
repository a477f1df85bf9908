"""
What a call of a simulated service may cost. Nothing else stands between a model's JSON and a hung trainer.

The services are plain Python that runs in the caller's thread: a loop that does not end, or one long operation on
integers inside the interpreter, could not be stopped from outside. So a call is looked at before it is made. Most
methods take time proportional to their arguments and to the state earlier arguments left behind; those that do not are
listed in `refuse_expensive` and get an error in place of a result. Arguments that the official executor could not
evaluate are refused with its words.

None of this changes a score: what is refused is an error in the official executor as well, or it reads only and no
ground truth contains its result. `refuse_circle` is the exception, for the services a model talks to; the checks play
such a call as the official executor does, which makes a directory that contains itself.
"""

import math
from typing import Any


# Python's own limits. A longer integer cannot be printed, more brackets (those of the call included) cannot be parsed:
# the official executor, which prints and parses every call, fails there.
MAX_INTEGER_DIGITS = 4300
MAX_NESTING = 200
INTEGER_BOUND = 10**MAX_INTEGER_DIGITS

# The ground truth needs 10 digits of precision at most, and the longest search of a whole tree lists 5120 characters.
MAX_PRECISION = 1000
MAX_NUMBER_TEXT = 1000
MAX_POWER_DIGITS = 2 * MAX_INTEGER_DIGITS
MAX_PATH_CHARACTERS = 500_000

# A message takes one of 90,000 numbers, drawn until a free one is found.
MAX_MESSAGES = 50_000

PRECISION_ARGUMENTS = {"logarithm": "precision", "square_root": "precision", "round_number": "decimal_places"}


def plain_copy(value: Any, nesting: int = 0) -> Any:
    """
    Copy an argument that came as JSON: services keep lists and dicts they are given.

    Args:
        value (`Any`):
            The argument.
        nesting (`int`, *optional*, defaults to `0`):
            Number of containers around it.

    Raises:
        `ValueError`, `NameError`, `TypeError`: where the official executor could not evaluate the argument.
    """
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, int):
        if not -INTEGER_BOUND < value < INTEGER_BOUND:
            raise ValueError(f"Exceeds the limit ({MAX_INTEGER_DIGITS} digits) for integer string conversion")
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise NameError(f"name '{str(value).removeprefix('-')}' is not defined")
        return value
    if nesting == MAX_NESTING:
        raise ValueError("too many nested parentheses")
    if isinstance(value, dict):
        return {plain_copy(key, nesting + 1): plain_copy(item, nesting + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain_copy(item, nesting + 1) for item in value)
    raise TypeError(f"{type(value).__name__} is not a type of JSON")


def refuse_expensive(service: Any, name: str, arguments: dict[str, Any]) -> None:
    """
    Raise an error if a call would do an absurd amount of work.

    Args:
        service (`Any`):
            The service, before the call.
        name (`str`):
            Name of the method.
        arguments (`dict`):
            Arguments, as returned by [`plain_copy`].
    """
    if name in PRECISION_ARGUMENTS:
        _limit_precision(PRECISION_ARGUMENTS[name], arguments)
    elif name == "power":
        _limit_power(arguments.get("base"), arguments.get("exponent"))
    elif name == "find":
        start = service._navigate_to_directory(arguments.get("path", "."))
        if not isinstance(start, dict):  # a dict is the error of a path that does not exist
            _limit_search(start)
    elif name == "du":
        _limit_search(service._current_dir)
    elif name == "send_message" and len(service.generated_ids) > MAX_MESSAGES:
        raise ValueError(f"More than {MAX_MESSAGES} messages were sent")


def refuse_circle(service: Any, name: str, arguments: dict[str, Any]) -> None:
    """
    Raise an error if a call would put a directory into itself, where searches never end.

    Args:
        service (`GorillaFileSystem`):
            The service, before the call.
        name (`str`):
            Name of the method. Only `cp` and `mv` can do so.
        arguments (`dict`):
            Arguments, as returned by [`plain_copy`].
    """
    if name not in ("cp", "mv"):
        return
    here = service._current_dir
    source, destination = (here.contents.get(arguments.get(key)) for key in ("source", "destination"))
    if (
        arguments.get("source") == "."
    ):  # officially a name of the current directory, once there is an entry of that name
        source = here if source else None
    if type(source) is not type(here):
        return
    into_itself = source is here or (source is destination and name == "cp")
    # copies share what they contain, so that the destination may be inside of the source
    if into_itself or (source is not destination and _contains(source, destination)):
        raise ValueError(f"{name}: '{arguments['source']}' cannot be put into itself")


def _contains(directory: Any, wanted: Any) -> bool:
    seen, pending = set(), [directory]
    while pending:
        for item in pending.pop().contents.values():
            if item is wanted:
                return True
            if type(item) is type(directory) and id(item) not in seen:
                seen.add(id(item))
                pending.append(item)
    return False


def _limit_precision(name: str, arguments: dict[str, Any]) -> None:
    # mpmath reads numbers, and `precision`, from text too; its pattern for complex ones takes quadratic time.
    for value in arguments.values():
        if isinstance(value, str) and len(value) > MAX_NUMBER_TEXT:
            raise ValueError(f"Text of {len(value)} characters is not a number")
    try:
        value = abs(int(arguments[name]))
    except (KeyError, TypeError, ValueError):
        return  # missing or not a number: the method says so
    if value > MAX_PRECISION:
        raise ValueError(f"{name} must be at most {MAX_PRECISION}")


def _limit_power(base: Any, exponent: Any) -> None:
    if not (isinstance(base, int) and isinstance(exponent, int)) or abs(base) <= 1:
        return
    # a base of 2 or more has more digits than the limit from this exponent on
    if exponent > 4 * MAX_POWER_DIGITS or exponent * math.log10(abs(base)) > MAX_POWER_DIGITS:
        raise ValueError(f"Exceeds the limit ({MAX_INTEGER_DIGITS} digits) for integer string conversion")


def _limit_search(start: Any) -> None:
    """Walk a directory as `find` would, in no more steps than allowed; copies of directories may share and cycle."""
    characters = 0
    pending = [(start, 0)]
    while pending:
        directory, path_length = pending.pop()
        for name, item in directory.contents.items():
            length = path_length + 1 + len(name)
            characters += length
            if characters > MAX_PATH_CHARACTERS:
                raise RecursionError(
                    "maximum recursion depth exceeded: a directory contains itself, or too many others"
                )
            if type(item) is type(start):
                pending.append((item, length))
