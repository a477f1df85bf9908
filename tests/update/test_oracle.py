"""The oracle itself: its advantages, its blocks, its step and its weights are those of the paper."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from against_oracle import LEARNING_RATE, TEMPERATURE, load_model, parameters_of
from fixed_rollouts import NUM_TRAJECTORIES, as_groups, make_iteration, ragged_rollouts
from oracle import OracleSettings, advantages_of, ordered_blocks, seeupo_iteration, token_logps


def test_oracle_advantages_are_centred_per_group_and_scaled_over_the_batch():
    # Group means 0.5 and 3, so the relative advantages are 0.5, -0.5, 0, 0, with unbiased variance 0.5 / 3.
    expected = 0.5 / math.sqrt(0.5 / 3)
    rewards = [[[1.0], [0.0]], [[3.0], [3.0]]]

    def advantages(rewards, **settings):
        return [advantage for (advantage,) in advantages_of(rewards, OracleSettings(lr=1.0, **settings))]

    assert advantages(rewards) == pytest.approx([expected, -expected, 0.0, 0.0])
    assert advantages(rewards, advantage_clip=1.0) == pytest.approx([1.0, -1.0, 0.0, 0.0])
    assert advantages(rewards, scale_rewards="none") == [0.5, -0.5, 0.0, 0.0]
    assert advantages([[[1.0], [1.0]], [[3.0], [3.0]]]) == [0.0, 0.0, 0.0, 0.0]


def test_oracle_adds_several_functions_before_or_after_they_are_scaled():
    # The first function varies in the first group alone, as above; the second in both, and twice it is silent.
    rewards = [[[1.0, 2.0], [0.0, 0.0]], [[3.0, None], [3.0, 5.0]], [[None, 4.0], [None, None]]]
    settings = OracleSettings(lr=1.0, scale_rewards="none", reward_weights=(2.0, 0.5))
    assert advantages_of(rewards, settings) == [[1.5], [-1.5], [-1.25], [1.25], [0.0], [0.0]]
    settings = replace(settings, multi_objective_aggregation="normalize_then_sum")
    first = 2 * 0.5 / math.sqrt(0.5 / 3) + 0.5 * 1 / math.sqrt(2 / 3)  # of four and of four episodes
    expected = first / math.sqrt(2 * first**2 / 4)  # whatever is done with a sum that is not made of such
    for scale_rewards in ("none", "batch"):
        found = advantages_of(rewards, replace(settings, scale_rewards=scale_rewards))
        assert found == [[pytest.approx(a)] for a in (expected, -expected, 0.0, 0.0, 0.0, 0.0)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [[4], [3], [2], [1], [0]]),
        ({"update_order": "forward"}, [[0], [1], [2], [3], [4]]),
        ({"update_order": "random", "permutation": (1, 4, 0, 2, 3)}, [[1], [4], [0], [2], [3]]),
        ({"update_order": "simultaneous"}, [[0, 1, 2, 3, 4]]),
        ({"max_turn_updates": 1}, [[0, 1, 2, 3, 4]]),
        ({"max_turn_updates": 2}, [[3, 4], [0, 1, 2]]),
        ({"max_turn_updates": 3, "update_order": "forward"}, [[0, 1], [2, 3], [4]]),
        ({"max_turn_updates": 9}, [[4], [3], [2], [1], [0]]),
    ],
)
def test_oracle_blocks(settings, expected):
    assert ordered_blocks(5, OracleSettings(lr=1.0, **settings)) == expected


def test_oracle_step_is_the_gradient_of_the_objective(tiny_dir):
    """One-turn rollouts: step / learning rate has the slopes of the objective, by finite differences."""
    episodes = make_iteration(4, [1] * NUM_TRAJECTORIES)
    model = load_model(tiny_dir)
    start = parameters_of(model)
    result = seeupo_iteration(
        model, as_groups(episodes), OracleSettings(lr=LEARNING_RATE, beta=0.5), ref_model=load_model(tiny_dir)
    )
    step = {name: (result.parameters[name] - start[name]) / LEARNING_RATE for name in start}

    @torch.no_grad()
    def mean_logps(distance, direction):
        moved = load_model(tiny_dir)
        for name, parameter in moved.named_parameters():
            parameter += distance * direction[name]
        values = []
        for episode in episodes:
            ((context, action),) = episode.turns
            logits = moved(torch.tensor([context + action])).logits[0, len(context) - 1 : -1]
            values.append(-torch.nn.functional.cross_entropy(logits, torch.tensor(action)))
        return torch.stack(values)

    # At the first step all ratios are 1 and the KL penalty has no slope.
    def objective(distance, direction):
        ratios = (mean_logps(distance, direction) - mean_logps(0, direction)).exp()
        return (ratios * torch.tensor(result.advantages)).mean().item()

    generator = torch.Generator().manual_seed(0)
    random_direction = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in start.items()}
    for direction, distance in ((step, 1e-6), (random_direction, 1e-5)):
        slope = (objective(distance, direction) - objective(-distance, direction)) / (2 * distance)
        assert slope == pytest.approx(sum((step[n] * direction[n]).sum().item() for n in start), rel=1e-5)


def test_oracle_weights_are_ratios_after_the_update(tiny_dir):
    """The factor of the block updated last compares the final parameters with the first, token by token."""
    episodes = ragged_rollouts()[0]
    model = load_model(tiny_dir)
    settings = OracleSettings(lr=LEARNING_RATE, turn_weight_clip=None, temperature=TEMPERATURE)
    blocks = seeupo_iteration(model, as_groups(episodes), settings).blocks
    for earlier, later in itertools.pairwise(blocks):
        assert set(earlier.pool) <= set(later.pool)
        for i in later.pool:
            assert later.weights_before[i] == earlier.weights_after.get(i, 1.0)
    start = load_model(tiny_dir)
    for i, episode in enumerate(episodes):
        turn = episode.turns[0]
        new, old = (token_logps(m, *turn, TEMPERATURE).detach() for m in (model, start))
        assert blocks[-1].factors[i] == pytest.approx((new - old).mean().exp().item())
        factors = [block.factors[i] for block in blocks if i in block.factors]
        assert blocks[-1].weights_after[i] == pytest.approx(math.prod(factors))
    # The rollouts are worth comparing on: ratios away from 1, both when a block is reached and after its update.
    assert max(abs(ratio - 1) for block in blocks for ratio in block.first_ratios.values()) > 0.02
    assert max(abs(factor - 1) for block in blocks for factor in block.factors.values()) > 0.2
