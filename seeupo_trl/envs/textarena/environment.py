"""
Games of TextArena (`textarena==0.7.4`) as an environment: all those of a single player that need no network.

The conversation is the game's own text: its rules and the first position, then what it answers to each move. It is
played as TextArena plays its default variant: a move without brackets is put in brackets, one illegal move is answered
with an explanation, a second one in a row ends the game. Departures from TextArena:

- Each game draws from a random generator of its own, see `randomness.py`: a seed is one game, however many play at
  once.
- An observation is what is new since the last move, and without the move itself, instead of everything so far: the
  conversation holds the rest.
- Countdown, Cryptarithm, Slitherlink and ThreeCardMonte give reward and reason of an illegal move the wrong way round,
  so that the reward is a text; here it is the number.
- Of a move its last `MAX_MOVE_CHARACTERS` are read: Python reads no number of more than 4,300 digits.

Not played: games of several players; games that download word lists (Wordle, Hangman, WordLadder, WordSearch) or ask
another model (TwentyQuestions, GuessWho); Klondike, whose file in 0.7.4 has a syntax error.
"""

import importlib
import json
import random
import threading
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

from ..base import MultiTurnEnvironment, Observation, StepResult
from ..plain import real_number
from .package import ENV_REGISTRY, ActionFormattingWrapper, ObservationType, textarena
from .randomness import drawing_from, separate_games


if TYPE_CHECKING:
    from datasets import Dataset


MAX_MOVE_CHARACTERS = 4000

NEEDS_NETWORK = {
    **dict.fromkeys(("Wordle", "Hangman", "WordLadder", "WordSearch"), "it downloads word lists when it starts"),
    **dict.fromkeys(("TwentyQuestions", "GuessWho"), "another model is the game master, behind OpenRouter"),
}

# Modules are loaded once, and Sokoban lays out its rooms in variables of its module.
_one_begins = threading.Lock()


class TextArenaEnvironment(MultiTurnEnvironment):
    """
    A single-player game of TextArena. The dataset says which one, see [`load_textarena`].

    The reward comes when the game ends, and is the game's own: 1 for a solved puzzle, often the part that was reached
    otherwise. The trajectory's `info` then has `category` (`str`, the game), `success` (`bool`), `invalid_move`
    (`bool`, whether an illegal move ended the game) and `reason` (`str`, the game's last words). An episode that the
    rollout ends before (`max_turns`) has no reward but 0, and is no success.

    Args:
        success_reward (`float`, *optional*, defaults to `1.0`):
            Smallest reward of a game that counts as a success. Games without a solution (Bandit, Blackjack, 2048) may
            need a smaller one.

    Attributes:
        env (`textarena.Env`):
            TextArena's game, at its present position.

    Example:

    ```python
    train = load_textarena("FrozenLake-v0", seeds=range(1000))
    trainer = SeeUPOTrainer("Qwen/Qwen3-0.6B", train_dataset=train, environment_factory=TextArenaEnvironment)
    ```
    """

    def __init__(self, *, success_reward: float = 1.0):
        self.success_reward = real_number(success_reward)
        self._random = random.Random()

    def reset(self, game: str, seed: int, options: str = "{}", **task: Any) -> Observation:
        """
        Begin a game.

        Args:
            game (`str`):
                Its id.
            seed (`int`):
                Which game of that kind.
            options (`str`, *optional*, defaults to `"{}"`):
                Arguments of the game as JSON, in place of those of its id.

        Returns:
            [`Observation`]: the rules and the first position.
        """
        self._random.seed(seed)
        with drawing_from(self._random):
            self.env = begin_game(game, seed, **json.loads(options))
            self._move = ActionFormattingWrapper(self.env).action if _takes_brackets(game) else str
            self._game = game
            return Observation([{"role": "user", "content": self._news()}], info={"category": game})

    def step(self, message: dict[str, Any]) -> StepResult:
        with drawing_from(self._random):
            over, _ = self.env.step(self._move((message.get("content") or "")[-MAX_MOVE_CHARACTERS:]))
            if not over:
                return StepResult([{"role": "user", "content": self._news() or "(nothing changed)"}])
            rewards, info = self.env.close()
        reward = real_number(rewards[0])
        return StepResult(
            [],
            reward=reward,
            terminated=True,
            info={
                "category": self._game,
                "success": reward >= self.success_reward,
                "invalid_move": bool(info[0]["invalid_move"]),
                "reason": str(info[0].get("reason", "")),
            },
        )

    def _news(self) -> str:
        """What the game has said since the last move."""
        _, observations = self.env.get_observation()
        # Countdown and Cryptarithm give the arguments of a move the wrong way round: its text is a number
        said = [text for _, text, kind in observations if kind is not ObservationType.PLAYER_ACTION]
        return "\n\n".join(text.strip() for text in said if isinstance(text, str))


