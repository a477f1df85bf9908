"""`benchmarks/rollout_barrier.py`: what the schedules take in simulated time, counted by other means."""

import sys
from pathlib import Path

import pytest


sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from rollout_barrier import SHAPES, STEP, STEP_OF_A_ROW, Shape, Workload, seconds_of, undelayed_seconds


def workload(tokens, seconds):
    made = Workload(Shape("", len(tokens), 1, 1, 0), seed=0)
    made.tokens, made.seconds = tokens, seconds
    return made


def test_one_episode_takes_its_tokens_and_its_environment():
    work = workload([[5, 3]], [[1.0, 0.5]])
    expected = 8 * (STEP + STEP_OF_A_ROW) + 1.5
    assert work.bound() == pytest.approx(expected)
    assert seconds_of("lock step", work) == pytest.approx(expected)
    assert seconds_of("free", work) == pytest.approx(expected, abs=0.02)  # two glances


def test_in_lock_step_each_turn_takes_its_longest_response_and_its_slowest_environment():
    work = workload([[10, 1], [2, 4]], [[0.0, 1.0], [2.0, 0.0]])
    steps = (10 + 4) * STEP + (10 + 2 + 1 + 4) * STEP_OF_A_ROW
    assert seconds_of("lock step", work) == pytest.approx(steps + 2.0 + 1.0)


@pytest.mark.parametrize("shape", SHAPES, ids=[shape.name for shape in SHAPES])
def test_episodes_that_wait_for_nobody_take_half_the_time_and_little_more_than_they_must(shape):
    work = Workload(shape, seed=0)
    free = seconds_of("free", work)
    assert seconds_of("lock step", work) > 2 * free
    assert work.bound() <= free < 1.01 * undelayed_seconds(work)
