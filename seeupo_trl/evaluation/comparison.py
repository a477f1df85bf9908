"""Two evaluations on the same tasks, compared task by task."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from .outcome import Outcome


# with fewer, a fair coin for each task shows all of them better or all worse more often than once in twenty times
FEWEST_TASKS = 6


@dataclass(frozen=True)
class Change:
    """
    How success changed between two evaluations.

    Args:
        before (`float`), after (`float`):
            Success: means over tasks of the share of a task's episodes that succeeded.
        standard_error (`float`):
            Of `after - before`: the standard deviation of the tasks' differences, divided by the root of their number.
            Tasks are what was drawn, and a hard task is hard both times, so that the difference is known better than
            either success. NaN with fewer than two tasks.
        tasks (`int`):
            Number of tasks.
    """

    before: float
    after: float
    standard_error: float
    tasks: int

    @property
    def difference(self) -> float:
        """`after - before`."""
        return self.after - self.before

    @property
    def is_beyond_noise(self) -> bool:
        """
        Whether the difference is more than two standard errors. Never with fewer than six tasks: those may all move
        alike by chance, and then the standard error is 0.
        """
        return self.tasks >= FEWEST_TASKS and abs(self.difference) > 2 * self.standard_error


def compare(before: Iterable[Outcome], after: Iterable[Outcome]) -> Change:
    """
    Compare two evaluations on the same tasks, as `trainer.last_evaluation` after each of them. Tasks without a valid
    episode in both are left out.

    Args:
        before (`list[Outcome]`), after (`list[Outcome]`):
            The outcomes of the episodes of each.

    Raises:
        `ValueError`:
            When no episode reports success, and when they have no task in common.
    """
    before, after = list(before), list(after)
    valid = [outcome for outcome in before + after if not outcome.is_quarantined]
    if valid and all(outcome.success is None for outcome in valid):
        raise ValueError(
            "No episode of these evaluations reports success, so there is nothing to compare: set "
            '`success_threshold`, the smallest reward of a success, or report `info["success"]`.'
        )
    return compare_success(success_by_task(before), success_by_task(after))


def compare_success(first: Mapping[str, float], second: Mapping[str, float]) -> Change:
    """
    Compare two evaluations by the success of their tasks, see [`success_by_task`].

    Args:
        first (`dict[str, float]`), second (`dict[str, float]`):
            Success by task, before and after.

    Raises:
        `ValueError`:
            When they have no task in common.
    """
    common = sorted(first.keys() & second.keys())
    if not common:
        raise ValueError("The evaluations have no task in common: give the outcomes of two on the same dataset.")
    values = np.array([(first[task], second[task]) for task in common])
    differences = values[:, 1] - values[:, 0]
    error = float(differences.std(ddof=1) / len(common) ** 0.5) if len(common) > 1 else float("nan")
    return Change(*map(float, values.mean(axis=0)), standard_error=error, tasks=len(common))


def success_by_task(outcomes: Iterable[Outcome]) -> dict[str, float]:
    """
    The share of each task's valid episodes that succeeded. An episode that reports no success ended before its
    environment could say so: it has failed.
    """
    episodes: dict[str, list[bool]] = {}
    for outcome in outcomes:
        if not outcome.is_quarantined:
            episodes.setdefault(outcome.task, []).append(outcome.success is True)
    return {task: sum(successes) / len(successes) for task, successes in episodes.items()}
