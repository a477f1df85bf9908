"""
Draws `learning-curve.png` from `learning-curve.jsonl`, which five runs wrote:

    for seed in 0 1 2 3 4; do
        python examples/seeupo_in_one_page.py --seed $seed --json docs/images/learning-curve.jsonl
    done
    python docs/images/learning_curve.py
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np


HERE = Path(__file__).parent
WINDOW = 5  # iterations, in each run: those of an iteration are other tasks than those of the next


def main() -> None:
    runs = [json.loads(line) for line in (HERE / "learning-curve.jsonl").read_text().splitlines()]
    success = np.array([run["success"] for run in runs])  # (runs, iterations)
    smooth = np.array([np.convolve(run, np.ones(WINDOW) / WINDOW, mode="valid") for run in success])
    iterations = np.arange(WINDOW, success.shape[1] + 1)
    mean, error = smooth.mean(0), smooth.std(0, ddof=1) / len(runs) ** 0.5

    figure, axes = plt.subplots(figsize=(6, 3.6), dpi=200, layout="constrained")
    for run in smooth:
        axes.plot(iterations, run, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.fill_between(iterations, mean - error, mean + error, color="tab:blue", alpha=0.25, linewidth=0)
    axes.plot(iterations, mean, color="tab:blue", label=f"mean of {len(runs)} seeds, and its standard error")
    axes.axhline(runs[0]["chance"], color="gray", linestyle=":", label="uniform guesses")
    axes.axhline(1, color="gray", linestyle="--", linewidth=0.8, label="binary search")
    axes.set(xlabel="iteration", ylabel="success of the rollouts", xlim=(0, success.shape[1]), ylim=(0, 1.05))
    axes.set_title("examples/seeupo_in_one_page.py: a number from 0 to 6 in three guesses", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(HERE / "learning-curve.png")


if __name__ == "__main__":
    main()
