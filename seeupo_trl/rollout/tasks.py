"""The dataset rows and seeds that environments are reset with."""

import json
import logging
import random
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .episode import shorten
from .observations import without_none


if TYPE_CHECKING:
    from trl import GRPOTrainer


logger = logging.getLogger(__name__)


class Tasks:
    """
    Rows by prompt, for trainers that hand a rollout function nothing but prompts.

    Args:
        rows (`Iterable[dict]`, *optional*):
            Dataset rows with a `prompt` each. [`~seeupo_trl.SeeUPOTrainer`] hands over whole rows and needs none; what
            it hands over is added to.

    Raises:
        `ValueError`:
            When a row has no prompt, or different rows have the same one.
    """

    def __init__(self, rows: Iterable[dict[str, Any]] | None):
        self._by_prompt: dict[str, dict[str, Any]] | None = None if rows is None else {}
        self._columns: set[str] = set()
        self._has_warned = False
        for row in rows or ():
            if "prompt" not in row:
                raise ValueError(
                    f"A row of `tasks` has no `prompt`, by which it would be found: {shorten(row)}. Give `tasks` the "
                    "rows of the trainer's dataset with their prompts."
                )
            self._columns |= row.keys()
            first = self._by_prompt.setdefault(_as_key(row["prompt"]), row)
            if {**first, "prompt": None} != {**row, "prompt": None}:
                raise ValueError(
                    f"Different rows of `tasks` have the same prompt, so it does not tell them apart: "
                    f"{shorten(row['prompt'])}. Make the prompts different (an extra key in a message is enough)."
                )

    def of(self, prompts: list[Any]) -> list[dict[str, Any]]:
        """
        The rows of some prompts.

        Args:
            prompts (`list`):
                Prompts of this process.

        Raises:
            `ValueError`:
                When there is no row for a prompt.
        """
        if self._by_prompt is None:
            raise ValueError(
                "The trainer hands a rollout function nothing but prompts, and environments need whole dataset rows: "
                "pass the dataset as `MultiTurnRollout(..., tasks=dataset)`, or use SeeUPOTrainer."
            )
        missing = [prompt for prompt in prompts if _as_key(prompt) not in self._by_prompt]
        if missing:
            raise ValueError(
                f"No row of `tasks` has this prompt: {shorten(missing[0])}. `tasks` must hold the rows of every "
                "dataset the trainer reads, the evaluation dataset included."
            )
        return [self._by_prompt[_as_key(prompt)] for prompt in prompts]

    def added_to(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """
        A trainer's rows with the columns that only the rows here of the same prompts have.

        Args:
            rows (`list[dict]`):
                Dataset rows of this process.
        """
        if self._by_prompt is None:
            return rows
        tasks = [self._by_prompt.get(_as_key(row.get("prompt"))) for row in rows]
        for row, task in zip(rows, tasks, strict=True):
            if task is None and self._columns - row.keys() and not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "No row of `tasks` has this prompt: %s. Its environment gets the row of the trainer's dataset, "
                    "without the columns %s. Said once.",
                    shorten(row.get("prompt")),
                    ", ".join(sorted(self._columns - row.keys())),
                )
        return [{**(task or {}), **row} for row, task in zip(rows, tasks, strict=True)]


def first_episode(trainer: "GRPOTrainer", num_episodes: int) -> int:
    """
    Number of this process's first episode among those of all processes: in an iteration, or in an evaluation, whose
    batches follow one another.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            The trainer.
        num_episodes (`int`):
            Number of episodes of this process in the batch.
    """
    earlier = 0 if trainer.model.training else getattr(trainer, "_num_evaluated", 0)  # stock trainers do not count
    return earlier + trainer.accelerator.process_index * num_episodes


def seeds_for(trainer: "GRPOTrainer", first: int, num_episodes: int, occasion: str) -> list[int]:
    """
    Seeds for the episodes of a batch: the same for the episodes of a group, which begin alike so that they can be
    compared, another in each iteration, the same in all evaluations, whatever their batches.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            The trainer.
        first (`int`), num_episodes (`int`):
            Number of this process's first episode, see [`first_episode`], and how many it has.
        occasion (`str`):
            What they depend on, see [`occasion`].
    """
    group_size = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
    groups = [number // group_size for number in range(first, first + num_episodes)]
    by_group = {group: random.Random(f"{occasion} {group}").getrandbits(31) for group in set(groups)}
    return [by_group[group] for group in groups]


def occasion(trainer: "GRPOTrainer", steps_ahead: int = 0) -> str:
    """
    What all seeds of a rollout depend on: the run's seed, and which iteration it is and which round of drawing tasks,
    or that it is an evaluation.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            The trainer.
        steps_ahead (`int`, *optional*, defaults to `0`):
            1 for the iteration after the one that the trainer is at.
    """
    if not trainer.model.training:
        return f"{trainer.args.seed} evaluation"
    further = getattr(trainer, "rollout_round", 0)
    return f"{trainer.args.seed} {trainer.state.global_step + steps_ahead}" + (f" {further}" if further else "")


def _as_key(prompt: Any) -> str:
    return json.dumps(without_none(prompt), sort_keys=True)
