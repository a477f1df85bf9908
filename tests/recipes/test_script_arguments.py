"""Values of the scripts' own options that cannot be are refused before anything is computed, by the option's name."""

import pytest

from seeupo_trl.recipes.arguments import (
    AppWorldArguments,
    BfclArguments,
    EvaluationArguments,
    OpenEnvArguments,
    TextArenaArguments,
)


@pytest.mark.parametrize(
    ("arguments", "name", "value", "needed"),
    [
        (BfclArguments, "distractors", -1, "at least 0"),
        (BfclArguments, "held_out_tasks", -1, "at least 0"),
        (BfclArguments, "test_tasks", -1, "at least 0"),
        (BfclArguments, "warmup_steps_sft", -1, "at least 0"),
        (BfclArguments, "warmup_learning_rate", float("nan"), "at least 0"),
        (BfclArguments, "max_user_turns", 0, "at least 1"),
        (BfclArguments, "max_task_tokens", 0, "at least 1"),
        (BfclArguments, "trained_layers", 0, "at least 1"),
        (BfclArguments, "success_reward", float("inf"), "a finite number"),
        (EvaluationArguments, "num_tasks", 0, "at least 1"),
        (EvaluationArguments, "distractors", -1, "at least 0"),
        (AppWorldArguments, "num_servers", 0, "at least 1"),
        (AppWorldArguments, "held_out_tasks", -1, "at least 0"),
        (TextArenaArguments, "train_games", 0, "at least 1"),
        (TextArenaArguments, "held_out_tasks", -1, "at least 0"),
        (TextArenaArguments, "success_reward", float("nan"), "a finite number"),
    ],
)
def test_a_number_that_cannot_be_is_named(arguments, name, value, needed):
    with pytest.raises(ValueError, match=f"^--{name} must be {needed}; got {value}.$"):
        arguments(**{name: value})


@pytest.mark.parametrize(
    ("arguments", "name", "value", "needed"),
    [
        (BfclArguments, "distractors", 2.7, "a whole number"),
        (BfclArguments, "trained_layers", True, "a whole number"),
        (BfclArguments, "held_out_tasks", None, "a whole number"),
        (BfclArguments, "success_reward", "high", "a number"),
        (BfclArguments, "warmup_learning_rate", None, "a number"),
        (EvaluationArguments, "num_tasks", float("nan"), "a whole number"),
        (AppWorldArguments, "num_servers", float("inf"), "a whole number"),
    ],
)
def test_a_number_of_the_wrong_kind_is_named(arguments, name, value, needed):
    with pytest.raises(ValueError, match=f"^--{name} must be {needed}; got {value!r}.$"):
        arguments(**{name: value})


def test_numbers_of_the_right_kind_are_taken():
    BfclArguments(success_reward=1, trained_layers=None, max_user_turns=2, test_tasks=0)


def test_an_interface_that_there_is_not_is_named():
    with pytest.raises(ValueError, match="^--interface must be 'messages' or 'tools'; got 'words'.$"):
        OpenEnvArguments(interface="words")


@pytest.mark.parametrize(("options", "message"), [("{bad", "is not JSON"), ("[1]", "must be a JSON object")])
def test_options_of_a_game_are_a_json_object(options, message):
    with pytest.raises(ValueError, match=f"--game_options .*{message}"):
        TextArenaArguments(game_options=options)
