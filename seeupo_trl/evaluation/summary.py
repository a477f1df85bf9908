"""
What an evaluation reports: success by task with confidence intervals, rewards, and why episodes ended.

A task is played k times (`num_generations_eval`). Success is reported as avg@k, the share of its valid episodes that
succeeded, pass@j, the chance that at least one of j attempts succeeds, and pass^j, the chance that all of them do (see
`estimators.py`).

Values are means over tasks. Episodes that the environment spoiled (`env_error`, `env_timeout`) are left out and
counted, so a task may have fewer than k; a task with fewer than j says nothing about j attempts and is left out of
pass@j and pass^j.
"""

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from accelerate.utils import gather_object
from transformers.trainer_utils import has_length

from ..envs.base import StopReason
from .estimators import bootstrap_interval, pass_at, pass_hat
from .outcome import Outcome


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

MOST_CATEGORIES = 32


def attempts(k: int) -> list[int]:
    """Numbers of attempts that are reported: the powers of two below `k`, and `k`."""
    return sorted({2**power for power in range(k.bit_length())} | {k})


def summarize(outcomes: list[Outcome], k: int, seed: int = 0) -> dict[str, float]:
    """
    Metrics of an evaluation, over all episodes and for each category.

    Args:
        outcomes (`list[Outcome]`):
            Outcomes of all episodes of the evaluation.
        k (`int`):
            Number of times each task was played.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstrap.

    Returns:
        `dict[str, float]`:
            By name, with the ends of the interval under the same name and `_low` or `_high`: `success/avg@k`,
            `success/pass@j`, `success/pass^j`, `reward/avg`; `stop_reason/<reason>`, a fraction of all episodes;
            `turns/mean`, `turns/min` and `turns/max`; `episodes/valid`, `episodes/quarantined` and `episodes/tasks`,
            counts. Those of a category are called `success/<category>/avg@k` and so on, for at most `MOST_CATEGORIES`
            of them, those that came first. What the episodes do not determine is left out.
    """
    categories = _category_of_groups(outcomes)
    names = list(dict.fromkeys(category for _, category in sorted(categories.items())))
    if len(names) > MOST_CATEGORIES:
        logger.warning(
            "The episodes have %d categories; the metrics of %d of them are not reported, such as those of %s.",
            len(names),
            len(names) - MOST_CATEGORIES,
            names[MOST_CATEGORIES][:50],
        )
    reports_success = any(outcome.success is not None for outcome in outcomes if not outcome.is_quarantined)
    metrics = _summarize(outcomes, k, seed, reports_success, "")
    for category in sorted(names[:MOST_CATEGORIES]):
        members = [outcome for outcome in outcomes if categories.get(outcome.group) == category]
        metrics |= _summarize(members, k, seed, reports_success and _may_report_success(members), f"{category}/")
    return metrics


def _category_of_groups(outcomes: list[Outcome]) -> dict[int, str]:
    """Category by group: an episode that failed early may not know the one that others of its task report."""
    return {outcome.group: outcome.category for outcome in reversed(outcomes) if outcome.category is not None}


def _may_report_success(outcomes: list[Outcome]) -> bool:
    """Not where the environment has ended episodes and said of none whether it succeeded."""
    valid = [outcome for outcome in outcomes if not outcome.is_quarantined]
    if any(outcome.success is not None for outcome in valid):
        return True
    return all(outcome.stop_reason != StopReason.completed for outcome in valid)


def _summarize(outcomes: list[Outcome], k: int, seed: int, reports_success: bool, category: str) -> dict[str, float]:
    if not outcomes:
        return {}
    groups: dict[int, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.group, [])
        if not outcome.is_quarantined:
            groups[outcome.group].append(outcome)

    by_task: dict[str, list[float]] = {}  # one value for each task that has one
    if reports_success:
        by_task |= {
            f"success/{category}{name}": values for name, values in _success_by_task(groups.values(), k).items()
        }
    rewards = [[e.reward for e in group if e.reward is not None] for group in groups.values()]
    by_task[f"reward/{category}avg"] = [sum(group) / len(group) for group in rewards if group]

    metrics: dict[str, float] = {}
    for name, values in by_task.items():
        if values:
            metrics[name] = float(np.mean(values))
            interval = bootstrap_interval(np.array(values), seed)
            if interval is not None:
                metrics[f"{name}_low"], metrics[f"{name}_high"] = interval

    reasons = [outcome.stop_reason for outcome in outcomes]
    if any(reasons):
        metrics |= {f"stop_reason/{category}{reason}": reasons.count(reason) / len(reasons) for reason in StopReason}
    turns = [outcome.turns for outcome in outcomes]
    metrics |= {
        f"turns/{category}mean": sum(turns) / len(turns),
        f"turns/{category}min": float(min(turns)),
        f"turns/{category}max": float(max(turns)),
        f"episodes/{category}valid": float(sum(map(len, groups.values()))),
        f"episodes/{category}quarantined": float(sum(outcome.is_quarantined for outcome in outcomes)),
        f"episodes/{category}tasks": float(len(groups)),
    }
    return metrics


