"""
The study: every arm on every task, learning rates first, then the seeds that count.

    python benchmarks/learning/study.py --minutes 90
    python benchmarks/learning/study.py --tasks search --arms grpo seeupo-reverse

Each run is one line of `results/<task>.jsonl`. Runs that have a line are skipped, so that it goes on where it was
stopped. The learning rate of an arm is the one of `RATES` with the best final success (mean over the last tenth of the
episodes) of the tuning seeds; these count for nothing else. `report.py` makes the tables and figures.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

from arms import ARMS
from run import be_quiet, play
from tasks import TASKS


RESULTS = Path(__file__).with_name("results")
RATES = (1e-3, 2e-3, 4e-3)
TUNING_SEEDS = (100, 101)
SEEDS = tuple(range(10))

MAIN = [name for name in ARMS if not name.endswith("-x4")]
SHORT = ["seeupo-reverse", "seeupo-forward", "grpo", "grpo-2", "grpo-steps", "gspo-steps"]
# what is run, in this order
STUDY: list[tuple[str, list[str]]] = [
    ("search", MAIN),
    ("mastermind", SHORT),
    ("lake", SHORT),
    ("search", [name for name in ARMS if name.endswith("-x4")]),
    ("search-deep", SHORT),
    ("search-long", SHORT),
]

Job = tuple[str, str, float, int]  # task, arm, learning rate, seed


def lines(task: str) -> list[dict]:
    path = RESULTS / f"{task}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def final_success(line: dict) -> float:
    """Mean over the last tenth of the episodes."""
    last = line["success"][-(len(line["success"]) // 10) :]
    return sum(last) / len(last)


def best_rate(of_task: list[dict], arm: str) -> float:
    """The learning rate with the best final success of the tuning seeds; the smaller one of equals."""
    tuning = [line for line in of_task if line["arm"] == arm and line["seed"] in TUNING_SEEDS]
    success = {lr: [final_success(line) for line in tuning if line["lr"] == lr] for lr in RATES}
    return max(RATES, key=lambda lr: (sum(success[lr]) / max(len(success[lr]), 1), -lr))


def stages(study: list[tuple[str, list[str]]]) -> Iterator[list[Job]]:
    """Jobs that may run side by side; the second stage of a task needs the lines of its first."""
    for task, arms in study:
        yield [(task, arm, lr, seed) for seed in TUNING_SEEDS for arm in arms for lr in RATES]
        rates = {arm: best_rate(lines(task), arm) for arm in arms}
        # seed by seed: where time runs out, all arms have equally many
        yield [(task, arm, rates[arm], seed) for seed in SEEDS for arm in arms]


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="only these")
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="only these")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no run after so long")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    chosen = [(task, [arm for arm in arms if arm in (args.arms or ARMS)]) for task, arms in STUDY]
    chosen = [(task, arms) for task, arms in chosen if task in (args.tasks or TASKS) and arms]
    RESULTS.mkdir(exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=context, initializer=be_quiet) as pool:
        for jobs in stages(chosen):
            done = {(line["task"], line["arm"], line["lr"], line["seed"]) for line in lines(jobs[0][0])}
            due = [job for job in jobs if job not in done]
            running: set[Future] = set()
            while (due and time.monotonic() < end) or running:
                while due and len(running) < args.workers and time.monotonic() < end:
                    running.add(pool.submit(play, *due.pop(0)))
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    write(future.result())
            if due:
                print(f"{len(due)} runs of a stage of {jobs[0][0]} left when the time was up", flush=True)
                return


def write(line: dict) -> None:
    with (RESULTS / f"{line['task']}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(
        line["task"], line["arm"], line["lr"], line["seed"], f"{final_success(line):.3f}", line["seconds"], flush=True
    )


if __name__ == "__main__":
    main()
