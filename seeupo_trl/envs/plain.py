"""What environments return as plain data: numbers and flags of any library as Python's own, and what JSON can hold."""

import json
import math
import numbers
import re
from typing import Any


# What is nested deeper is read as text. Python takes about a thousand calls, copies and templates take several for a
# level; the official executor of BFCL takes 200 levels.
MAX_NESTING = 256

_TOKENS = re.compile(
    r'(?:<\|)?"(?:[^"\\\n]|\\.)*"(?:\|>)?'  # a string, also between Gemma's quotes; a group has all other tokens
    r"|(\\.|[\w.+-](?=\s*[\[{]|\s+\w)|[^\w\s.,:+-])"
)


def real_number(value: Any) -> float:
    """
    Any finite real number as a `float`: Python's, NumPy's, an array or a tensor of one element, a fraction.

    Raises:
        `ValueError`:
            When it is none.
    """
    number = math.nan
    # float() also reads texts, which are no numbers
    if not isinstance(value, (str, bytes, bytearray)):
        try:
            item = getattr(value, "item", None)  # of arrays and tensors
            number = float(item() if callable(item) else value)
        except Exception:  # whatever the object's own conversion raises
            pass
    if not math.isfinite(number):
        raise ValueError("not a finite real number")
    return number


def is_number(value: Any) -> bool:
    """Whether a value is a real number, which `True` is not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, which `True` is not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def flag(value: Any) -> bool:
    """
    A boolean: Python's, NumPy's, an array or a tensor of one element; a number that is 0 or 1; `None` is `False`.

    Raises:
        `ValueError`:
            When it is none: anything else is true or not by accident, as a method that was not called is.
    """
    number = 0.0 if value is None else real_number(value)
    if number not in (0.0, 1.0):
        raise ValueError("not a boolean")
    return bool(number)


def plain_data(value: Any, name: str) -> Any:
    """
    A value as JSON holds it: text, numbers, booleans, `None`, lists and dicts with text as keys. Tuples become lists,
    arrays and tensors become numbers and lists.

    Args:
        value (`Any`):
            Anything.
        name (`str`):
            What it is, for the error.

    Raises:
        `TypeError`:
            When something in it is nothing of that.
    """
    if value is None or isinstance(value, (bool, str, int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return [plain_data(item, f"{name}[{number}]") for number, item in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{name} has the key {str(key)[:100]}, a {type(key).__name__}; keys must be texts")
        return {key: plain_data(item, f"{name}[{key!r}]") for key, item in value.items()}
    # arrays and tensors of libraries that are not imported here
    as_list = getattr(value, "tolist", None)
    if callable(as_list):
        return plain_data(as_list(), name)
    raise TypeError(
        f"{name} is a {type(value).__name__}; only texts, numbers, booleans, None, lists and dicts (and arrays, as "
        "lists) can be sent"
    )


def parsed_json(text: str) -> Any:
    """
    What a JSON text of anybody says.

    Raises:
        `ValueError`:
            When it is none, or nested too deeply.
    """
    if is_deep_text(text):
        raise ValueError(f"nested more than {MAX_NESTING} levels deep")
    return json.loads(text)


def is_deep_text(text: str) -> bool:
    """
    Whether a JSON text, or one with JSON in it, is nested deeper than may be read. Known before it is parsed: where
    Python's recursion ends, whatever the garbage collector finishes at that moment fails as well, without a word.

    Prose is not nested, however many brackets it leaves open (`[0, 1)`): the count begins anew at all that JSON cannot
    have between two brackets, which is other punctuation, and a word before a bracket or before another word.
    """
    if text.count("[") + text.count("{") <= MAX_NESTING:
        return False
    depth = 0
    for token in _TOKENS.findall(text):
        if token in ("[", "{"):
            depth += 1
            if depth > MAX_NESTING:
                return True
        elif token in ("]", "}"):
            depth = max(depth - 1, 0)
        elif token:
            depth = 0
    return False


def is_deep(value: Any, levels: int = MAX_NESTING) -> bool:
    """Whether lists and dicts are nested deeper than that many levels."""
    if not isinstance(value, list | dict):
        return False
    items = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(is_deep(item, levels - 1) for item in items)
