"""
The page: rows of saved trajectories and the curves of their run as one self-contained HTML file.

The page loads nothing, and no text of a model or an environment can run in it: the texts travel as JSON without any
`<`, the script only ever sets them as text, and the page's content security policy allows nothing but that one script,
by its hash. A page that follows a run may also ask the server that it came from.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from ..envs.plain import parsed_json
from .curves import Chart


_SHORTEST_SHARED_TEXT = 64
_LONGEST_LINE = 100
_NUMBERS = ("reward", "advantage")
_TURN_NUMBERS = ("turn_reward", "ratio", "turn_weight", "relative_turn_weight")
_CLOSED = "default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def render(
    rows: Iterable[dict[str, Any]],
    title: str,
    note: str = "",
    charts: Iterable[Chart] = (),
    notices: Iterable[str] = (),
    watch: dict[str, Any] | None = None,
) -> str:
    """
    The page.

    Args:
        rows (`Iterable[dict]`):
            Rows of [`~seeupo_trl.trajectory_log.SCHEMA`], the turns of a trajectory one after another.
        title (`str`):
            Title of the page.
        note (`str`, *optional*):
            A sentence beside the number of trajectories.
        charts (`Iterable[Chart]`, *optional*):
            The curves of the run.
        notices (`Iterable[str]`, *optional*):
            What the curves leave out, and why; one sentence each.
        watch (`dict`, *optional*):
            For a page that follows a run: the `"version"` of the run that it shows, as `/version` of its server
            reports it, and `"changed"`, the time of the last change in seconds since 1970.
    """
    page = {
        "note": note,
        "charts": [asdict(chart) for chart in charts],
        "notices": list(notices),
        "watch": watch,
        **_page_data(rows),
    }
    data = json.dumps(page, separators=(",", ":"), allow_nan=False)  # ASCII
    for character in "<>&":  # occur within strings only, where an escape means the same
        data = data.replace(character, f"\\u{ord(character):04x}")
    folder = files("seeupo_trl") / "view"
    names = ("script.js", "curves.js", "watch.js") if watch else ("script.js", "curves.js")
    script = "\n".join((folder / name).read_text(encoding="utf-8") for name in names)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    values = {
        "policy": _CLOSED.format(digest=digest) + ("; connect-src 'self'" if watch else ""),
        "title": html.escape(title.encode("utf-8", "replace").decode()),
        "style": "\n".join((folder / name).read_text(encoding="utf-8") for name in ("style.css", "curves.css")),
        "script": script,
        "data": data,
    }
    page = (folder / "page.html").read_text(encoding="utf-8")
    return re.sub("@([a-z]+)@", lambda name: values[name[1]], page)


def _page_data(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Trajectories with their turns; a long text is stored once, under the number that stands for it."""
    texts: dict[str, int] = {}

    def text(value: str | None) -> str | int | None:
        if value is None or len(value) < _SHORTEST_SHARED_TEXT:
            return value
        return texts.setdefault(value, len(texts))

    trajectories: list[dict[str, Any]] = []
    key = None
    for row in rows:
        if key != (key := (row["file"], row["trajectory"])):
            trajectories.append(
                {
                    **{name: row[name] for name in ("iteration", "split", "group", "trajectory", "stop_reason")},
                    **{name: row[name] for name in ("task", "category", "success")},
                    **{name: _number(row[name]) for name in _NUMBERS},
                    "info": None if row["info"] in (None, "{}") else text(_readable(row["info"])),
                    "rewards": _rewards(row["rewards"]),
                    "turns": [],
                }
            )
        if row["turn"] > 0:
            logps = [logp for logp in row["sampling_logps"] or [] if logp is not None and logp == logp]
            trajectories[-1]["turns"].append(
                {
                    "kept": row["context_kept"] or 0,
                    "context_tokens": (row["context_kept"] or 0) + len(row["context_ids"] or []),
                    "action_tokens": len(row["action_ids"] or []),
                    "context": text(row["context_text"]),
                    "action": text(row["action_text"]),
                    "reasoning": text(row["reasoning"]),
                    "content": text(row["content"]),
                    "calls": _calls(row["tool_calls"], text),
                    "observations": _observations(row["observations"], text),
                    "logp": _number(sum(logps) / len(logps)) if logps else None,
                    "clipped": row["clipped"],
                    **{name: _number(row[name]) for name in _TURN_NUMBERS},
                }
            )
    return {"trajectories": trajectories, "texts": list(texts)}


def _number(value: float | None) -> float | str | None:
    """JSON has no infinity, and JavaScript reads none."""
    return value if value is None or abs(value) < float("inf") else str(value)


def _parsed(text: str | None) -> Any:
    """What JSON says; `None` where it is none, which is shown as it is."""
    try:
        return parsed_json(text or "null")
    except ValueError:
        return None


def _readable(text: str) -> str:
    """
    JSON, or the text that it should have been, for a reader: JavaScript would round long integers if it parsed this.
    Short JSON stays on one line.
    """
    try:
        return _written(parsed_json(text))
    except ValueError:
        return text


def _written(value: Any) -> str:
    line = json.dumps(value, ensure_ascii=False)
    return line if len(line) <= _LONGEST_LINE else json.dumps(value, ensure_ascii=False, indent=1)


def _rewards(value: str | None) -> dict[str, float | str | None]:
    rewards = _parsed(value)
    if not isinstance(rewards, dict):
        return {}
    are_numbers = all(reward is None or isinstance(reward, int | float) for reward in rewards.values())
    return {name: _number(reward) for name, reward in rewards.items()} if are_numbers else {}


def _calls(value: str | None, text: Any) -> list[dict[str, Any]]:
    calls = _parsed(value or "[]")
    if not isinstance(calls, list):
        return [{"name": "", "arguments": text(_readable(value))}]
    shown = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else call
        if isinstance(function, dict):
            name, arguments = str(function.get("name", "")), function.get("arguments")
        else:
            name, arguments = "", function
        shown.append({"name": name, "arguments": text(_content(arguments))})
    return shown


def _observations(value: str | None, text: Any) -> list[dict[str, Any]] | None:
    if value is None:
        return None
    messages = _parsed(value)
    if not isinstance(messages, list):
        return [{"role": "", "content": text(_readable(value))}]
    observations = []
    for message in messages:
        if isinstance(message, dict):
            role, name, content = str(message.get("role", "")), message.get("name"), message.get("content")
        else:
            role, name, content = "", None, message
        observations.append({"role": f"{role} {name}" if name else role, "content": text(_content(content))})
    return observations


def _content(value: Any) -> str:
    return value if isinstance(value, str) else _written(value)
