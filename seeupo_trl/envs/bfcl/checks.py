"""
The official checks of BFCL v4 multi-turn on calls that are data, without its executor.

`multi_turn_checker` plays all calls of a trajectory anew, the model's and the ground truth's side by side, and
compares states and results after every user turn. [`TrajectoryCheck`] does the same with its sub-checkers, one user
turn at a time, and gives the same verdict as it gives in a fresh process. It is defined where that one raises:

- a trajectory of fewer (or more) user turns than the ground truth fails, as in the official evaluation;
- a state in which a directory contains itself fails.
"""

from collections.abc import Sequence

from .data import load_entry
from .package import multi_turn_checker
from .services import Call, Services, ground_truth


class TrajectoryCheck:
    """
    The checks of one trajectory.

    Args:
        task_id (`str`):
            Id of the task, such as `"multi_turn_base_0"`.
    """

    def __init__(self, task_id: str):
        entry = load_entry(task_id)
        self._truth_calls = ground_truth(task_id)
        self._model = Services(entry, circles=True)
        self._truth = Services(entry, beside=self._model, circles=True)
        self._model_results: list[str] = []
        self._turn = 0

    def end_user_turn(self, steps: Sequence[Sequence[Call]]) -> str | None:
        """
        Check the next user turn.

        Args:
            steps (`list[list[tuple[str, dict]]]`):
                The model's calls in it, each a name and keyword arguments, one list for each assistant message.

        Returns:
            `str` or `None`: the reason of the failure, or `None` if the turn passes. A turn whose ground truth is
            empty passes whatever was called; the calls show in the state the next turn is checked on.
        """
        turn = self._turn
        self._turn += 1
        # All calls of the model first: the order shows where the two sets of services share an object.
        self._model_results += [self._model.call(*call) for step in steps for call in step]
        truth_results = [self._truth.call(*call) for call in self._truth_calls[turn]]
        if not truth_results:
            return None
        if multi_turn_checker.is_empty_execute_response(steps):
            return f"Model response list is empty for turn {turn}"
        try:
            verdict = multi_turn_checker.state_checker(self._model.instances, self._truth.instances)
        except RecursionError:
            return f"State of turn {turn} is cyclic (a directory was copied into itself)"
        if verdict["valid"]:
            verdict = multi_turn_checker.response_checker(self._model_results, truth_results, turn)
        return None if verdict["valid"] else verdict["error_message"]


def check_trajectory(task_id: str, turns: Sequence[Sequence[Sequence[Call]]]) -> str | None:
    """
    Check a whole trajectory, as the official evaluation does with the decoded responses of a model.

    Args:
        task_id (`str`):
            Id of the task.
        turns (`list[list[list[tuple[str, dict]]]]`):
            The model's calls, by user turn and assistant message.

    Returns:
        `str` or `None`: the reason of the first failure, or `None` if the task is solved.
    """
    expected = len(ground_truth(task_id))
    if len(turns) != expected:
        return f"The trajectory has {len(turns)} user turns, the task {expected}"
    check = TrajectoryCheck(task_id)
    for steps in turns:
        failure = check.end_user_turn(steps)
        if failure is not None:
            return failure
    return None
