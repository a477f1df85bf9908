"""
Groups whose rewards are all equal teach nothing. With `zero_variance="resample"` further tasks are played in their
place, until every group has variance or `max_resampling_rounds` are over.

What a batch then estimates: its groups are those of the dataset that have variance, as often as they come up. A group
without variance adds nothing to the gradient, so with advantages that are not normalised the expected gradient is that
of `"keep"` divided by the probability that a group has variance: the same direction at a larger step. With
`scale_rewards="batch"` the groups that were replaced no longer lower the batch's standard deviation, which takes most
of that factor back.

Further tasks are drawn by iteration and round, independent of the order of the epoch, so they are the same ones after
a resume and on all processes.
"""

import math
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate.utils import gather_object

from ..trajectory import Trajectory
from .objective import groups_without_variance


if TYPE_CHECKING:
    from trl import GRPOTrainer

_SUMMED = ("time/generation", "time/environments")


class Episodes(Protocol):
    """What is read and replaced of a [`~seeupo_trl.episode_batch.EpisodeBatch`]."""

    rows: list[dict[str, Any]]
    trajectories: list[Trajectory]
    rewards_per_func: torch.Tensor
    is_left_out: list[bool]


def fill_with_variance(
    episodes: Episodes, trainer: "GRPOTrainer", play: Callable[[list[dict[str, Any]]], Episodes]
) -> None:
    """
    Replace the groups of a batch that have no variance by groups of further tasks that have. A collective operation.

    Args:
        episodes ([`~seeupo_trl.episode_batch.EpisodeBatch`]):
            The batch, which is changed.
        trainer ([`~trl.GRPOTrainer`]):
            The trainer, a [`SeeUPOTrainer`].
        play (`Callable`):
            Plays and scores the episodes of some dataset rows of this process.

    It logs `resampling/groups_drawn`, `resampling/groups_replaced` and `resampling/groups_without_variance`, those
    that are left. All other metrics of the rollout are those of the tasks as they were first drawn, except for
    `time/generation` and `time/environments`, which count all.
    """
    size, processes = trainer.num_generations, trainer.accelerator.num_processes
    missing = _groups(episodes, trainer)
    before, drawn = len(missing), 0
    for number in range(1, trainer.args.max_resampling_rounds + 1):
        if not missing:
            break
        together = processes // math.gcd(size, processes)  # so many groups have equally many episodes on each process
        count = math.ceil(len(missing) / together) * together
        rows = [row for row in _draw(trainer, number, count) for _ in range(size)]
        per_process = len(rows) // processes
        first = trainer.accelerator.process_index * per_process
        trainer.rollout_round = number
        try:
            with _as_first_drawn(trainer) as replaced:
                new = play(rows[first : first + per_process])
                useless = set(_groups(new, trainer))
                pairs = list(zip(missing, (g for g in range(count) if g not in useless), strict=False))
                replaced += [(old * size + i, own * size + i) for old, own in pairs for i in range(size)]
        finally:
            trainer.rollout_round = 0
        _move(new, episodes, dict(replaced), trainer)
        missing = missing[len(pairs) :]
        drawn += count
    trainer._add_metrics(
        [
            ("resampling/groups_drawn", float(drawn)),
            ("resampling/groups_replaced", float(before - len(missing))),
            ("resampling/groups_without_variance", float(len(missing))),
        ]
    )


def _groups(episodes: Episodes, trainer: "GRPOTrainer") -> list[int]:
    """Numbers of the groups without variance, over all processes."""
    rewards = trainer.accelerator.gather(episodes.rewards_per_func)
    without_variance = groups_without_variance(
        rewards,
        trainer.reward_weights,
        trainer.num_generations,
        per_function=trainer.multi_objective_aggregation == "normalize_then_sum",
    )
    return without_variance.nonzero()[:, 0].tolist()


def _draw(trainer: "GRPOTrainer", number: int, count: int) -> list[dict[str, Any]]:
    """Rows of further tasks, the same on all processes."""
    dataset = trainer.train_dataset
    draw = random.Random(f"{trainer.args.seed} {trainer.state.global_step} further tasks {number}")
    indices = draw.sample(range(len(dataset)), min(count, len(dataset)))
    return [dataset[indices[i % len(indices)]] for i in range(count)]


def _move(new: Episodes, episodes: Episodes, source_of: dict[int, int], trainer: "GRPOTrainer") -> None:
    """Put new episodes in the places of old ones; both are numbered over all processes."""
    index = trainer.accelerator.process_index
    first = index * len(new.trajectories)
    wanted = set(source_of.values())
    mine = [
        (first + i, (new.rows[i], new.trajectories[i], new.rewards_per_func[i].tolist(), new.is_left_out[i]))
        for i in range(len(new.trajectories))
        if first + i in wanted
    ]
    everyones = dict(gather_object(mine))
    start = index * len(episodes.trajectories)
    for place, source in source_of.items():
        i = place - start
        if 0 <= i < len(episodes.trajectories):
            episodes.rows[i], episodes.trajectories[i], rewards, episodes.is_left_out[i] = everyones[source]
            episodes.rewards_per_func[i] = torch.tensor(rewards)


@contextmanager
def _as_first_drawn(trainer: "GRPOTrainer") -> Iterator[list[tuple[int, int]]]:
    """
    Leave the metrics of the trainer as they are, and of its completions replace those that are named: pairs of a
    number in the batch and a number among the new ones.
    """
    metrics = trainer._metrics["train"]
    values = {name: list(logged) for name, logged in metrics.items()}
    logs = list(_deques(trainer._logs))
    completions = [list(log) for log in logs]
    for log in logs:
        log.clear()
    pairs: list[tuple[int, int]] = []
    yield pairs
    for name, logged in list(metrics.items()):
        if name in _SUMMED and name in values:
            new = sum(logged[len(values[name]) :])
            metrics[name] = [*values[name][:-1], values[name][-1] + new]
        elif name in values and name != "num_tokens":
            metrics[name] = values[name]
        elif name != "num_tokens":
            del metrics[name]
    for log, before in zip(logs, completions, strict=True):
        new = list(log)
        log.clear()
        log.extend(before)
        for place, source in pairs:
            if place < len(log) and source < len(new):
                log[place] = new[source]


def _deques(logs: Any) -> Iterator[deque]:
    if isinstance(logs, deque):
        yield logs
    elif isinstance(logs, dict):
        for value in logs.values():
            yield from _deques(value)
