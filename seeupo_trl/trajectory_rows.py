"""
A trajectory as rows for a file, one a turn, and back: pure functions.

What an environment or a rollout reports may be anything; here it becomes text that JSON and UTF-8 can hold.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from .evaluation.as_json import to_json


# the viewer reads files without waiting for torch
if TYPE_CHECKING:
    from .evaluation.outcome import Outcome
    from .trajectory import Trajectory, Turn


def rows_of(
    outcome: "Outcome", trajectory: "Trajectory", decode: Callable[[list[int]], str]
) -> Iterator[dict[str, Any]]:
    """
    The rows of a trajectory, without what its update adds.

    Args:
        outcome ([`~seeupo_trl.evaluation.outcome.Outcome`]):
            What became of it.
        trajectory ([`~seeupo_trl.trajectory.Trajectory`]):
            The trajectory.
        decode (`Callable`):
            Text of token ids.

    Yields:
        `dict`:
            Values by column of [`~seeupo_trl.trajectory_log.SCHEMA`]; what is missing is null.
    """
    shared = {
        "task": _plain_text(outcome.task),
        "category": _plain_text(outcome.category),
        "group": outcome.group,
        "trajectory": outcome.index,
        "turns": outcome.turns,
        "reward": outcome.reward,
        "rewards": to_json(outcome.rewards),
        "advantage": outcome.advantage,
        "stop_reason": _plain_text(outcome.stop_reason),
        "success": outcome.success,
        "info": to_json(trajectory.info),
    }
    if not trajectory.turns:
        yield {**shared, "turn": 0}
    parsed = messages_by_turn(trajectory)
    previous: Turn | None = None
    for number, turn in enumerate(trajectory.turns, start=1):
        kept = _num_kept(previous, turn)
        row = {
            **shared,
            "turn": number,
            "context_kept": kept,
            "context_ids": turn.context_ids[kept:],
            "context_text": _plain_text(decode(turn.context_ids[kept:])),
            "action_ids": turn.action_ids,
            "action_text": _plain_text(decode(turn.action_ids)),
            "sampling_logps": turn.sampling_logps,
            "turn_reward": turn.reward,
        }
        if parsed is not None:
            message, observations = parsed[number - 1]
            row["reasoning"] = _plain_text(message.get("reasoning_content"))
            row["content"] = _plain_text(message.get("content"))
            row["tool_calls"] = to_json(message["tool_calls"]) if message.get("tool_calls") else None
            row["observations"] = to_json(observations)
        yield row
        previous = turn


def restore_turns(rows: list[dict[str, Any]]) -> "list[Turn]":
    """
    The turns of a trajectory with their whole contexts.

    Args:
        rows (`list[dict]`):
            The rows of one trajectory in the order of its turns.
    """
    from .trajectory import Turn

    turns: list[Turn] = []
    for row in rows:
        if row["turn"] == 0:
            continue
        history = turns[-1].context_ids + turns[-1].action_ids if turns else []
        context_ids = history[: row["context_kept"]] + row["context_ids"]
        # files of earlier versions have no rewards of turns
        turns.append(Turn(context_ids, row["action_ids"], row["sampling_logps"], row.get("turn_reward")))
    return turns


def messages_by_turn(trajectory: "Trajectory") -> list[tuple[dict[str, Any], list[dict[str, Any]]]] | None:
    """
    Each turn's assistant message and the messages that answered it; `None` where the trajectory's messages do not have
    one assistant message for each turn.
    """
    parsed: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
    for message in trajectory.messages:
        if message.get("role") == "assistant":
            parsed.append((message, []))
        elif parsed:
            parsed[-1][1].append(message)
    return parsed if len(parsed) == len(trajectory.turns) else None


def _num_kept(previous: "Turn | None", turn: "Turn") -> int:
    """Length of the longest common prefix of a turn's context and the previous turn's context and action."""
    if previous is None:
        return 0
    if turn.extends(previous):
        return len(previous.context_ids) + len(previous.action_ids)
    history = np.array(previous.context_ids + previous.action_ids)
    context = np.array(turn.context_ids)
    length = min(len(history), len(context))
    differs = np.flatnonzero(history[:length] != context[:length])
    return int(differs[0]) if len(differs) else length


def _plain_text(value: Any) -> str | None:
    """Text that UTF-8 can hold (a lone surrogate becomes a replacement character); other content as JSON."""
    if value is None:
        return None
    text = value if isinstance(value, str) else to_json(value)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
