"""
Draw `learning-curve.png` from the runs of `examples/seeupo_in_one_page.py` in `one_page_runs.jsonl`.

    for seed in 0 1 2 3 4; do
        python examples/seeupo_in_one_page.py --seed $seed --json docs/images/one_page_runs.jsonl
    done
    python docs/images/learning_curve.py
"""

import json
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np


HERE = Path(__file__).parent
BLUE, GREY = "#1f5fa8", "#666666"


def main() -> None:
    runs = [json.loads(line) for line in (HERE / "one_page_runs.jsonl").read_text().splitlines()]
    success = np.array([run["success"] for run in runs])  # (seeds, iterations)
    (chance,) = {run["chance"] for run in runs}
    iterations = np.arange(1, success.shape[1] + 1)

    plt.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    axes.fill_between(
        iterations, success.min(0), success.max(0), color=BLUE, alpha=0.2, linewidth=0, label="lowest to highest"
    )
    axes.plot(iterations, success.mean(0), color=BLUE, linewidth=2.2, label=f"mean of {len(runs)} seeds")
    axes.axhline(chance, color=GREY, linestyle="--", linewidth=1.3)
    axes.text(iterations[-1], chance - 0.02, f"uniform guesses: {chance:.2f}", color=GREY, ha="right", va="top")
    axes.set(
        xlabel="iteration",
        ylabel="success rate of rollouts",
        title="A search game of three turns, learned from a random start",
        xlim=(1, iterations[-1]),
        ylim=(0, 1.02),
    )
    axes.title.set_fontsize(13)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="center right")
    figure.savefig(HERE / "learning-curve.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
