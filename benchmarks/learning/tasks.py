"""
The tasks of the study: small enough that a random transformer learns them on one CPU core in seconds, and long enough
that turns depend on one another. A task speaks in words, each of which is a token, and without a chat template: what
is compared is updates, and every token costs.

| task | a turn | reward |
|---|---|---|
| `search` | one token: guess a hidden number 0..6, three guesses, answers "lower" and "higher" | 1 for a hit |
| `search-long` | the same, but a guess may follow up to 11 words that mean nothing | 1 for a hit |
| `search-deep` | one token: a hidden number 0..14, four guesses | 1 for a hit |
| `lake` | one token: a step on a 3x3 FrozenLake of TextArena with two holes, eight maps, six steps | the game's own |
| `mastermind` | two tokens: a code of two of four numbers in TextArena's Mastermind, four guesses | the game's own |

TextArena's rewards are 1 for a solved game and the part that was reached otherwise. Its texts are shortened to words;
rules, rewards and the end after two illegal moves in a row are its own.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

from datasets import Dataset

from seeupo_trl.envs.textarena import TextArenaEnvironment


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


class TextArenaGame:
    """A game of TextArena, whose texts are shortened to words."""

    def __init__(self, name: str, **options: Any):
        self.name, self.options = name, json.dumps(options)
        self.environment = TextArenaEnvironment()

    def reset(self, row: dict[str, Any]) -> list[str]:
        self.environment.reset(game=self.name, seed=row["seed"], options=self.options)
        return self.opening(self.environment.env.state.game_state)

    def step(self, words: list[str]) -> Reply:
        result = self.environment.step({"role": "assistant", "content": " ".join(words)})
        if result.terminated:
            return Reply([], result.reward, True, result.info["success"])
        state = self.environment.env.state
        return Reply(["illegal"] if state.error_count else self.answer(state.game_state))


class Lake(TextArenaGame):
    """Where the holes are, then where one stands."""

    def opening(self, state: dict[str, Any]) -> list[str]:
        cells = [
            f"{row}{column}"
            for row, cells in enumerate(state["grid"])
            for column, cell in enumerate(cells)
            if cell == "H"
        ]
        return [f"hole{cell}" for cell in cells] + self.answer(state)

    def answer(self, state: dict[str, Any]) -> list[str]:
        return ["at{}{}".format(*state["player_pos"])]


class Mastermind(TextArenaGame):
    """How many digits of the last guess are right, and how many in the wrong place."""

    def opening(self, state: dict[str, Any]) -> list[str]:
        return ["start"]

    def answer(self, state: dict[str, Any]) -> list[str]:
        return ["{black}right{white}elsewhere".format(**state["history"][-1])]


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
    "lake": Task(
        game=partial(Lake, "FrozenLake-v0", size=3, num_holes=2),
        rows=[{"seed": seed} for seed in range(8)],
        words=["up", "down", "left", "right", "illegal"]
        + [f"{what}{row}{column}" for what in ("at", "hole") for row in range(3) for column in range(3)],
        max_turns=6,
        batches=100,
    ),
    "mastermind": Task(
        game=partial(Mastermind, "Mastermind-v0", code_length=2, num_numbers=4, max_turns=4),
        rows=[{"seed": seed} for seed in range(40)],
        words=["1", "2", "3", "4", "start", "illegal"]
        + [f"{black}right{white}elsewhere" for black in range(2) for white in range(3 - black)],
        max_turns=4,
        batches=120,
        max_action=2,
    ),
}
