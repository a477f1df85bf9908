"""Which backend answers the single requests of a rollout, and why none does where episodes play in lock step."""

import functools
import logging

from trl import GRPOTrainer

from .sampler import Sampler
from .settings import RolloutSettings
from .transformers_sampler import TransformersSampler
from .turn_ends import TurnEnds
from .vllm_engine import VllmEngineSampler
from .vllm_server import VllmServerSampler, reason_against_server


logger = logging.getLogger(__name__)


def open_sampler(trainer: "GRPOTrainer", ends: TurnEnds, settings: RolloutSettings) -> Sampler | None:
    """
    The sampler of one rollout. A collective operation.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            The trainer whose policy plays.
        ends ([`~seeupo_trl.rollout.turn_ends.TurnEnds`]):
            Where turns end.
        settings ([`~seeupo_trl.rollout.settings.RolloutSettings`]):
            Options of the rollout.

    Returns:
        [`~seeupo_trl.rollout.sampler.Sampler`], *optional*:
            `None` where episodes play in lock step: `lock_step_rollouts`, or a backend that answers whole batches
            only. The reason is logged once.
    """
    if settings.lock_step_rollouts:
        return None
    if hasattr(trainer, "rollout_sampler"):
        return trainer.rollout_sampler(ends, settings)
    return sampler_of_backend(trainer, ends, settings)


def sampler_of_backend(trainer: "GRPOTrainer", ends: TurnEnds, settings: RolloutSettings) -> Sampler | None:
    """
    The sampler of the trainer's own backend. Arguments and result as in [`open_sampler`].
    """
    reason = _reason_against_samplers(trainer)
    if reason is not None:
        _log_once(f"Episodes play in lock step, where each turn waits for its longest response, because {reason}.")
        return None
    if not trainer.use_vllm:
        return TransformersSampler(trainer, ends)
    if trainer.vllm_mode == "server":
        return VllmServerSampler.of(trainer, ends, settings.request_timeout)
    return VllmEngineSampler(trainer, ends)


def _reason_against_samplers(trainer: "GRPOTrainer") -> str | None:
    owner = next(cls for cls in type(trainer).__mro__ if "_generate_single_turn" in vars(cls))
    if "_generate_single_turn" in vars(trainer) or owner.__module__.split(".")[0] not in ("trl", "seeupo_trl"):
        return f"{type(trainer).__name__} has a `_generate_single_turn` of its own"
    if not trainer.use_vllm:
        return TransformersSampler.reason_against(trainer)
    return reason_against_server(trainer) if trainer.vllm_mode == "server" else None


@functools.cache
def _log_once(message: str) -> None:
    logger.warning(message)