def load_textarena(game: str, seeds: Iterable[int], **options: Any) -> "Dataset":
    """
    Games of one kind as tasks, one a seed.

    Args:
        game (`str`):
            Id of a single-player game without a wrapper's ending, `"FrozenLake-v0"` or `"Sokoban-v0-medium"`.
        seeds (`Iterable[int]`):
            Which games. Disjoint seeds are different games, where the game is random at all (TowerOfHanoi is not).
        options (`Any`):
            Arguments of the game in place of those of its id: `load_textarena("FrozenLake-v0", range(100), size=3)`.

    Returns:
        `Dataset` with the columns `id`, `game`, `seed`, `options` and `prompt`. Datasets of several games can be
        concatenated. The prompt names the row, for trainers that tell rows apart by it; the conversation opens with
        the game's own words.

    Raises:
        `ValueError`:
            When there is no such game, or it cannot be played here: it is for several players, or needs the network.
    """
    from datasets import Dataset

    seeds = list(seeds)
    if not seeds:
        raise ValueError("seeds is empty; give at least one number, each of which is a game.")
    generator = random.Random(0)
    with drawing_from(generator):
        begin_game(game, seeds[0], **options)  # so that mistakes are known now
    as_text = json.dumps(options, sort_keys=True)
    names = [f"{game}/{seed}" if not options else f"{game}/{as_text}/{seed}" for seed in seeds]
    return Dataset.from_dict(
        {
            "id": names,
            "prompt": [[{"role": "user", "content": name}] for name in names],
            "game": [game] * len(seeds),
            "seed": seeds,
            "options": [as_text] * len(seeds),
        }
    )


def begin_game(game: str, seed: int, **options: Any) -> "textarena.Env":
    """
    A game at its first position, without TextArena's wrappers around it.

    Raises:
        `ValueError`:
            When there is no such game, it needs the network, does not take these options, or is for several players.
    """
    with _one_begins:
        env = _make(game, **options)
        try:
            env.reset(num_players=1, seed=seed)
        except AssertionError as error:
            raise ValueError(f"{game} is no game for a single player: {error}.") from error
    if not isinstance(env.state, textarena.SinglePlayerState):
        raise ValueError(f"{game} is no game for a single player; it has a {type(env.state).__name__}.")
    set_invalid_move = env.state.set_invalid_move

    def in_order(reason: Any = None, reward: Any = -1.0) -> None:
        if isinstance(reward, str):
            reason, reward = reward, reason
        set_invalid_move(reason=reason, reward=reward)

    env.state.set_invalid_move = in_order
    return env


def _make(game: str, **options: Any) -> "textarena.Env":
    kind = str(game).split("-v")[0]
    if kind in NEEDS_NETWORK:
        raise ValueError(f"{game} cannot be played offline: {NEEDS_NETWORK[kind]}. Choose another game.")
    raw = f"{game}-raw"
    if raw not in ENV_REGISTRY:
        known = sorted(name.removesuffix("-raw") for name in ENV_REGISTRY if name.endswith("-raw"))
        same_kind = [name for name in known if name.split("-v")[0].lower() == kind.lower()]
        hint = f"Of that kind there are {', '.join(same_kind)}" if same_kind else f"There are {', '.join(known)}"
        raise ValueError(f"game is {game!r}, which TextArena does not have. {hint} (no '-train' or '-raw').")
    try:
        _load(ENV_REGISTRY[raw].entry_point.partition(":")[0])
    except SyntaxError as error:
        raise ValueError(f"{game} is broken in this version of TextArena: {error}. Choose another game.") from error
    try:
        return textarena.make(raw, **options)
    except TypeError as error:
        raise ValueError(f"{game} does not take the options {options}: {error}.") from error


@cache
def _load(module: str) -> None:
    """Import the module of a game, and give it random numbers of its own before it draws."""
    importlib.import_module(module)
    separate_games()


def _takes_brackets(game: str) -> bool:
    """Whether TextArena's default variant puts moves into brackets."""
    return ActionFormattingWrapper in (ENV_REGISTRY[game].default_wrappers or ())
