"""JSON and text of anything: what an environment or a rollout reports may be no plain data."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np


_DEEPEST = 50


def to_json(value: Any) -> str:
    """JSON in ASCII of anything: what JSON cannot hold is written as text."""
    return json.dumps(_plain(value, _DEEPEST), allow_nan=False)


def _plain(value: Any, depth: int) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, float) and np.isfinite(value):
        return value
    if isinstance(value, int):  # Python refuses to write out more than 4,300 digits
        return value if value.bit_length() < 10_000 else f"an integer of {value.bit_length()} bits"
    if isinstance(value, Mapping) and depth:
        return {text_of(key): _plain(item, depth - 1) for key, item in value.items()}
    if isinstance(value, list | tuple) and depth:
        return [_plain(item, depth - 1) for item in value]
    return text_of(value)


def text_of(value: Any) -> str:
    """The text of anything, also of what cannot say one."""
    try:
        return str(value)
    except Exception:  # whatever the object's own conversion raises
        return f"{type(value).__name__} without text"
