"""The metrics of an evaluation as a table of text."""

import re

from ..envs.base import StopReason


def table(metrics: dict[str, float], k: int) -> str:
    """Success by category with its intervals, and why episodes ended, as lines of text."""
    measures = [f"avg@{k}", f"pass@{k}", f"pass^{k}"] if k > 1 else ["avg@1"]
    reasons = [reason for reason in StopReason if metrics[f"eval_stop_reason/{reason}"]]
    names = [re.fullmatch("eval_episodes/(.+)/tasks", name) for name in metrics]
    categories = [match[1] for match in names if match]
    success = [["", *measures, "tasks", "spoiled episodes"]]
    stops = [["", *(reason.replace("_", " ") for reason in reasons)]]
    together = [("all", "")] if len(categories) > 1 else []
    for name, infix in [*((category, f"{category}/") for category in categories), *together]:
        cells = [interval(metrics, f"eval_success/{infix}{measure}") for measure in measures]
        counts = [f"{metrics[f'eval_episodes/{infix}{count}']:.0f}" for count in ("tasks", "quarantined")]
        success.append([name, *cells, *counts])
        stops.append([name, *(f"{metrics[f'eval_stop_reason/{infix}{reason}']:.0%}" for reason in reasons)])
    return "\n\n".join(map(aligned, (success, stops)))


def aligned(rows: list[list[str]]) -> str:
    """Rows of text with the columns below one another."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("   ".join([name.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def interval(metrics: dict[str, float], name: str) -> str:
    """A value with its interval, where they are known."""
    if name not in metrics:
        return "-"
    ends = [metrics.get(f"{name}_{end}") for end in ("low", "high")]
    return f"{metrics[name]:.3f}" + ("" if None in ends else " [{:.3f}, {:.3f}]".format(*ends))
