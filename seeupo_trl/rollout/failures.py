"""What a failure costs: an episode, or the run."""

from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object

from ..envs.isolated import UnimportableScriptError
from ..envs.one_thread import CAUSE, CURE, needs_another_thread
from .chat_format import RewritingTemplateError
from .contexts import HistoryError
from .environment_pool import NotAnEnvironmentError
from .episode import Episode, describe
from .shared_state import SharedStateError


if TYPE_CHECKING:
    from trl import GRPOTrainer


# Errors that are the script's, not an environment's: they end the run at once.
MISTAKES = (NotAnEnvironmentError, SharedStateError, UnimportableScriptError, RewritingTemplateError, HistoryError)


def raise_if_too_many_failed(episodes: list[Episode], max_failure_rate: float, trainer: "GRPOTrainer") -> None:
    """
    Stop the run, on all processes, when it is not single environments that fail.

    Args:
        episodes (`list[Episode]`):
            The episodes of this process, all of which have ended.
        max_failure_rate (`float`):
            Largest fraction of the episodes of all processes that may have failed.
        trainer ([`~trl.GRPOTrainer`]):
            The trainer.

    Raises:
        `RuntimeError`:
            When more of them failed, or all.
    """
    accelerator = trainer.accelerator
    errors = [episode.error for episode in episodes if episode.error is not None]
    counts = accelerator.gather(torch.tensor([[len(errors), len(episodes)]], device=accelerator.device)).sum(dim=0)
    failed, played = counts.tolist()
    if failed == 0 or (failed < played and failed <= max_failure_rate * played):
        return
    first = next(filter(None, gather_object([_explained(error) for error in errors[:1]] or [None])))
    number = f"All {played}" if failed == played else f"{failed} of {played}"
    raise RuntimeError(
        f"{number} environments of the batch failed. The first error: {first} Mend the environment, or raise "
        f"max_env_failure_rate ({max_failure_rate:g}) if so many failures are to be expected."
    ) from (errors[0] if errors else None)


def _explained(error: Exception) -> str:
    """An error as sentences, with what is to be done about it where it comes from the environment's thread."""
    explanation = f" This works {CAUSE} {CURE}" if needs_another_thread(error) else ""
    return f"{describe(error)}.{explanation}"
