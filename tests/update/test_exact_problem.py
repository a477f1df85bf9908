"""
What the settings of the update guarantee, on problems without noise (`benchmarks/learning/exact.py`): where theory
says that every iteration improves the policy it does, and where it says nothing a small instance gets worse.
"""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch


sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "learning"))

from exact import (
    DIFFER,
    FALLS,
    KINDS,
    RESULTS,
    ROW_A_TURN,
    Learner,
    Method,
    identity_error,
    markdown,
    maximiser,
    play,
    problem,
    random_problems,
    wrong_directions,
)

from seeupo_trl.scoring.turn_buffer import Block


ORDERS = ("reverse", "forward", "random", "simultaneous")
INSTANCES = 40
PAGE = Path(__file__).parents[2] / "docs" / "guarantees.md"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["table", "features"])
def test_product_ratios_make_the_surrogate_the_objective_where_turns_have_their_own_parameters(kind, order):
    assert identity_error(random_problems(kind, INSTANCES), order) < 1e-12


def test_with_shared_parameters_the_surrogate_is_the_objective_only_if_all_turns_move_together():
    problems = random_problems("shared", INSTANCES)
    assert identity_error(problems, "simultaneous") < 1e-12
    assert identity_error(problems, "reverse") > 1e-3


@pytest.mark.parametrize("epsilon", [0.2, math.inf], ids=["clip", "no-clip"])
@pytest.mark.parametrize("order", ["reverse", "forward", "random"])
@pytest.mark.parametrize("kind", ["table", "features"])
def test_own_parameters_improve_in_every_iteration_in_any_order(kind, order, epsilon):
    problems = random_problems(kind, INSTANCES)
    assert play(problems, Method(order=order, epsilon=epsilon, iterations=10)).num_monotone == INSTANCES


@pytest.mark.parametrize("kind", KINDS)
def test_all_turns_at_once_with_product_ratios_improve_in_every_iteration_also_with_shared_parameters(kind):
    problems = random_problems(kind, INSTANCES)
    assert play(problems, Method(order="simultaneous", update="ascend", iterations=5)).num_monotone == INSTANCES


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_small_steps_of_sgd_improve_in_every_iteration(kind, order):
    problems = random_problems(kind, INSTANCES)
    method = Method(order=order, update="sgd", lr=0.01, iterations=20)
    assert play(problems, method).num_monotone == INSTANCES


@pytest.mark.parametrize("update", ["maximise", "kl"])
def test_reverse_order_finds_the_optimum_of_a_table_when_updates_commit_and_forward_order_may_not(update):
    problems = random_problems("table", INSTANCES)
    optimum = problems.optimum()
    method = Method(update=update, epsilon=math.inf, iterations=3 if update == "maximise" else 30)
    gaps = {order: optimum - play(problems, replace(method, order=order)).values[-1] for order in ORDERS[:2]}
    assert gaps["reverse"].max() < 1e-6
    assert gaps["forward"].mean() > 0.01


@pytest.mark.parametrize("name", FALLS)
def test_smallest_instance_that_gets_worse(name):
    fall = FALLS[name]
    course = play(fall.problem, fall.method)
    assert course.values.flatten().tolist() == pytest.approx(fall.expected, abs=1e-6)
    assert course.num_monotone == 0


@pytest.mark.parametrize("order", ["reverse", "forward"])
def test_the_game_in_which_grpo_gets_worse_gets_better_with_m(order):
    values = play(FALLS["M = A"].problem, Method(order=order, iterations=1)).values.flatten().tolist()
    assert values == pytest.approx([0.4998, 0.519008], abs=1e-6)


def test_batch_standard_deviation_learns_the_task_that_the_group_standard_deviation_unlearns():
    fall = FALLS["group standard deviation"]
    values = play(fall.problem, replace(fall.method, group_std=False)).values.flatten().tolist()
    assert values == pytest.approx([0.2, 1 / 3])


def test_geometric_ratios_may_point_down_and_product_ratios_never_do():
    assert wrong_directions(2000, seed=0) > 0
    assert wrong_directions(2000, seed=0, longest=1) == 0


def test_on_tables_one_step_is_the_same_for_all_methods_that_weigh_with_the_advantage():
    problems = random_problems("table", INSTANCES)
    one = Method(update="sgd", lr=0.3, iterations=1)
    methods = [
        replace(one, order="grpo", weight="advantage"),
        replace(one, order="simultaneous"),
        replace(one, order="reinforce", weight="advantage"),
        replace(one, order="reverse", weight="advantage"),
    ]
    first, *others = [play(problems, method).values[-1] for method in methods]
    for values in others:
        assert (values - first).abs().max() < 1e-14


@pytest.mark.parametrize("kind", KINDS)
def test_the_denominators_differ_with_shared_parameters_only(kind):
    problems = random_problems(kind, INSTANCES)
    method = Method(update="sgd", lr=1.0, steps=3, iterations=3)
    ends = [play(problems, replace(method, old_policy=old)).values[-1] for old in ("iteration", "turn")]
    difference = (ends[0] - ends[1]).abs().max()
    assert difference > 1e-3 if kind == "shared" else difference < 1e-14


@pytest.mark.parametrize("epsilon", [0.2, math.inf], ids=["clip", "no-clip"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_policy_has_a_larger_surrogate_than_the_maximiser(kind, epsilon):
    """As the package's own loss computes it, turn by turn."""
    problems = random_problems(kind, INSTANCES, actions=3, turns=2)
    generator = torch.Generator().manual_seed(0)
    learner = Learner(problems, Method(epsilon=epsilon, order="grpo"))
    iteration = learner.begin()
    weights = learner._weights(iteration)
    for block in [(1, 1), (2, 2)]:
        blocks, start = [Block(*block)], problems.start
        best = maximiser(problems, iteration.probabilities * weights, start, start, blocks, learner.method)
        largest = iteration.surrogates(best, start, blocks, learner.method, weights)
        for scale in (0.01, 0.1, 1.0, 10.0):
            for _ in range(10):
                noise = scale * torch.randn(start.shape, generator=generator, dtype=torch.float64)
                for center in (start, best.clamp(min=-30)):
                    other = (center + noise).log_softmax(1)
                    assert (
                        iteration.surrogates(other, start, blocks, learner.method, weights) <= largest + 1e-9
                    ).all()


def test_actions_that_are_never_taken_stay_so_and_ties_change_nothing():
    game = problem(DIFFER, ROW_A_TURN, [[0.5, 0.5]] * 2)
    tied = Learner(game, Method(epsilon=math.inf))
    tied.iterate()
    assert torch.equal(tied.table, game.start)  # both actions are worth the same, in both turns
    never = problem(DIFFER, ROW_A_TURN, [[0.5, 0.5], [1.0, 0.0]])
    learner = Learner(never, Method(iterations=5))
    for _ in range(5):
        learner.iterate()
    assert learner.table.exp()[1].tolist() == [1.0, 0.0]


def test_the_page_shows_the_committed_results():
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    table = markdown([line for line in lines if "update" in line])
    assert table in PAGE.read_text()
