"""
Any combination of the update's options ends where the naive implementation ends.

The cases are fixed: CI sees the same ones every time. `SEEUPO_FUZZ=200 pytest tests/update/test_fuzz.py` runs more.
"""

import os
import random

import pytest
from fuzz import draw_case, draw_case_of_two_functions, run_case


CASES = range(int(os.environ.get("SEEUPO_FUZZ", "24")))


@pytest.mark.parametrize("number", CASES)
def test_random_options_agree_with_the_oracle(number, tiny_dir, tmp_path):
    run(draw_case(number), tiny_dir, tmp_path)


@pytest.mark.parametrize("number", CASES[::2])
def test_random_options_with_two_reward_functions_agree_with_the_oracle(number, tiny_dir, tmp_path):
    run(draw_case_of_two_functions(number), tiny_dir, tmp_path)


def run(case, tiny_dir, tmp_path):
    try:
        run_case(tiny_dir, tmp_path, case)
    except Exception as error:
        error.add_note(f"run_case(directory, output, {case!r})")
        raise


def test_a_case_is_made_from_its_number_alone():
    random.seed(0)
    assert draw_case(3) == draw_case(3) != draw_case(4)
