"""TextArena's games: their text is the conversation, and a seed is a game however many play at once."""

import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from datasets import concatenate_datasets


pytest.importorskip("textarena", reason="pip install textarena")

from seeupo_trl.envs.textarena import TextArenaEnvironment, load_textarena


# game: a legal move at the start, an illegal one
GAMES = {
    "2048-v0": ("[up]", "[north]"),
    "Bandit-v0": ("[red]", "[white]"),
    "Blackjack-v0": ("[hit]", "[double]"),
    "Countdown-v0": ("[0 1 +]", "[0 0 +]"),
    "Cryptarithm-v0": ("[S 9]", "[M 0]"),
    "FifteenPuzzle-v0": ("[up]", "[north]"),
    "FrozenLake-v0": ("[down]", "[up]"),
    "GuessTheNumber-v0": ("[10]", "[100]"),
    "LightsOut-v0": ("[0 0]", "[5 5]"),
    "Mastermind-v0": ("[1 2 3 4]", "[1 1 1 1]"),
    "Minesweeper-v0": ("[0 0]", "[9 9]"),
    "PegJump-v0": ("[4 5]", "[1 15]"),
    "RushHour-v0": ("[A+]", "[Z+]"),
    "Secretary-v0": ("[continue]", "[perhaps]"),
    "Sokoban-v0": ("[up]", "[jump]"),
    "Sudoku-v0": ("[1 1 1]", "[10 1 1]"),
    "ThreeCardMonte-v0": ("[0]", "[7]"),
    "TowerOfHanoi-v0": ("[A C]", "[B C]"),
}
WITHOUT_CHANCE = {"TowerOfHanoi-v0", "Countdown-v0", "Cryptarithm-v0", "RushHour-v0", "PegJump-v0"}
MALFORMED = [
    "",
    "[",
    "]",
    "[[]]",
    "[]",
    "\x00",
    "[é ½ ²]",
    "[" + "9" * 5000 + "]",
    "[-1 -1 -1]",
    "[99 99 99]",
    "[nan]",
]


def said(text: str) -> dict:
    return {"role": "assistant", "content": text}


def play(game: str, seed: int, moves: list[str], **options) -> list[tuple]:
    """All that a game says and pays."""
    environment = TextArenaEnvironment()
    transcript = [environment.reset(game=game, seed=seed, options=json.dumps(options)).messages]
    for move in moves:
        result = environment.step(said(move))
        transcript.append((result.messages, result.reward, result.terminated, result.info))
        if result.terminated:
            break
    return transcript


@pytest.mark.parametrize("game", GAMES)
def test_a_game_opens_with_its_rules_and_answers_moves(game):
    environment = TextArenaEnvironment()
    opening = environment.reset(game=game, seed=3)
    (message,) = opening.messages
    assert message["role"] == "user" and len(message["content"]) > 90
    assert opening.info == {"category": game}
    result = environment.step(said(GAMES[game][0]))
    if result.terminated:  # as a hand of Blackjack may
        assert result.messages == []
    else:
        (answer,) = result.messages
        assert answer["content"].strip()


@pytest.mark.parametrize("game", GAMES)
def test_a_second_illegal_move_in_a_row_ends_the_game_with_a_number_as_its_reward(game):
    environment = TextArenaEnvironment()
    environment.reset(game=game, seed=3)
    results = [environment.step(said(GAMES[game][1])) for _ in range(2)]
    (warning,) = results[0].messages
    assert "invalid" in warning["content"].lower()
    assert results[1].terminated and results[1].info["invalid_move"] and not results[1].info["success"]
    assert isinstance(results[1].reward, float) and -1 <= results[1].reward < 1
    assert results[1].info["reason"].startswith("Invalid Move: ")


@pytest.mark.parametrize("game", GAMES)
def test_no_malformed_move_is_a_fault_of_the_environment(game):
    environment = TextArenaEnvironment()
    for move in MALFORMED:
        environment.reset(game=game, seed=5)
        for _ in range(3):
            if environment.step(said(move)).terminated:
                break


@pytest.mark.parametrize("game", GAMES)
def test_a_seed_is_a_game(game):
    legal, illegal = GAMES[game]
    moves = [legal, legal, legal, illegal]
    assert play(game, 7, moves) == play(game, 7, moves)


@pytest.mark.parametrize("game", sorted(GAMES.keys() - WITHOUT_CHANCE))
def test_other_seeds_are_other_games(game):
    legal, _ = GAMES[game]
    games = {json.dumps(play(game, seed, [legal] * 4)) for seed in range(12)}
    assert len(games) > 1


def test_sixty_four_at_once_are_the_same_games_as_one_after_another():
    jobs = [(game, seed, list(GAMES[game][:1]) * 6) for seed in range(4) for game in list(GAMES)[:16]]
    alone = [play(*job) for job in jobs]
    together = threading.Barrier(64)

    def play_together(job):
        together.wait()
        return play(*job)

    with ThreadPoolExecutor(64) as threads:
        assert list(threads.map(play_together, jobs)) == alone


