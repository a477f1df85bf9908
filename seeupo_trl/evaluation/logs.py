"""What the log says of the episodes of a batch, and conversations as TRL's tables of completions can hold them."""

import copy
import json
from collections import Counter, deque
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..envs.base import StopReason
from ..trajectory import Trajectory


def episode_metrics(trajectories: list[Trajectory], accelerator: Accelerator) -> dict[str, float]:
    """Numbers of turns and shares of stop reasons, over all processes. Must be called on every process."""
    turns = torch.tensor([float(len(t.turns)) for t in trajectories], device=accelerator.device)
    turns = accelerator.gather(turns)
    values = {
        "turns/mean": turns.mean().item(),
        "turns/min": turns.min().item(),
        "turns/max": turns.max().item(),
    }
    reasons = Counter(filter(None, gather_object([t.stop_reason for t in trajectories])))
    if reasons:
        # a reason that did not occur counts as 0, or its mean over several iterations would be too high
        values |= {f"stop_reason/{reason}": reasons[reason] / len(turns) for reason in StopReason}
    return values


def tool_call_metrics(tool_calls: list[tuple[int, int]], accelerator: Accelerator) -> dict[str, float]:
    """TRL's metrics of tool calls, from numbers of calls and failures by episode. Must be called on every process."""
    counts = accelerator.gather(torch.tensor(tool_calls, device=accelerator.device))  # (N, 2)
    calls, failures = counts.sum(dim=0).tolist()
    return {
        "tools/call_frequency": calls / len(counts),
        "tools/failure_frequency": failures / calls if calls > 0 else 0.0,
    }


def replace_last(log: deque, values: list[Any]) -> None:
    """Put values in the place of as many that were appended last."""
    for _ in range(min(len(values), len(log))):
        log.pop()
    log.extend(values)


def with_plain_arguments(conversation: Any) -> Any:
    """The conversation with tool-call arguments as JSON text: their types differ by call, those of a column cannot."""
    if not isinstance(conversation, list):
        return conversation
    messages = []
    for message in conversation:
        calls = message.get("tool_calls")
        if calls:
            calls = copy.deepcopy(calls)
            for call in calls:
                function = call.get("function", call)
                if not isinstance(function.get("arguments", ""), str):
                    function["arguments"] = json.dumps(function["arguments"])
            message = {**message, "tool_calls": calls}
        messages.append(message)
    return messages
