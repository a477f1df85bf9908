"""Metrics of the numbers that environments report in `info`."""

import logging
import math
from numbers import Real
from typing import Any

import numpy as np
import torch

from ..rollout.observations import mended
from .as_json import text_of


logger = logging.getLogger(__name__)

MOST_NAMES = 32


class InfoMetrics:
    """
    Means of the numbers in `info`, as `info/<name>`. At most `MOST_NAMES` names in a run, those that came first: an
    environment may make up new ones for ever.
    """

    def __init__(self):
        self._names: list[str] = []
        self._has_warned = False

    def of(self, numbers: list[dict[str, float]]) -> dict[str, float]:
        """
        Means over the episodes that report a number of the name.

        Args:
            numbers (`list[dict[str, float]]`):
                [`numbers_in`] of the `info` of episodes, of all processes: the names must be the same on each.
        """
        new = sorted({name for episode in numbers for name in episode} - set(self._names))
        room = MOST_NAMES - len(self._names)
        self._names += new[:room]
        if new[room:] and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "`info` has more than %d numbers; these and further ones are not logged as metrics: %s.",
                MOST_NAMES,
                ", ".join(name[:50] for name in new[room:][:5]),
            )
        values = {name: [episode[name] for episode in numbers if name in episode] for name in self._names}
        return {f"info/{name}": sum(v) / len(v) for name, v in values.items() if v}


def numbers_in(info: dict[str, Any]) -> dict[str, float]:
    """The finite numbers and booleans of an `info`, by name, also those of NumPy and PyTorch."""
    numbers = {}
    for name, value in info.items():
        if isinstance(value, (Real, np.bool_)) or (isinstance(value, torch.Tensor) and value.dim() == 0):
            try:
                number = float(value)
            except (OverflowError, TypeError, RuntimeError):  # too large an integer, a complex tensor
                continue
            if math.isfinite(number):
                numbers[mended(text_of(name))] = number
    return numbers
