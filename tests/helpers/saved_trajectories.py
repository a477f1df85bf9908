"""Saved trajectories of made-up episodes."""

from tiny import tiny_tokenizer

from seeupo_trl import Trajectory, Turn
from seeupo_trl.evaluation.outcome import Outcome
from seeupo_trl.trajectory_log import TrajectoryLog


WORDS = tiny_tokenizer().convert_tokens_to_ids([f"w{i}" for i in range(60)])


def outcome(index=0, **kwargs):
    settings = {"task": "t", "category": None, "turns": 0, "stop_reason": "completed", "success": None, "reward": 1.0}
    return Outcome(index=index, group=index, **{**settings, **kwargs})


def make_log(output_dir, num_trajectories, num_turns, prompt=tuple(WORDS)):
    """Append-only episodes in which every turn adds the same number of tokens."""
    log = TrajectoryLog(output_dir, tiny_tokenizer())
    trajectories = []
    for index in range(num_trajectories):
        turns, context = [], list(prompt)
        for number in range(num_turns):
            action = [WORDS[(index + number + k) % 60] for k in range(10)]
            turns.append(Turn(context, action))
            context = context + action + WORDS[:5]
        trajectories.append(Trajectory(turns))
    log.add([outcome(i, turns=num_turns) for i in range(num_trajectories)], trajectories)
    return log.write("train", 1)
