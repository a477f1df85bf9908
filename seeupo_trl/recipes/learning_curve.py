"""What a run learned, in the terminal: success by iteration as bars, and on held-out tasks before and after."""

import importlib.util
from collections.abc import Mapping, Sequence

from ..evaluation.comparison import FEWEST_TASKS, Change


MOST_LINES = 24
WIDTH = 28
SUCCESS, REWARD = "rewards/success/mean", "reward"


def print_learning_curve(history: Sequence[dict[str, float]], changes: Mapping[str, Change]) -> None:
    """
    Print a bar for each iteration, or for some that follow one another: the success of its episodes, and their reward.
    Tasks differ from iteration to iteration; below them are the bars of the same tasks before and after.

    Args:
        history (`list[dict[str, float]]`):
            `trainer.state.log_history`.
        changes (`dict[str, Change]`):
            What the evaluations found, by the name of the tasks.
    """
    logged = [(entry["step"], entry[SUCCESS], entry[REWARD]) for entry in history if {SUCCESS, REWARD} <= entry.keys()]
    if not logged:
        return
    if importlib.util.find_spec("rich") is None:
        print("pip install rich, and success by iteration is drawn here.")
        return
    from rich.bar import Bar
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    for name in ("", "reward", "success"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("0" + "1".rjust(WIDTH - 1), no_wrap=True)
    size = -(-len(logged) // MOST_LINES)
    for first in range(0, len(logged), size):
        steps, success, rewards = zip(*logged[first : first + size], strict=True)
        mean, reward = sum(success) / len(success), sum(rewards) / len(rewards)
        name = f"iteration {steps[0]}" if len(steps) == 1 else f"iterations {steps[0]}-{steps[-1]}"
        table.add_row(name, f"{reward:.2f}", f"{mean:.2f}", Bar(1.0, 0.0, mean, width=WIDTH))
    for name, change in changes.items():
        table.add_section()
        for when, mean in (("before", change.before), ("after", change.after)):
            table.add_row(f"{name}, {when}", "", f"{mean:.2f}", Bar(1.0, 0.0, mean, width=WIDTH))
    Console().print(table)


def describe_change(name: str, change: Change, before: str, after: str) -> str:
    """
    Success before and after training as a sentence, which says what of it is noise.

    Args:
        name (`str`):
            What the tasks are called.
        change ([`~seeupo_trl.evaluation.comparison.Change`]):
            The comparison.
        before (`str`), after (`str`):
            The two successes with their intervals.
    """
    verdict = "more than two standard errors" if change.is_beyond_noise else "within two standard errors: noise"
    if change.tasks < FEWEST_TASKS:
        verdict = f"fewer than {FEWEST_TASKS} tasks: too few to tell from noise"
    return (
        f"success on {change.tasks} {name} tasks: {before} before, {after} after; "
        f"difference {change.difference:+.3f}, standard error {change.standard_error:.3f} ({verdict})"
    )
