"""
Saved trajectories: one parquet file for each iteration and evaluation, one row a turn.

[`TrajectoryLog`] writes them, with rows from `trajectory_rows.py`; [`read_trajectories`] reads them.

Files are `OUTPUT_DIR/trajectories/<split>/iteration-<number>.parquet`, where the split is `train`, or an evaluation's
metric prefix (`eval`, `eval_<dataset>`; `eval-train` for an evaluation with the prefix `train`). Several processes
write one file each (`.process-0-of-2`); a second evaluation of the same split after the same iteration gets a number
(`-2`). A file appears when it is whole. When an iteration is played again, by a resumed run in this process or another
one, its files and those of its evaluations are replaced. Training that begins anew removes what an older run left of
later iterations.

Columns ([`SCHEMA`]):

| column | meaning |
|---|---|
| `iteration`, `split` | iterations done, this one included; `"train"` or an evaluation's metric prefix |
| `task`, `category` | the dataset row's `id` or `task_id` (else a hash of the row), and its category |
| `group`, `trajectory` | numbers of the group of completions of one prompt and of the trajectory, over all processes |
| `turn`, `turns` | number of the turn, from 1, and how many there are; an episode without a turn has one row, turn 0 |
| `context_kept` | how many tokens of the previous turn's context and action the context begins with |
| `context_ids`, `context_text` | the context after those tokens, so that a file grows with what is new in a turn |
| `action_ids`, `action_text` | what the policy wrote |
| `sampling_logps` | log-probability of each action token, where the sampler reports it |
| `reasoning`, `content`, `tool_calls` | the parsed action; calls as JSON |
| `observations` | JSON list of the messages that answered the action |
| `turn_reward` | the environment's reward of this step |
| `reward`, `rewards` | weighted sum of the reward functions, and JSON of each without weight |
| `advantage` | normalised advantage |
| `stop_reason`, `success`, `info` | how the episode ended; what the environment reported, as JSON |
| `ratio`, `clipped` | sequence ratio in the loss of the turn's last optimizer step, and whether it was clipped there |
| `turn_weight`, `relative_turn_weight` | turn weight `M` of that step, and `M / A` |

The last four are null in evaluations and where no optimizer step computed the turn (no advantage). `reasoning`,
`content`, `tool_calls` and `observations` are null where a rollout function gave no messages.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from .trajectory_rows import restore_turns, rows_of


# the viewer reads files without waiting for torch
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .evaluation.outcome import Outcome
    from .scoring.turn_buffer import Key
    from .trajectory import Trajectory
    from .update.metrics import TurnUpdate


__all__ = ["SCHEMA", "TrajectoryLog", "find_files", "read_rows", "read_trajectories", "restore_turns"]

SCHEMA = pa.schema(
    [
        ("iteration", pa.int64()),
        ("split", pa.string()),
        ("task", pa.string()),
        ("category", pa.string()),
        ("group", pa.int64()),
        ("trajectory", pa.int64()),
        ("turn", pa.int32()),
        ("turns", pa.int32()),
        ("context_kept", pa.int32()),
        ("context_ids", pa.list_(pa.int32())),
        ("context_text", pa.string()),
        ("action_ids", pa.list_(pa.int32())),
        ("action_text", pa.string()),
        ("sampling_logps", pa.list_(pa.float32())),
        ("reasoning", pa.string()),
        ("content", pa.string()),
        ("tool_calls", pa.string()),
        ("observations", pa.string()),
        ("turn_reward", pa.float64()),
        ("reward", pa.float64()),
        ("rewards", pa.string()),
        ("advantage", pa.float64()),
        ("stop_reason", pa.string()),
        ("success", pa.bool_()),
        ("info", pa.string()),
        ("ratio", pa.float64()),
        ("clipped", pa.bool_()),
        ("turn_weight", pa.float64()),
        ("relative_turn_weight", pa.float64()),
    ]
)
_ITERATION = re.compile(r"iteration-(\d+)")
_KEYS = ("iteration", "split", "trajectory", "turn")
_NEVER_NULL = (*_KEYS, "task", "group", "turns")


class TrajectoryLog:
    """
    Writes the trajectories of one process.

    Args:
        output_dir (`str` or `Path`, *optional*):
            Directory of the run. `None` saves nothing.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer, for the columns of text.
        process_index (`int`, *optional*, defaults to `0`), num_processes (`int`, *optional*, defaults to `1`):
            This process, and how many there are.
    """

    def __init__(
        self,
        output_dir: str | Path | None,
        tokenizer: "PreTrainedTokenizerBase",
        process_index: int = 0,
        num_processes: int = 1,
    ):
        self.directory = None if output_dir is None else Path(output_dir) / "trajectories"
        self._tokenizer = tokenizer
        self._process_index = process_index
        self._num_processes = num_processes
        self._tables: list[pa.Table] = []
        self._times_written: dict[tuple[str, int], int] = {}

    def add(
        self,
        outcomes: "list[Outcome]",
        trajectories: "list[Trajectory]",
        updates: "Mapping[Key, TurnUpdate] | None" = None,
    ) -> None:
        """
        Take in trajectories, to be written by the next [`write`].

        Args:
            outcomes (`list[Outcome]`), trajectories (`list[Trajectory]`):
                What became of them, and the trajectories themselves, in the same order.
            updates (`dict[tuple[int, int], TurnUpdate]`, *optional*):
                How the turns were trained on, by position in `trajectories` and number of the turn.
        """
        if self.directory is None:
            return
        updates = {} if updates is None else updates
        rows = []
        for position, (outcome, trajectory) in enumerate(zip(outcomes, trajectories, strict=True)):
            for row in rows_of(outcome, trajectory, self._decode):
                update = updates.get((position, row["turn"]))
                if update is not None:
                    row["ratio"], row["clipped"] = update.ratio, update.is_clipped
                    row["turn_weight"], row["relative_turn_weight"] = update.weight, update.relative_weight
                rows.append(row)
        self._tables.append(pa.Table.from_pylist(rows, schema=SCHEMA))

    def clear(self) -> None:
        """Forget what was added and not written, by an evaluation that failed."""
        self._tables = []

    def write(self, split: str, iteration: int, num_episodes: int | None = None) -> Path | None:
        """
        Write what was added since the last call.

        Args:
            split (`str`):
                `"train"`, or the metric prefix of an evaluation.
            iteration (`int`):
                Iterations done.
            num_episodes (`int`, *optional*):
                Leave out trajectories whose number is not smaller: an evaluation may repeat rows at its end.

        Returns:
            `Path`, *optional*:
                The file of this process; `None` where nothing is saved.
        """
        if self.directory is None:
            return None
        table = pa.concat_tables([SCHEMA.empty_table(), *self._tables])
        self.clear()
        if num_episodes is not None:
            table = table.filter(pa.compute.less(table["trajectory"], num_episodes))
        for name, value in (("iteration", iteration), ("split", split)):
            position = SCHEMA.get_field_index(name)
            table = table.set_column(position, SCHEMA.field(name), pa.repeat(pa.scalar(value), len(table)))
        table = table.cast(SCHEMA)

        directory = self.directory / _directory_name(split)
        directory.mkdir(parents=True, exist_ok=True)
        if split == "train":
            # an iteration that is played again brings its evaluations again
            self._times_written = {key: times for key, times in self._times_written.items() if key[1] < iteration}
            if iteration == 1 and self._process_index == 0:
                self._remove_older_run()
        times = self._times_written[split, iteration] = self._times_written.get((split, iteration), 0) + 1
        if times == 1 and self._process_index == 0:
            self._remove_stale_files(directory, iteration)
        path = directory / self._file_name(iteration, times, self._process_index)
        temporary = path.with_name(f".{path.name}.tmp")
        pq.write_table(table, temporary, compression="zstd")
        os.replace(temporary, path)
        return path

    def _file_name(self, iteration: int, times: int, process: int | str) -> str:
        """Name of the file that a process writes for the `times`-th time; `"*"` stands for any process."""
        number = f"-{times}" if times > 1 else ""
        of_several = f".process-{process}-of-{self._num_processes}" if self._num_processes > 1 else ""
        return f"{_stem(iteration)}{number}{of_several}.parquet"

    def _remove_stale_files(self, directory: Path, iteration: int) -> None:
        """Remove what an earlier run left of an iteration, but for the files that this run replaces."""
        # judged by name: another process may be writing its file at this moment
        replaced = self._file_name(iteration, 1, "*")
        for path in [*directory.glob(f"{_stem(iteration)}*.parquet")]:
            if not path.match(replaced):
                path.unlink(missing_ok=True)

    def _remove_older_run(self) -> None:
        """Training begins anew: what lies here of later iterations, and of evaluations after the first, is older."""
        for path in [*self.directory.glob("*/iteration-*.parquet")]:
            number = _ITERATION.match(path.name)
            if number and int(number[1]) >= (2 if path.parent.name == "train" else 1):
                path.unlink(missing_ok=True)

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _directory_name(split: str) -> str:
    """Name of the directory of a split, which leads nowhere else whatever the split is called."""
    return quote(split, safe=" ").replace(".", "%2E")


def _stem(iteration: int) -> str:
    return f"iteration-{iteration:06d}"


def find_files(run_dir: str | Path) -> list[Path]:
    """
    The files of a run.

    Args:
        run_dir (`str` or `Path`):
            `output_dir` of the run, its `trajectories`, the directory of a split, or one file.

    Raises:
        `FileNotFoundError`:
            When there are none.
    """
    run_dir = Path(run_dir)
    if run_dir.is_file():
        return [run_dir]
    for pattern in ("trajectories/*/iteration-*.parquet", "*/iteration-*.parquet", "iteration-*.parquet"):
        files = sorted(run_dir.glob(pattern))
        if files:
            return files
    raise FileNotFoundError(
        f"{run_dir} has no saved trajectories (trajectories/<split>/iteration-*.parquet). Give the `output_dir` of a "
        "run with `save_trajectories=True`."
    )


def read_trajectories(run_dir: str | Path) -> pa.Table:
    """
    All saved turns of a run in the order of their files, trajectories and turns. To stream a large run, use
    `datasets.load_dataset("parquet", data_files=...)`.

    Args:
        run_dir (`str` or `Path`):
            As in [`find_files`].
    """
    return read_rows(find_files(run_dir)).drop_columns(["file"])


def read_rows(
    paths: list[Path],
    splits: list[str] | None = None,
    iterations: list[int] | None = None,
    newest_first: bool = False,
    columns: list[str] | None = None,
) -> pa.Table:
    """
    Rows of some files, with one more column: `file`, the number of the file in [`number_files`].

    Args:
        paths (`list[Path]`):
            The files.
        splits (`list[str]`, *optional*), iterations (`list[int]`, *optional*):
            Read these only.
        newest_first (`bool`, *optional*, defaults to `False`):
            Whether the latest iterations come first.
        columns (`list[str]`, *optional*):
            Read these and those that order the rows only. All columns by default.

    Raises:
        `ValueError`:
            When a file is no file of trajectories.
    """
    wanted = [("split", "in", splits), ("iteration", "in", iterations)]
    filters = [condition for condition in wanted if condition[2] is not None] or None
    numbers = number_files(paths)
    names = None if columns is None else [name for name in SCHEMA.names if name in {*_KEYS, *columns}]
    tables = []
    for path in paths:
        try:
            table = pq.read_table(path, schema=SCHEMA, columns=names, filters=filters)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} cannot be read as saved trajectories: {error}") from error
        empty = next((name for name in _NEVER_NULL if name in table.column_names and table[name].null_count), None)
        if empty is not None:
            raise ValueError(f"{path} cannot be read as saved trajectories: {empty} is missing in some of its rows.")
        tables.append(table.append_column("file", pa.repeat(pa.scalar(numbers[path], pa.int32()), len(table))))
    keys = [("iteration", "descending" if newest_first else "ascending")]
    keys += [(name, "ascending") for name in ("split", "file", "trajectory", "turn")]
    return pa.concat_tables(tables).sort_by(keys)


def number_files(paths: list[Path]) -> dict[Path, int]:
    """Number of each file, from 0; the files that several processes wrote of one iteration or evaluation share one."""
    sets = {path: _without_process(path) for path in paths}
    numbers = {name: number for number, name in enumerate(sorted(set(sets.values())))}
    return {path: numbers[name] for path, name in sets.items()}


def _without_process(path: Path) -> str:
    return str(path.parent / path.name.split(".")[0])