def test_games_leave_pythons_random_numbers_alone():
    random.seed(11)
    expected = [random.random() for _ in range(2)]
    random.seed(11)
    numbers = [random.random()]
    play("Bandit-v0", 1, ["[red]"] * 3)
    assert [*numbers, random.random()] == expected


def test_textarena_itself_goes_on_as_before():
    import textarena

    play("Bandit-v0", 1, [])
    env = textarena.make("GuessTheNumber-v0")
    env.reset(num_players=1, seed=5)
    first = random.random()
    env.reset(num_players=1, seed=5)
    assert random.random() == first  # it seeds Python's module, where it is not ours


def test_games_print_nothing(capsys):
    play("Countdown-v0", 1, ["[0 1 +]"] * 2)
    play("LogicPuzzle-v0", 1, ["[]"])
    assert capsys.readouterr().out == ""


def test_a_solved_game_is_a_success():
    *_, last = play("TowerOfHanoi-v0", 0, ["A C", "A B", "C B", "A C", "B A", "B C", "A C"])  # brackets are added
    assert last == ([], 1.0, True, last[3])
    assert last[3]["success"] and last[3]["category"] == "TowerOfHanoi-v0"


def test_the_games_own_limit_of_turns_ends_it_with_what_was_reached():
    *before, last = play("TowerOfHanoi-v0", 0, ["[A B]", "[B A]"] * 10, max_turns=4)
    assert len(before) == 1 + 4 and last[1] == 0.0 and last[2]  # TextArena ends it one move later
    assert not last[3]["success"] and not last[3]["invalid_move"] and "limit" in last[3]["reason"]


def test_what_counts_as_success_is_an_option():
    environment = TextArenaEnvironment(success_reward=0.1)
    environment.reset(game="FrozenLake-v0", seed=3)
    for move in ("[down]", "[left]", "[left]"):
        result = environment.step(said(move))
    assert result.info["success"] and 0.1 <= result.reward < 1


def test_an_instance_plays_game_after_game():
    environment = TextArenaEnvironment()
    first = environment.reset(game="FrozenLake-v0", seed=1).messages
    environment.step(said("[down]"))
    environment.reset(game="Mastermind-v0", seed=1)
    environment.step(said("[1 2 3 4]"))
    assert environment.reset(game="FrozenLake-v0", seed=1).messages == first


def test_a_dataset_is_a_row_a_seed_and_mixes_with_others():
    lakes = load_textarena("FrozenLake-v0", seeds=range(3), size=3, num_holes=1)
    numbers = load_textarena("GuessTheNumber-v0", seeds=[7])
    both = concatenate_datasets([lakes, numbers])
    assert both["game"] == ["FrozenLake-v0"] * 3 + ["GuessTheNumber-v0"]
    assert both["seed"] == [0, 1, 2, 7]
    assert len(set(both["id"])) == 4 and len({row[0]["content"] for row in both["prompt"]}) == 4
    opening = TextArenaEnvironment().reset(**both[0]).messages[0]["content"]
    assert "Frozen Lake" in opening and opening.count("H") < 10
    assert "Guess The Number" in TextArenaEnvironment().reset(**both[3]).messages[0]["content"]


@pytest.mark.parametrize("game", ["Wordle-v0", "Hangman-v0", "WordLadder-v0-hard", "WordSearch-v0"])
def test_games_that_download_word_lists_are_refused(game):
    with pytest.raises(ValueError, match="cannot be played offline: it downloads word lists"):
        load_textarena(game, seeds=[0])


@pytest.mark.parametrize("game", ["TwentyQuestions-v0", "GuessWho-v0"])
def test_games_that_ask_another_model_are_refused(game):
    with pytest.raises(ValueError, match="cannot be played offline: another model"):
        load_textarena(game, seeds=[0])


@pytest.mark.parametrize(
    ("game", "message"),
    [
        ("FrozenLake", "Of that kind there are FrozenLake-v0, FrozenLake-v0-hardcore"),
        ("FrozenLake-v0-train", "Of that kind there are FrozenLake-v0, "),
        ("Lake-v0", "TextArena does not have. There are 2048-v0"),
        ("TicTacToe-v0", "no game for a single player"),
        ("Poker-v0", "no game for a single player"),
        ("Klondike-v0", "is broken in this version of TextArena"),
    ],
)
def test_other_games_are_refused_with_a_reason(game, message):
    with pytest.raises(ValueError, match=message):
        load_textarena(game, seeds=[0])


def test_bad_options_and_no_seeds_are_refused():
    with pytest.raises(ValueError, match="FrozenLake-v0 does not take the options {'width': 3}"):
        load_textarena("FrozenLake-v0", seeds=[0], width=3)
    with pytest.raises(ValueError, match="seeds is empty"):
        load_textarena("FrozenLake-v0", seeds=[])
