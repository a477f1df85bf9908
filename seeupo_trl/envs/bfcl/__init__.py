"""BFCL v4 multi-turn (the Berkeley Function Calling Leaderboard) as an environment."""

from .environment import MAX_RESULT_CHARACTERS, BfclEnvironment, ground_truth_messages, load_bfcl


__all__ = ["MAX_RESULT_CHARACTERS", "BfclEnvironment", "ground_truth_messages", "load_bfcl"]
