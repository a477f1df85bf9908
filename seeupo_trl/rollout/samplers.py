"""Which backend answers the single requests of a rollout, and why none does where episodes play in lock step."""

from trl import GRPOTrainer

from .cached_generation import log_once
from .sampler import Sampler
from .settings import RolloutSettings, values_of
from .transformers_sampler import TransformersSampler, is_overridden
from .turn_ends import TurnEnds
from .vllm_engine import VllmEngineSampler
from .vllm_server import VllmServerSampler, reason_against_server


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

    Raises:
        `ValueError`:
            With `rollouts_ahead`, where the sampler does not sample from weights of its own.
    """
    sampler = None
    if not settings.lock_step_rollouts:
        own = hasattr(trainer, "rollout_sampler")
        sampler = trainer.rollout_sampler(ends, settings) if own else sampler_of_backend(trainer, ends, settings)
    if values_of(trainer.args).get("rollouts_ahead") and not getattr(sampler, "is_independent", False):
        found = "episodes play in lock step"
        if sampler is not None:
            sampler.close()
            found = f"`{type(sampler).__name__}` has no `is_independent = True`"
        raise ValueError(
            f"`rollouts_ahead=1` needs a sampler that holds a copy of the weights, and {found}. Sample from a vLLM "
            "server that all processes can reach (`use_vllm=True, vllm_mode='server'`), declare it in a sampler of "
            "your own, or leave `rollouts_ahead` at 0."
        )
    return sampler


def sampler_of_backend(trainer: "GRPOTrainer", ends: TurnEnds, settings: RolloutSettings) -> Sampler | None:
    """
    The sampler of the trainer's own backend. Arguments and result as in [`open_sampler`].
    """
    reason = _reason_against_samplers(trainer)
    if reason is not None:
        log_once(f"Episodes play in lock step, where each turn waits for its longest response, because {reason}.")
        return None
    if not trainer.use_vllm:
        return TransformersSampler(trainer, ends)
    if trainer.vllm_mode == "server":
        return VllmServerSampler.of(trainer, ends, settings.request_timeout)
    return VllmEngineSampler(trainer, ends)


def _reason_against_samplers(trainer: "GRPOTrainer") -> str | None:
    if is_overridden(trainer, "_generate_single_turn"):
        return f"{type(trainer).__name__} has a `_generate_single_turn` of its own"
    if not trainer.use_vllm:
        return TransformersSampler.reason_against(trainer)
    return reason_against_server(trainer) if trainer.vllm_mode == "server" else None
