"""What a run left on disk, as the page needs it: episodes to list, numbers for the curves, the trainer's history."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ..trajectory_log import find_files, number_files, read_rows
from . import curves


DEFAULT_MAX_TRAJECTORIES = 1000
_STATE = "trainer_state.json"
_METRIC = re.compile("(.+_)?entropy|time/(rollout|old_pass|update)", re.DOTALL)
_LARGEST = 2**53  # JavaScript counts no further; comparisons with NaN are false


@dataclass
class Run:
    """
    What a page shows.

    Args:
        title (`str`):
            Name of the run.
        rows (`pa.Table`):
            The turns of the episodes to list.
        left_out (`int`):
            How many episodes of the selection are not listed.
        charts (`list[Chart]`), notices (`list[str]`):
            The curves, over all episodes, and what they leave out.
    """

    title: str
    rows: pa.Table
    left_out: int
    charts: list[curves.Chart]
    notices: list[str]

    @property
    def note(self) -> str:
        """A sentence about the episodes that are left out."""
        return f"{self.left_out} more are not on this page (--max-trajectories)" if self.left_out else ""


def read_run(
    run_dir: str | Path,
    splits: list[str] | None = None,
    iterations: list[int] | None = None,
    max_trajectories: int = DEFAULT_MAX_TRAJECTORIES,
) -> Run:
    """
    Read a run.

    Args:
        run_dir (`str` or `Path`):
            As in [`~seeupo_trl.trajectory_log.find_files`].
        splits (`list[str]`, *optional*):
            List episodes and draw curves of these only.
        iterations (`list[int]`, *optional*):
            List episodes of these only.
        max_trajectories (`int`, *optional*, defaults to `1000`):
            List at most this many episodes, those of the latest iterations.

    Raises:
        `FileNotFoundError`:
            When there is no saved trajectory.
        `ValueError`:
            When none is of these splits and iterations, or a file cannot be read.
    """
    paths = find_files(run_dir)
    numbers = read_rows(paths, splits, newest_first=True, columns=curves.COLUMNS)
    listed = numbers
    if iterations is not None:
        known = [iteration for iteration in iterations if abs(iteration) < _LARGEST]
        listed = numbers.filter(pc.is_in(numbers["iteration"], pa.array(known, pa.int64())))
    if not len(listed):
        raise ValueError(
            f"No trajectory of {run_dir} is of "
            f"{'any split' if splits is None else 'split ' + ', '.join(splits)} and "
            f"{'any iteration' if iterations is None else 'iteration ' + ', '.join(map(str, iterations))}."
        )
    starts = pc.indices_nonzero(pc.less_equal(listed["turn"], 1))  # of the episodes
    left_out = max(len(starts) - max_trajectories, 0)
    if left_out:
        listed = listed.slice(0, starts[max_trajectories].as_py())
    files = set(pc.unique(listed["file"]).to_pylist())
    needed = [path for path, number in number_files(paths).items() if number in files]
    of_those = pc.unique(listed["iteration"]).to_pylist()
    rows = read_rows(needed, splits, of_those, newest_first=True).slice(0, len(listed))

    history, notices = read_history(run_directory(run_dir))
    charts, left_out_charts = curves.draw(numbers, history)
    return Run(Path(run_dir).resolve().name, rows, left_out, charts, notices + left_out_charts)


def run_directory(run_dir: str | Path) -> Path:
    """The `output_dir` of the run that a directory or file inside its `trajectories` belongs to."""
    path = Path(run_dir).resolve()
    above = (path, *path.parents[:3])
    return next((directory for directory in above if (directory / "trajectories").is_dir()), path)


def state_files(directory: Path) -> list[Path]:
    """Where the trainer's state lies: in the run's directory, and in its checkpoints, newest first."""
    checkpoints = [path for path in directory.glob("checkpoint-*") if re.fullmatch("[0-9]{1,15}", path.name[11:])]
    checkpoints.sort(key=lambda path: int(path.name[11:]), reverse=True)
    return [path / _STATE for path in (directory, *checkpoints) if (path / _STATE).is_file()]


def read_history(directory: Path) -> tuple[dict[str, dict[int, float]] | None, list[str]]:
    """
    Those of the trainer's metrics that the curves show, from the file that reaches farthest: `trainer_state.json` of
    the run or of its newest checkpoint that can be read.

    Args:
        directory (`Path`):
            `output_dir` of the run.

    Returns:
        `tuple[dict[str, dict[int, float]], list[str]]`:
            The metrics by name and iteration, `None` without such a file, and a sentence for each thing that is amiss.
    """
    notices = []
    best: tuple[int, dict[str, dict[int, float]], list[str]] | None = None
    for path in state_files(directory):
        name = str(path.relative_to(directory))
        try:
            history, num_broken = _metrics(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError) as error:
            notices.append(f"{name} cannot be read: {error}.")
            continue
        about = [f"{name}: {num_broken} values are no finite numbers of a step and left out."] if num_broken else []
        end = max((step for values in history.values() for step in values), default=0)
        if best is None or end > best[0]:
            best = end, history, about
        if path.parent != directory:  # older checkpoints hold nothing more
            break
    if best is None:
        notices.append(
            f"Entropy and seconds are left out: there is no readable {_STATE}, which comes with checkpoints."
        )
        return None, notices
    return best[1], notices + best[2]


def _metrics(state: Any) -> tuple[dict[str, dict[int, float]], int]:
    """The metrics of a trainer's state, and how many values are left out because they are no numbers."""
    if not isinstance(state, dict) or not isinstance(state.get("log_history"), list):
        raise ValueError("it has no list log_history")
    metrics: dict[str, dict[int, float]] = {}
    num_broken = 0
    for entry in state["log_history"]:
        if not isinstance(entry, dict):
            num_broken += 1
            continue
        step = entry.get("step")
        evaluated = [name.removesuffix("_runtime") for name in entry if name.endswith("_runtime")]
        for name in filter(_METRIC.fullmatch, entry):
            if _is_number(step) and step == int(step) and _is_number(entry[name]):
                # what GRPO measures in batches is called eval_ in the evaluation of every split
                split_name = f"{evaluated[0]}_entropy" if name == "eval_entropy" and evaluated else name
                metrics.setdefault(split_name, {})[int(step)] = float(entry[name])
            elif entry[name] is not None:  # GRPO's word for "not measured"
                num_broken += 1
    return metrics, num_broken


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST
