"""
Tables and figures of the study, from the lines in `results/` and nothing else.

    python benchmarks/learning/report.py

Writes `results/tables.md`, which the page `docs/evidence.md` shows, and `docs/images/evidence*.svg`.

Statistics are those of Agarwal et al. 2021 (arXiv 2108.13264): interquartile means over seeds, 95% intervals of a
bootstrap that draws seeds within each task, and the probability that a run of one method is better than one of
another. An arm is shown where it has at least `FEWEST` seeds, and judged where it has `ENOUGH`: intervals of a
bootstrap over a few seeds are too narrow.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from arms import ARMS
from study import RESULTS, SEEDS, best_rate, final_success, lines
from tasks import TASKS


plt.switch_backend("svg")
plt.rcParams.update({"svg.hashsalt": "seeupo", "font.size": 9, "figure.constrained_layout.use": True})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})

IMAGES = Path(__file__).parents[2] / "docs" / "images"
RESAMPLES = 4000
FEWEST = 3
ENOUGH = 8
BASE = "seeupo-reverse"
# compared beside the base, where both were run
PAIRS = [
    ("seeupo-reverse-x4", "seeupo-forward-x4"),
    ("seeupo-reverse-x4", "seeupo-simultaneous-x4"),
    ("seeupo-reverse-x4", "seeupo-reverse"),
]
CURVES = {
    "seeupo-reverse": ("SeeUPO, reverse", "#c1272d", "-"),
    "seeupo-forward": ("SeeUPO, forward", "#e8891c", "-"),
    "grpo-steps": ("GRPO, as many steps", "#1f4e9c", "-"),
    "gspo-steps": ("GSPO, as many steps", "#5b9bd5", "-"),
    "grpo-2": ("GRPO, two steps", "#2e8b57", "--"),
    "grpo": ("GRPO, one step", "#777777", ":"),
}


def runs_of(task: str) -> dict[str, list[dict]]:
    """The runs of each arm that count: the seeds that were not tuned on, at the learning rate that was chosen."""
    all_lines = lines(task)
    chosen = {}
    for arm in ARMS:
        rate = best_rate(all_lines, arm)
        runs = [line for line in all_lines if (line["arm"], line["lr"]) == (arm, rate) and line["seed"] in SEEDS]
        if len(runs) >= FEWEST:
            chosen[arm] = sorted(runs, key=lambda line: line["seed"])
    return chosen


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Mean of the middle half, over the last axis."""
    values = np.sort(values, axis=-1)
    cut = values.shape[-1] // 4
    return values[..., cut : values.shape[-1] - cut].mean(-1)


def resampled(values: Sequence[float], generator: np.random.Generator) -> np.ndarray:
    """Bootstrap samples of the runs of one task, shape `(RESAMPLES, n)`."""
    return np.asarray(values)[generator.integers(len(values), size=(RESAMPLES, len(values)))]


def interval(samples: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)


def better(of: np.ndarray, than: np.ndarray) -> np.ndarray:
    """Probability that a run of one is better than one of the other; equal ones count half. Over the last axis."""
    difference = of[..., :, None] - than[..., None, :]
    return ((difference > 0) + 0.5 * (difference == 0)).mean((-1, -2))


def estimate(statistic: Callable, tasks: Sequence[Sequence[Sequence[float]]]) -> tuple[float, float, float]:
    """
    A statistic with its interval.

    Args:
        statistic (`Callable`): Of one array a method, shape `(..., n)`; its values are averaged over tasks.
        tasks: For each task the values of each method.
    """
    generator = np.random.default_rng(0)
    point = np.mean([statistic(*map(np.asarray, methods)) for methods in tasks])
    samples = np.mean([statistic(*(resampled(m, generator) for m in methods)) for methods in tasks], axis=0)
    return float(point), *interval(samples)


def shown(value: tuple[float, float, float]) -> str:
    return "{:.2f} [{:.2f}, {:.2f}]".format(*value)


def middle(values: Sequence[float]) -> str:
    """Interquartile mean with its interval."""
    return shown(estimate(interquartile_mean, [[values]]))


def successes(runs: list[dict]) -> list[float]:
    return [final_success(run) for run in runs]


def difference(of: np.ndarray, than: np.ndarray) -> np.ndarray:
    return interquartile_mean(of) - interquartile_mean(than)


def compared(pairs: Sequence[Sequence[Sequence[float]]], first: str = "SeeUPO reverse") -> str:
    """Three cells: how much better the first method is, how likely a run of it is better, and what that says."""
    value, low, high = estimate(difference, pairs)
    verdict = first if low > 0 else "the other" if high < 0 else "noise"
    if min(len(method) for methods in pairs for method in methods) < ENOUGH:
        verdict = "too few seeds"
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}] | {shown(estimate(better, pairs))} | {verdict}"


def table_of(runs: dict[str, list[dict]]) -> str:
    """A row an arm: success, against the base, and what it cost."""
    base = successes(runs[BASE])
    rows = [
        "| arm | learning rate | seeds | success at the end | SeeUPO reverse, minus this | "
        "P(SeeUPO reverse is better) | better | success on the way | optimizer steps | update, GFLOP | CPU s |",
        "|---|---:|---:|---:|---:|---:|---|---:|---:|---:|---:|",
    ]
    for arm, own in sorted(runs.items(), key=lambda item: -interquartile_mean(np.array(successes(item[1])))):
        versus = " | | " if arm == BASE else compared([[base, successes(own)]])
        steps, flops, seconds = (
            np.mean([run[name] for run in own]) for name in ("optimizer_steps", "update_flops", "cpu_seconds")
        )
        on_the_way = [np.mean(run["success"]) for run in own]
        rows.append(
            f"| `{arm}` | {own[0]['lr']:g} | {len(own)} | {middle(successes(own))} | {versus} | "
            f"{middle(on_the_way)} | {steps:.0f} | {flops / 1e9:.0f} | {seconds:.1f} |"
        )
    return "\n".join(rows) + "\n"


def table_of_pairs(runs: dict[str, list[dict]]) -> str:
    """A row for each of `PAIRS` that was run."""
    rows = ["| one | the other | difference of success | P(one is better) | better |", "|---|---|---:|---:|---|"]
    for one, other in PAIRS:
        if one in runs and other in runs:
            versus = compared([[successes(runs[one]), successes(runs[other])]], "one")
            rows.append(f"| `{one}` | `{other}` | {versus} |")
    return "" if len(rows) == 2 else "\n".join(rows) + "\n"


def table_of_all(by_task: dict[str, dict[str, list[dict]]]) -> str:
    """Arms that were run on several tasks, each weighing the same."""
    rows = [
        "| SeeUPO reverse against | tasks | difference of success | P(SeeUPO reverse is better) | better |",
        "|---|---|---:|---:|---|",
    ]
    for arm in ARMS:
        tasks = [task for task, runs in by_task.items() if arm in runs]
        if arm != BASE and len(tasks) > 1:
            pairs = [[successes(by_task[task][BASE]), successes(by_task[task][arm])] for task in tasks]
            rows.append(f"| `{arm}` | {', '.join(tasks)} | {compared(pairs)} |")
    return "\n".join(rows) + "\n"


def draw(axis, runs: dict[str, list[dict]], total: str, label: str, scale: float = 1.0) -> None:
    """Success over the course of a run, against what it has used of something."""
    generator = np.random.default_rng(0)
    for arm, (name, color, style) in CURVES.items():
        if arm not in runs:
            continue
        curves = np.array([run["success"] for run in runs[arm]]).T  # (points, seeds)
        points = curves.shape[0]
        smooth = np.array([curves[max(0, i - 3) : i + 1].mean(0) for i in range(points)])
        used = np.mean([run[total] for run in runs[arm]]) * scale * (np.arange(points) + 1) / points
        middle = interquartile_mean(smooth)
        picks = generator.integers(curves.shape[1], size=(400, curves.shape[1]))
        low, high = np.percentile(interquartile_mean(smooth[:, picks]), [2.5, 97.5], axis=-1)
        axis.plot(used, middle, style, color=color, label=name, linewidth=1.6)
        axis.fill_between(used, low, high, color=color, alpha=0.12, linewidth=0)
    axis.set_xlabel(label)
    axis.set_ylim(bottom=0)


def save(figure, name: str) -> None:
    figure.savefig(IMAGES / name, metadata={"Date": None})
    plt.close(figure)


def figures(by_task: dict[str, dict[str, list[dict]]]) -> None:
    for task, runs in by_task.items():
        figure, axes = plt.subplots(1, 4, figsize=(11, 2.7), sharey=True)
        for axis, (total, label, scale) in zip(
            axes,
            [
                ("episodes", "episodes", 1),
                ("optimizer_steps", "optimizer steps", 1),
                ("update_flops", "GFLOP of the update", 1e-9),
                ("cpu_seconds", "CPU seconds, rollouts included", 1),
            ],
            strict=True,
        ):
            draw(axis, runs, total, label, scale)
        axes[0].set_ylabel(f"success, {task}")
        axes[0].legend(fontsize=7, frameon=False)
        save(figure, f"evidence_{task}.svg")
    figure, axis = plt.subplots(figsize=(6, 3.2))
    shown_arms = {
        arm: runs for arm, runs in by_task["search"].items() if arm in ("seeupo-reverse", "grpo", "grpo-steps")
    }
    draw(axis, shown_arms, "episodes", "episodes")
    axis.set_ylabel("success")
    axis.legend(fontsize=8, frameon=False)
    save(figure, "evidence.svg")


def sections(by_task: dict[str, dict[str, list[dict]]]) -> str:
    """What the page shows of each task, and of all."""
    parts = []
    for task, runs in by_task.items():
        alt = f"Success in {task} against episodes, optimizer steps, FLOPs and seconds"
        parts.append(f"### `{task}`\n\n![{alt}](images/evidence_{task}.svg)\n\n{table_of(runs)}")
        pairs = table_of_pairs(runs)
        if pairs:
            parts.append(pairs)
    if len(by_task) > 1:
        parts.append(f"### All of them, each weighing the same\n\n{table_of_all(by_task)}")
    return "\n".join(parts)


def main() -> None:
    by_task = {task: runs for task in TASKS if BASE in (runs := runs_of(task))}
    (RESULTS / "tables.md").write_text(sections(by_task))
    figures(by_task)
    print(sections(by_task))
    print(f"{sum(len(lines(task)) for task in TASKS)} lines")


if __name__ == "__main__":
    main()
