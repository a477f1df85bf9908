"""
The tasks of the study: small enough that a random transformer learns them on one CPU core in seconds, and long enough
that turns depend on one another. A task speaks in words, each of which is a token, and without a chat template: what
is compared is updates, and every token costs.

| task | a turn | reward |
|---|---|---|
| `search` | one token: guess a hidden number 0..6, three guesses, answers "lower" and "higher" | 1 for a hit |
| `search-long` | the same, but a guess may follow up to 11 words that mean nothing | 1 for a hit |
| `search-deep` | one token: a hidden number 0..14, four guesses | 1 for a hit |
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

from datasets import Dataset


class Reply(NamedTuple):
    """What a game answers: words (at least one, unless it is over), the reward of the step, whether it is over."""

    words: list[str]
    reward: float = 0.0
    is_over: bool = False
    success: bool = False


class Game(Protocol):
    """An episode after another: `reset` with a row of the task, then `step` with the words of each turn."""

    def reset(self, row: dict[str, Any]) -> list[str]: ...

    def step(self, words: list[str]) -> Reply: ...


class Search:
    """Guess a hidden number. A message that ends with no number loses a guess."""

    def __init__(self, guesses: int):
        self.guesses = guesses

    def reset(self, row: dict[str, Any]) -> list[str]:
        self.hidden, self.left = row["hidden"], self.guesses
        return ["start"]

    def step(self, words: list[str]) -> Reply:
        self.left -= 1
        guess = int(words[-1]) if words[-1].isdigit() else None
        if guess == self.hidden:
            return Reply([], reward=1.0, is_over=True, success=True)
        if not self.left:
            return Reply([], is_over=True)
        return Reply(["invalid" if guess is None else "higher" if guess < self.hidden else "lower"])


@dataclass(frozen=True)
class Task:
    """
    What a run plays.

    Args:
        game (`Callable`): Makes a [`Game`].
        rows (`list[dict]`): What the iterations draw from.
        words (`list[str]`): The vocabulary.
        max_turns (`int`): Most turns of an episode: the optimizer steps that SeeUPO takes in an iteration.
        batches (`int`): Batches of 64 episodes.
        ends (`list[str]`): Words that end a turn. Without them a turn has `max_action` words.
        max_action (`int`): Most words of a turn.
    """

    game: Callable[[], Game]
    rows: list[dict[str, Any]]
    words: list[str]
    max_turns: int
    batches: int
    ends: list[str] = field(default_factory=list)
    max_action: int = 1

    def dataset(self) -> Dataset:
        # eight times, so that a batch of eight groups is whole however few rows there are
        return Dataset.from_dict({"prompt": [str(i) for i in range(8 * len(self.rows))]})

    def row(self, prompt: str) -> dict[str, Any]:
        # a stock trainer hands a rollout nothing but prompts
        return self.rows[int(prompt) % len(self.rows)]


def search(numbers: int, guesses: int, batches: int, fillers: int = 0) -> Task:
    digits = [str(i) for i in range(numbers)]
    return Task(
        game=partial(Search, guesses),
        rows=[{"hidden": i} for i in range(numbers)],
        words=[*digits, "start", "lower", "higher", "invalid", *(f"w{i}" for i in range(fillers))],
        max_turns=guesses,
        batches=batches,
        ends=digits if fillers else [],
        max_action=12 if fillers else 1,
    )


TASKS: dict[str, Task] = {
    "search": search(7, 3, 120),
    "search-long": search(7, 3, 120, fillers=14),
    "search-deep": search(15, 4, 120),
}
