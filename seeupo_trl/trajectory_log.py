"""
Saved trajectories: one parquet file for each iteration and evaluation, one row a turn.

Files are `OUTPUT_DIR/trajectories/<split>/iteration-<number>.parquet`, where the split is `train`, or an evaluation's
metric prefix (`eval`, `eval_<dataset>`). Several processes write one file each (`.process-0-of-2`); a second
evaluation of the same split after the same iteration gets a number (`-2`). A file appears when it is whole, and a
resumed run replaces those of the iterations that it plays again.

Columns ([`SCHEMA`]):

| column | meaning |
|---|---|
| `iteration`, `split` | iterations done, this one included; `"train"` or an evaluation's metric prefix |
| `task`, `category` | the dataset row's `id` or `task_id` (else a hash of its prompt), and its category |
| `group`, `trajectory` | numbers of the group of completions of one prompt and of the trajectory, over all processes |
| `turn`, `turns` | number of the turn, from 1, and how many there are; an episode without a turn has one row, turn 0 |
| `context_kept` | how many tokens of the previous turn's context and action the context begins with |
| `context_ids`, `context_text` | the context after those tokens, so that a file grows with what is new in a turn |
| `action_ids`, `action_text` | what the policy wrote |
| `sampling_logps` | log-probability of each action token, where the sampler reports it |
| `reasoning`, `content`, `tool_calls` | the parsed action; calls as JSON |
| `observations` | JSON list of the messages that answered the action |
| `reward`, `rewards` | weighted sum of the reward functions, and JSON of each without weight |
| `advantage` | normalised advantage |
| `stop_reason`, `success`, `info` | how the episode ended; what the environment reported, as JSON |
| `ratio`, `clipped` | sequence ratio in the loss of the turn's last optimizer step, and whether it was clipped there |
| `turn_weight`, `relative_turn_weight` | turn weight `M` of that step, and `M / A` |

The last four are null in evaluations and where no optimizer step computed the turn (no advantage). `reasoning`,
`content`, `tool_calls` and `observations` are null where a rollout function gave no messages.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


# the viewer reads files without waiting for torch
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .evaluation.outcome import Outcome
    from .scoring.turn_buffer import Key
    from .trajectory import Trajectory, Turn
    from .update.metrics import TurnUpdate


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
_DEEPEST = 50


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
            for row in self._rows(outcome, trajectory):
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

        path = self._path(split, iteration)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        pq.write_table(table, temporary, compression="zstd")
        os.replace(temporary, path)
        return path

    def _path(self, split: str, iteration: int) -> Path:
        times = self._times_written[split, iteration] = self._times_written.get((split, iteration), 0) + 1
        directory = self.directory / quote(split, safe=" ").replace(".", "%2E")
        stem = f"iteration-{iteration:06d}"
        several = self._num_processes > 1
        if times == 1 and self._process_index == 0:
            # what an earlier run left of this iteration that this run does not replace
            replaced = f"{stem}.process-*-of-{self._num_processes}.parquet" if several else f"{stem}.parquet"
            for stale in {*directory.glob(f"{stem}*.parquet")} - {*directory.glob(replaced)}:
                stale.unlink(missing_ok=True)
        number = f"-{times}" if times > 1 else ""
        process = f".process-{self._process_index}-of-{self._num_processes}" if several else ""
        return directory / f"{stem}{number}{process}.parquet"

    def _rows(self, outcome: "Outcome", trajectory: "Trajectory") -> Iterator[dict[str, Any]]:
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
                "context_text": self._decode(turn.context_ids[kept:]),
                "action_ids": turn.action_ids,
                "action_text": self._decode(turn.action_ids),
                "sampling_logps": turn.sampling_logps,
            }
            if parsed is not None:
                message, observations = parsed[number - 1]
                row["reasoning"] = _plain_text(message.get("reasoning_content"))
                row["content"] = _plain_text(message.get("content"))
                row["tool_calls"] = to_json(message["tool_calls"]) if message.get("tool_calls") else None
                row["observations"] = to_json(observations)
            yield row
            previous = turn

    def _decode(self, token_ids: list[int]) -> str:
        return _plain_text(
            self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )


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
    paths: list[Path], splits: list[str] | None = None, iterations: list[int] | None = None, newest_first: bool = False
) -> pa.Table:
    """
    Rows of some files, with one more column: `file`, a number that the files of one evaluation or iteration share.

    Args:
        paths (`list[Path]`):
            The files.
        splits (`list[str]`, *optional*), iterations (`list[int]`, *optional*):
            Read these only.
        newest_first (`bool`, *optional*, defaults to `False`):
            Whether the latest iterations come first.
    """
    wanted = [("split", "in", splits), ("iteration", "in", iterations)]
    filters = [condition for condition in wanted if condition[2] is not None] or None
    sets = sorted({_without_process(path) for path in paths})
    tables = []
    for path in paths:
        table = pq.read_table(path, schema=SCHEMA, filters=filters)
        number = pa.repeat(pa.scalar(sets.index(_without_process(path)), pa.int32()), len(table))
        tables.append(table.append_column("file", number))
    keys = [("iteration", "descending" if newest_first else "ascending")]
    keys += [(name, "ascending") for name in ("split", "file", "trajectory", "turn")]
    return pa.concat_tables(tables).sort_by(keys)


def _without_process(path: Path) -> str:
    return str(path.parent / path.name.split(".")[0])


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
        turns.append(Turn(context_ids, row["action_ids"], row["sampling_logps"]))
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


def to_json(value: Any) -> str:
    """JSON in ASCII of anything: what JSON cannot hold is written as text."""
    return json.dumps(_plain(value, _DEEPEST), allow_nan=False)


def _plain(value: Any, depth: int) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, float) and np.isfinite(value):
        return value
    if isinstance(value, int):  # Python refuses to write out more than 4,300 digits
        return value if value.bit_length() < 10_000 else f"an integer of {value.bit_length()} bits"
    if isinstance(value, Mapping) and depth:
        return {str(key): _plain(item, depth - 1) for key, item in value.items()}
    if isinstance(value, list | tuple) and depth:
        return [_plain(item, depth - 1) for item in value]
    return str(value)


def _plain_text(value: Any) -> str | None:
    """Text that UTF-8 can hold (a lone surrogate becomes a replacement character); other content as JSON."""
    if value is None:
        return None
    text = value if isinstance(value, str) else to_json(value)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


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
