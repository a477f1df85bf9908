"""What the log says of the episodes of a batch, and conversations as TRL's tables of completions can hold them."""

import json
from collections import Counter, deque
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..envs.base import StopReason
from ..envs.plain import parsed_json
from ..rollout.observations import mended
from ..trajectory import Trajectory
from .as_json import to_json


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
    calls, failures = counts.sum(dim=0)
    return {
        "tools/call_frequency": (calls / len(counts)).item(),
        "tools/failure_frequency": (failures / calls).item() if calls > 0 else 0.0,
    }


def completion_metrics(is_cut: list[bool], lengths: list[int], accelerator: Accelerator) -> dict[str, float]:
    """
    TRL's metrics of where completions end, of all ends of turns and over all processes. Must be called on every
    process.
    """
    rows = torch.tensor([is_cut, lengths], dtype=torch.float32, device=accelerator.device).T.contiguous()
    cut, length = accelerator.gather(rows).T
    whole = length[cut == 0] if (cut == 0).any() else length.new_zeros(1)
    values = {"mean": whole.mean(), "min": whole.min(), "max": whole.max()}
    metrics = {f"completions/{name}_terminated_length": value.item() for name, value in values.items()}
    return metrics | {"completions/clipped_ratio": cut.mean().item()}


def replace_last(log: deque, values: list[Any]) -> None:
    """Put values in the place of as many that were appended last."""
    for _ in range(min(len(values), len(log))):
        log.pop()
    log.extend(values)


def as_logged(conversation: Any) -> Any:
    """
    A conversation as TRL's tables of completions can hold and print it, whatever the policy and its environment wrote:
    values are text (their types differ by message, those of a column cannot), a content in parts is their text,
    arguments of tool calls are the JSON text of an object, what else is no text is written as JSON, text can be
    encoded, and nothing is `None` but a content. Images stay, for TRL to draw.
    """
    if not isinstance(conversation, list):
        return mended(conversation)
    return [_logged_message(message) if isinstance(message, dict) else message for message in mended(conversation)]


def _logged_message(message: dict[str, Any]) -> dict[str, Any]:
    logged = _as_texts({name: value for name, value in message.items() if name not in ("content", "tool_calls")})
    if "content" in message:
        logged["content"] = _logged_content(message["content"])
    if message.get("tool_calls") is not None:
        calls = message["tool_calls"]
        logged["tool_calls"] = [_logged_call(call) for call in (calls if isinstance(calls, list) else [calls])]
    return logged


def _logged_content(content: Any) -> Any:
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        if any(part.get("type") == "image" for part in content):
            return content
        if all(isinstance(part.get("text"), str) for part in content):
            return "".join(part["text"] for part in content)
    return to_json(content)


def _logged_call(call: Any) -> dict[str, Any]:
    if not isinstance(call, dict):
        return {"name": "", "arguments": _as_object(call)}
    function = call.get("function", call)
    if not isinstance(function, dict):
        function = {"name": "", "arguments": function}
    logged = _as_texts({name: value for name, value in function.items() if name != "arguments"}) or {"name": ""}
    if "arguments" in function:
        logged["arguments"] = _as_object(function["arguments"])
    if "function" not in call:
        return logged
    return {**_as_texts({name: value for name, value in call.items() if name != "function"}), "function": logged}


def _as_texts(values: dict[str, Any]) -> dict[str, str]:
    return {
        str(name): value if isinstance(value, str) else to_json(value)
        for name, value in values.items()
        if value is not None
    }


def _as_object(arguments: Any) -> str:
    """Arguments as the JSON text of an object, in which those that are none stand under a name of their own."""
    try:
        values = parsed_json(arguments) if isinstance(arguments, str) else arguments
        text = json.dumps(values)
    except (TypeError, ValueError, RecursionError):  # no JSON, no plain data, too large a number, nested too deeply
        values, text = None, arguments if isinstance(arguments, str) else type(arguments).__name__
    if not isinstance(values, dict):
        return json.dumps({"arguments": text if values is None else values})
    return arguments if isinstance(arguments, str) else text
