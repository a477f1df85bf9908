"""Environments for multi-turn rollouts: the interface, and adapters of published benchmarks in their own modules."""

from .base import MultiTurnEnvironment, Observation, StepResult, StopReason
from .isolated import IsolatedEnvironment


__all__ = ["IsolatedEnvironment", "MultiTurnEnvironment", "Observation", "StepResult", "StopReason"]
