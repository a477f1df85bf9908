"""SeeUPO for TRL: multi-turn LLM agents, updated turn by turn from the last to the first (arXiv 2602.06554)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"

# Public names load on first use, so that `import seeupo_trl` costs neither torch nor transformers.
_MODULE_OF = {
    "MultiTurnEnvironment": "envs.base",
    "MultiTurnRollout": "rollout",
    "Observation": "envs.base",
    "SeeUPOConfig": "seeupo_config",
    "SeeUPOTrainer": "seeupo_trainer",
    "StepResult": "envs.base",
    "StopReason": "envs.base",
    "Trajectory": "trajectory",
    "Turn": "trajectory",
    "environment_reward": "rollout",
}

__all__ = [
    "__version__",
    "MultiTurnEnvironment",
    "MultiTurnRollout",
    "Observation",
    "SeeUPOConfig",
    "SeeUPOTrainer",
    "StepResult",
    "StopReason",
    "Trajectory",
    "Turn",
    "environment_reward",
]

if TYPE_CHECKING:
    from .envs.base import MultiTurnEnvironment, Observation, StepResult, StopReason
    from .rollout.multi_turn import MultiTurnRollout, environment_reward
    from .seeupo_config import SeeUPOConfig
    from .seeupo_trainer import SeeUPOTrainer
    from .trajectory import Trajectory, Turn


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