def _success_by_task(groups: Iterable[list[Outcome]], k: int) -> dict[str, list[float]]:
    """
    Estimates by task. An episode that reports no success, where others do, ended before its environment could say so:
    it has failed.
    """
    counts = [(len(group), sum(outcome.success is True for outcome in group)) for group in groups if group]
    values = {f"avg@{k}": [c / n for n, c in counts]}
    for j in attempts(k):
        values[f"pass@{j}"] = [pass_at(j, n, c) for n, c in counts if n >= j]
    for j in attempts(k)[1:]:  # pass^1 is pass@1
        values[f"pass^{j}"] = [pass_hat(j, n, c) for n, c in counts if n >= j]
    return values


class Evaluation:
    """
    The episodes of one evaluation, batch by batch, from all processes.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            The tasks.
        k (`int`):
            Number of times each task is played.
        batch_size (`int`):
            Number of episodes of a batch on one process.
        num_processes (`int`):
            Number of processes that take part.
        seed (`int`):
            Seed of the bootstrap.

    Raises:
        `ValueError`:
            When batches would cut the groups of a task.
    """

    def __init__(self, dataset: "Dataset | IterableDataset", k: int, batch_size: int, num_processes: int, seed: int):
        if batch_size * num_processes % k != 0:
            raise ValueError(
                f"An evaluation batch of {batch_size * num_processes} episodes (`per_device_eval_batch_size` x number "
                f"of processes) does not hold whole groups of {k}: make it a multiple of `num_generations_eval`."
            )
        self.k = k
        self._num_rows = len(dataset) if has_length(dataset) else None
        self._num_processes = num_processes
        self._seed = seed
        self._batches: list[list[Outcome]] = []

    @property
    def num_seen(self) -> int:
        """Number of episodes so far, over all processes."""
        return sum(map(len, self._batches))

    @property
    def num_episodes(self) -> int:
        """Number of episodes so far that count."""
        if self._num_rows is not None:
            return min(self._num_rows * self.k, self.num_seen)
        return self.num_seen - (self._num_repeated() if self._num_processes > 1 else 0)

    def add(self, outcomes: list[Outcome]) -> None:
        """Take in this process's part of a batch. A collective operation."""
        self._batches.append(gather_object(outcomes))

    def outcomes(self) -> list[Outcome]:
        """
        The outcomes of the episodes, each once. So that several processes get full batches, the data loader fills
        the last one with rows from the beginning; those come last, and are left out.
        """
        seen = [outcome for batch in self._batches for outcome in batch]
        return seen[: self.num_episodes]

    def metrics(self) -> dict[str, float]:
        """Metrics of the evaluation, see [`summarize`]; the same on all processes."""
        return summarize(self.outcomes(), self.k, self._seed)

    def rewards(self) -> dict[str, float]:
        """What TRL logs as `reward` and `rewards/<function>/mean`, over all episodes."""
        values = {"reward": [outcome.reward for outcome in self.outcomes()]}
        for outcome in self.outcomes():
            for name, reward in outcome.rewards.items():
                values.setdefault(f"rewards/{name}/mean", []).append(reward)
        scored = {name: [reward for reward in rewards if reward is not None] for name, rewards in values.items()}
        return {name: sum(rewards) / len(rewards) for name, rewards in scored.items() if rewards}

    def _num_repeated(self) -> int:
        """Length of the longest end of the last batch that repeats the beginning of the first."""
        if not self._batches:
            return 0
        last = [outcome.task for outcome in self._batches[-1]]
        first = [outcome.task for outcome in self._batches[0]]
        lengths = range(len(last) - self.k, 0, -self.k)
        return next((length for length in lengths if last[-length:] == first[:length]), 0)
