"""Environments for multi-turn rollouts: the interface, and adapters of published benchmarks in their own modules."""

from .base import MultiTurnEnvironment, Observation, StepResult, StopReason


__all__ = ["MultiTurnEnvironment", "Observation", "StepResult", "StopReason"]
