"""
What the curves of a run show: numbers by iteration, from the rows of its trajectories and the trainer's history.

Rewards and successes are means over groups, so that every task counts once, and the band around a reward is the mean
over groups of the worst and the best episode. Episodes that the environment spoiled count among the stop reasons only,
as in an evaluation's metrics.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from ..envs.base import ENVIRONMENT_FAULTS


# columns of the trajectory log that the curves are computed from
COLUMNS = ["group", "turns", "reward", "stop_reason", "success", "ratio", "relative_turn_weight"]
_POINT = ["split", "iteration"]
_MAX_REASONS = 7  # colours that can be told apart
_MAX_TURN_CURVES = 8
_DIGITS = 5

History = Mapping[str, Mapping[int, float]]


@dataclass
class Series:
    """
    One curve.

    Args:
        name (`str`):
            Name in the legend.
        split (`str`):
            Split whose episodes its points stand for.
        x (`list[int]`), y (`list[float]`):
            Iterations, ascending, and a value for each.
        low (`list[float]`, *optional*), high (`list[float]`, *optional*):
            Ends of the band around the values.
    """

    name: str
    split: str
    x: list[int]
    y: list[float]
    low: list[float] | None = None
    high: list[float] | None = None


@dataclass
class Chart:
    """
    Curves that share their axes.

    Args:
        title (`str`), note (`str`):
            What is shown, and how it is measured.
        series (`list[Series]`):
            The curves.
        stacked (`bool`, *optional*, defaults to `False`):
            Whether the values lie on top of one another. All series have the same iterations then.
        ordered (`bool`, *optional*, defaults to `False`):
            Whether the series have an order that their colours should show.
        percent (`bool`, *optional*, defaults to `False`):
            Whether the values are shares.
        zero (`bool`, *optional*, defaults to `False`):
            Whether the axis of values begins at zero.
        reference (`float`, *optional*):
            A value that the others are compared with.
    """

    title: str
    note: str
    series: list[Series] = field(default_factory=list)
    stacked: bool = False
    ordered: bool = False
    percent: bool = False
    zero: bool = False
    reference: float | None = None


def draw(table: pa.Table, history: History | None) -> tuple[list[Chart], list[str]]:
    """
    The curves of a run.

    Args:
        table (`pa.Table`):
            Rows of [`~seeupo_trl.trajectory_log.read_rows`], with at least [`COLUMNS`].
        history (`dict[str, dict[int, float]]`, *optional*):
            The trainer's metrics by name and iteration; `None` where there are none.

    Returns:
        `tuple[list[Chart], list[str]]`:
            The charts that have a curve, and a sentence for each that has none.
    """
    for name in ("reward", "ratio", "relative_turn_weight"):
        column = table[name]
        finite = pc.if_else(pc.is_finite(column), column, pa.scalar(None, pa.float64()))
        table = table.set_column(table.column_names.index(name), name, finite)
    episodes = table.filter(pc.less_equal(table["turn"], 1))  # one row for each episode
    splits = sorted(pc.unique(table["split"]).to_pylist(), key=lambda split: (split != "train", split))
    charts = [
        _rewards(episodes, splits),
        _successes(episodes, splits),
        _turns(episodes, splits),
        *_stop_reasons(episodes, splits),
        *_by_turn(table, splits),
    ]
    notices = []
    if history is not None:
        charts += [_entropy(history, splits), _seconds(history)]
    shown = [chart for chart in charts if chart.series]
    missing = [chart.title for chart in charts if not chart.series]
    if missing:
        notices.append(f"Left out, as the run has no such values: {', '.join(missing)}.")
    return shown, notices


def _rewards(episodes: pa.Table, splits: list[str]) -> Chart:
    groups = _by_group(_valid(episodes), [("reward", "mean"), ("reward", "min"), ("reward", "max")])
    groups = groups.filter(pc.is_valid(groups["reward_mean"]))
    means = _by_point(groups, [(f"reward_{name}", "mean") for name in ("mean", "min", "max")])
    chart = Chart("Reward", "mean over groups; band: from a group's worst to its best episode")
    for split, rows in _of_splits(means, splits):
        band = {"low": _values(rows, "reward_min_mean"), "high": _values(rows, "reward_max_mean")}
        chart.series.append(Series(split, split, _iterations(rows), _values(rows, "reward_mean_mean"), **band))
    return chart


def _successes(episodes: pa.Table, splits: list[str]) -> Chart:
    valid = _valid(episodes)
    # where others of the iteration report success, an episode that does not ended before it could
    valid = valid.append_column("solved", pc.cast(pc.fill_null(valid["success"], False), pa.float64()))
    groups = _by_group(valid, [("solved", "mean"), ("success", "count")])
    means = _by_point(groups, [("solved_mean", "mean"), ("success_count", "sum")])
    means = means.filter(pc.greater(means["success_count_sum"], 0))
    chart = Chart("Success", "share of a group's episodes, mean over groups", percent=True, zero=True)
    for split, rows in _of_splits(means, splits):
        chart.series.append(Series(split, split, _iterations(rows), _values(rows, "solved_mean_mean")))
    return chart


def _turns(episodes: pa.Table, splits: list[str]) -> Chart:
    means = _by_point(episodes, [("turns", "mean"), ("turns", "min"), ("turns", "max")])
    chart = Chart("Turns", "mean over episodes; band: fewest and most", zero=True)
    for split, rows in _of_splits(means, splits):
        band = {"low": _values(rows, "turns_min"), "high": _values(rows, "turns_max")}
        chart.series.append(Series(split, split, _iterations(rows), _values(rows, "turns_mean"), **band))
    return chart


def _stop_reasons(episodes: pa.Table, splits: list[str]) -> Iterator[Chart]:
    """One chart for each split, in the same colours; the rarest reasons count as one."""
    episodes = episodes.filter(pc.is_valid(episodes["stop_reason"]))
    frequency = Counter(episodes["stop_reason"].to_pylist())
    reasons = sorted(frequency, key=lambda reason: (-frequency[reason], reason))
    name_of = {reason: reason for reason in reasons}
    if len(reasons) > _MAX_REASONS:
        rare = reasons[_MAX_REASONS - 1 :]
        name_of |= dict.fromkeys(rare, f"{len(rare)} others")
    counts = episodes.group_by([*_POINT, "stop_reason"]).aggregate([([], "count_all")])
    for split in splits:
        chart = Chart(
            "Stop reasons" if len(splits) == 1 else f"Stop reasons, {split}",
            "share of episodes",
            stacked=True,
            percent=True,
        )
        by_name: dict[str, Counter[int]] = {name: Counter() for name in name_of.values()}
        totals: Counter[int] = Counter()
        for row in counts.filter(pc.equal(counts["split"], split)).to_pylist():
            by_name[name_of[row["stop_reason"]]][row["iteration"]] += row["count_all"]
            totals[row["iteration"]] += row["count_all"]
        iterations = sorted(totals)
        for name, count in by_name.items():
            if iterations:
                shares = [_round(count[at] / totals[at]) for at in iterations]
                chart.series.append(Series(name, split, iterations, shares))
        yield chart


def _by_turn(table: pa.Table, splits: list[str]) -> Iterator[Chart]:
    """Ratio and M / A: a curve for each turn, or for some turns together where there are many."""
    for name, title in (("ratio", "Ratio by turn"), ("relative_turn_weight", "M / A by turn")):
        rows = table.filter(pc.is_valid(table[name]))
        last = pc.max(rows["turn"]).as_py() or 0
        width = -(-last // _MAX_TURN_CURVES)
        note = "mean over trained trajectories" + (f"; {width} turns a curve" if width > 1 else "")
        chart = Chart(title, note, ordered=True, reference=1.0)
        if last:
            rows = rows.append_column("first", pc.divide(pc.subtract(rows["turn"], 1), width))
            means = rows.group_by([*_POINT, "first"]).aggregate([(name, "mean")]).sort_by("iteration")
            for split, of_split in _of_splits(means, splits):
                for number in sorted(pc.unique(of_split["first"]).to_pylist()):
                    first, end = number * width + 1, min((number + 1) * width, last)
                    label = f"turn {first}" if first == end else f"turns {first}-{end}"
                    points = of_split.filter(pc.equal(of_split["first"], number))
                    chart.series.append(Series(label, split, _iterations(points), _values(points, f"{name}_mean")))
        yield chart


def _entropy(history: History, splits: list[str]) -> Chart:
    chart = Chart("Entropy", "nats a token; from trainer_state.json")
    for split in splits:
        values = history.get("entropy" if split == "train" else f"{split}_entropy")
        if values:
            iterations = sorted(values)
            chart.series.append(Series(split, split, iterations, [_round(values[at]) for at in iterations]))
    return chart


def _seconds(history: History) -> Chart:
    names = {"rollout": "rollout", "old_pass": "passes before the update", "update": "update"}
    values = {name: history[f"time/{name}"] for name in names if history.get(f"time/{name}")}
    chart = Chart("Seconds", "of an iteration; from trainer_state.json", stacked=True, zero=True)
    iterations = sorted(set.intersection(*map(set, values.values()))) if values else []
    if iterations:
        for name, seconds in values.items():
            chart.series.append(Series(names[name], "train", iterations, [_round(seconds[at]) for at in iterations]))
    return chart


def _valid(episodes: pa.Table) -> pa.Table:
    """Without episodes that the environment spoiled."""
    spoiled = pc.is_in(episodes["stop_reason"], pa.array([str(reason) for reason in ENVIRONMENT_FAULTS]))
    return episodes.filter(pc.invert(spoiled))


def _by_group(episodes: pa.Table, aggregations: list[tuple[str, str]]) -> pa.Table:
    return episodes.group_by([*_POINT, "file", "group"]).aggregate(aggregations)


def _by_point(rows: pa.Table, aggregations: list[tuple[str, str]]) -> pa.Table:
    return rows.group_by(_POINT).aggregate(aggregations).sort_by("iteration")


def _of_splits(rows: pa.Table, splits: list[str]) -> Iterator[tuple[str, pa.Table]]:
    for split in splits:
        of_split = rows.filter(pc.equal(rows["split"], split))
        if len(of_split):
            yield split, of_split


def _iterations(rows: pa.Table) -> list[int]:
    return rows["iteration"].to_pylist()


def _values(rows: pa.Table, name: str) -> list[float]:
    return [_round(value) for value in rows[name].to_pylist()]


def _round(value: float) -> float:
    """Five digits: more cannot be seen, and would make the page longer."""
    return float(f"{value:.{_DIGITS}g}")
