"""
`python -m seeupo_trl.view RUN_DIR` renders saved trajectories as one self-contained HTML page.

The page makes no network request, and no text of a model or an environment can run in it: the texts travel as JSON
without any `<`, the script only ever sets them as text, and the page's content security policy allows nothing but that
one script, by its hash.
"""

import argparse
import base64
import hashlib
import html
import json
import re
import sys
import webbrowser
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..trajectory_log import find_files, read_rows


DEFAULT_MAX_TRAJECTORIES = 1000
_SHORTEST_SHARED_TEXT = 64
_LONGEST_LINE = 100
_NUMBERS = ("reward", "advantage")
_TURN_NUMBERS = ("ratio", "turn_weight", "relative_turn_weight")


def render(rows: Iterable[dict[str, Any]], title: str, note: str = "") -> str:
    """
    The page.

    Args:
        rows (`Iterable[dict]`):
            Rows of [`~seeupo_trl.trajectory_log.SCHEMA`], the turns of a trajectory one after another.
        title (`str`):
            Title of the page.
        note (`str`, *optional*):
            A sentence beside the number of trajectories.
    """
    data = json.dumps({"note": note, **_page_data(rows)}, separators=(",", ":"))  # ASCII
    for character in "<>&":  # occur within strings only, where an escape means the same
        data = data.replace(character, f"\\u{ord(character):04x}")
    folder = files("seeupo_trl") / "view"
    script = (folder / "script.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    values = {
        "policy": f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        "title": html.escape(title),
        "style": (folder / "style.css").read_text(encoding="utf-8"),
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
                    "info": None if row["info"] == "{}" else text(_readable(json.loads(row["info"]))),
                    "rewards": json.loads(row["rewards"]),
                    "turns": [],
                }
            )
        if row["turn"] > 0:
            logps = [logp for logp in row["sampling_logps"] or [] if logp is not None and logp == logp]
            trajectories[-1]["turns"].append(
                {
                    "kept": row["context_kept"],
                    "context_tokens": row["context_kept"] + len(row["context_ids"]),
                    "action_tokens": len(row["action_ids"]),
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


def _readable(value: Any) -> str:
    """JSON as text: JavaScript would round long integers if it parsed this. Short JSON stays on one line."""
    line = json.dumps(value, ensure_ascii=False)
    return line if len(line) <= _LONGEST_LINE else json.dumps(value, ensure_ascii=False, indent=1)


def _calls(value: str | None, text: Any) -> list[dict[str, Any]]:
    calls = []
    for call in json.loads(value or "[]"):
        function = call.get("function", call) if isinstance(call, dict) else call
        if isinstance(function, dict):
            name, arguments = str(function.get("name", "")), function.get("arguments")
        else:
            name, arguments = "", function
        calls.append(
            {"name": name, "arguments": text(arguments if isinstance(arguments, str) else _readable(arguments))}
        )
    return calls


def _observations(value: str | None, text: Any) -> list[dict[str, Any]] | None:
    if value is None:
        return None
    observations = []
    for message in json.loads(value):
        content = message.get("content")
        role, name = str(message.get("role", "")), message.get("name")
        observations.append(
            {
                "role": f"{role} {name}" if name else role,
                "content": text(content if isinstance(content, str) else _readable(content)),
            }
        )
    return observations


def select(
    run_dir: str | Path, splits: list[str] | None, iterations: list[int] | None, max_trajectories: int
) -> tuple[pa.Table, int]:
    """
    The rows to show: the latest iterations first, whole files until there are enough trajectories.

    Args:
        run_dir (`str` or `Path`):
            As in [`~seeupo_trl.trajectory_log.find_files`].
        splits (`list[str]`, *optional*), iterations (`list[int]`, *optional*):
            Show these only.
        max_trajectories (`int`):
            Show at most this many trajectories.

    Returns:
        `tuple[pa.Table, int]`:
            The rows, and how many trajectories are left out.

    Raises:
        `ValueError`:
            When nothing is left to show.
    """
    table = read_rows(find_files(run_dir), splits, iterations, newest_first=True)
    if not len(table):
        raise ValueError(
            f"No trajectory of {run_dir} is of "
            f"{'any split' if splits is None else 'split ' + ', '.join(splits)} and "
            f"{'any iteration' if iterations is None else 'iteration ' + ', '.join(map(str, iterations))}."
        )
    keys = zip(table["file"].to_pylist(), table["trajectory"].to_pylist(), strict=True)
    starts = [position for position, (key, before) in enumerate(_with_previous(keys)) if key != before]
    if len(starts) <= max_trajectories:
        return table, 0
    return table.slice(0, starts[max_trajectories]), len(starts) - max_trajectories


def _with_previous(items: Iterable[Any]) -> Iterable[tuple[Any, Any]]:
    previous = None
    for item in items:
        yield item, previous
        previous = item


def main(arguments: list[str] | None = None) -> None:
    """The command line, see `python -m seeupo_trl.view --help`."""
    parser = argparse.ArgumentParser(
        prog="python -m seeupo_trl.view",
        description="Render the trajectories that a run saved (save_trajectories=True) as one HTML page.",
    )
    parser.add_argument("run_dir", help="output_dir of the run, a directory inside its trajectories, or one file")
    parser.add_argument("--output", help="page to write; RUN_DIR/trajectories.html by default")
    parser.add_argument("--split", action="append", help="train, eval, eval_<dataset>; may be repeated")
    parser.add_argument("--iteration", action="append", type=int, help="may be repeated")
    parser.add_argument(
        "--max-trajectories",
        type=int,
        default=DEFAULT_MAX_TRAJECTORIES,
        help="largest number of trajectories; the latest iterations are kept (default: %(default)s)",
    )
    parser.add_argument("--open", action="store_true", help="open the page in the default browser")
    options = parser.parse_args(arguments)
    if options.max_trajectories < 1:
        parser.error(f"--max-trajectories must be at least 1; got {options.max_trajectories}")
    try:
        table, left_out = select(options.run_dir, options.split, options.iteration, options.max_trajectories)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"{parser.prog}: {error}")

    run_dir = Path(options.run_dir)
    output = Path(options.output or (run_dir if run_dir.is_dir() else run_dir.parent) / "trajectories.html")
    note = f"{left_out} more are not on this page (--max-trajectories)" if left_out else ""
    page = render(table.to_pylist(), title=run_dir.resolve().name, note=note)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(output)
    print(f"{output}: {len(page) / 1e6:.1f} MB" + (f"; {note}" if note else ""))
    if options.open:
        webbrowser.open(output.resolve().as_uri())


if __name__ == "__main__":
    main()
