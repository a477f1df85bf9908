"""Partial credit for the calls of a user turn that does not pass: not BFCL's score, but a reward that is rarely 0."""

from collections.abc import Sequence

from .services import Call


# what a call earns for its function's name alone
NAME_SHARE = 0.5


def share_of_calls_right(made: Sequence[Call], truth: Sequence[Call]) -> float:
    """
    How much of the ground truth the calls of a user turn hit, whatever their order.

    Each call of the ground truth is matched with the most similar call that is left. Similarity is 0 for another
    function; else half for the name and half for the arguments that are equal, as a fraction of all that either call
    has.

    Args:
        made (`list[tuple[str, dict]]`):
            The policy's calls, each a name and keyword arguments.
        truth (`list[tuple[str, dict]]`):
            The calls of the ground truth.

    Returns:
        `float`: sum of the similarities, divided by the number of calls of that side which has more: superfluous calls
        cost, as missing ones do. 1 where both are empty.
    """
    left = list(made)
    total = 0.0
    for call in truth:
        similarities = [_similarity(other, call) for other in left]
        best = max(similarities, default=0.0)
        if best > 0:
            total += best
            left.pop(similarities.index(best))
    most = max(len(made), len(truth))
    return total / most if most else 1.0


def _similarity(call: Call, other: Call) -> float:
    (name, arguments), (other_name, other_arguments) = call, other
    if name != other_name:
        return 0.0
    names = arguments.keys() | other_arguments.keys()
    equal = sum(_equal(arguments, other_arguments, key) for key in names)
    return NAME_SHARE + (1 - NAME_SHARE) * (equal / len(names) if names else 1.0)


def _equal(arguments: dict, others: dict, key: str) -> bool:
    # JSON's true and 1 are different answers, which Python calls equal
    if key not in arguments or key not in others:
        return False
    value, other = arguments[key], others[key]
    return isinstance(value, bool) == isinstance(other, bool) and value == other
