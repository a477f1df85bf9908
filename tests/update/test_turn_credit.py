"""Advantages of single turns from the rewards to come (`turn_credit="to_go"`): against the oracle, and by hand."""

import math
import random
import warnings

import pytest
import torch
from against_oracle import (
    TOLERANCE,
    VISIBLE,
    load_model,
    parameters_of,
    relative_error,
    run_oracle,
    train,
)
from fixed_rollouts import (
    NUM_TRAJECTORIES,
    as_groups,
    draw_step_rewards,
    make_iteration,
    ragged_rollouts,
    rewrite_contexts,
)
from oracle import OracleSettings, advantages_of

from seeupo_trl import SeeUPOConfig, environment_reward
from seeupo_trl.trajectory import Trajectory, Turn
from seeupo_trl.update.objective import batch_advantages, to_go_advantages
from seeupo_trl.update.turn_credit import TurnCredit


STEP_REWARDS = [draw_step_rewards(episodes, seed) for seed, episodes in enumerate(ragged_rollouts())]
CASES = {
    "reverse": {},
    "forward": {"update_order": "forward"},
    "old-turn": {"old_policy": "turn"},
    "product-unbounded": {"turn_ratio": "product", "turn_weight_clip": None},
    "two-blocks": {"max_turn_updates": 2},
    "not-scaled": {"scale_rewards": "none"},
    "advantage-clip": {"advantage_clip": 0.7},
    "kl": {"beta": 1.0},
    "two-epochs": {"num_iterations": 2},
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES.keys())
def test_trainer_matches_oracle(settings, tiny_dir, tmp_path):
    model = load_model(tiny_dir)
    start = parameters_of(model)
    groups = [as_groups(episodes) for episodes in ragged_rollouts()]
    settings = {"turn_credit": "to_go", **settings}
    expected = run_oracle(model, groups, step_rewards=STEP_REWARDS, **settings)[-1].parameters
    whole = run_oracle(model, groups, **{**settings, "turn_credit": "episode"})[-1].parameters
    trained = train(model, ragged_rollouts(), tmp_path, step_rewards=STEP_REWARDS, **settings)[-1]
    assert relative_error(trained, expected, start) < TOLERANCE[torch.float64]
    assert relative_error(expected, whole, start) > VISIBLE


@pytest.mark.parametrize("rewritten", [False, True])
def test_several_minibatches_and_rewritten_contexts(rewritten, tiny_dir, tmp_path):
    model = load_model(tiny_dir)
    start = parameters_of(model)
    turns = None
    groups = [as_groups(episodes) for episodes in ragged_rollouts()]
    if rewritten:
        turns = [rewrite_contexts(episodes, seed) for seed, episodes in enumerate(ragged_rollouts())]
        rewards = [[reward for group in step for _, reward in group] for step in groups]
        rows = [list(zip(played, r, strict=True)) for played, r in zip(turns, rewards, strict=True)]
        groups = [[step[n : n + 3] for n in range(0, len(step), 3)] for step in rows]
    expected = run_oracle(model, groups, step_rewards=STEP_REWARDS, turn_credit="to_go", num_minibatches=3)[-1]
    config = {"steps_per_generation": 6, "gradient_accumulation_steps": 2, "turn_credit": "to_go"}
    trained = train(model, ragged_rollouts(), tmp_path, turns=turns, step_rewards=STEP_REWARDS, **config)[-1]
    assert relative_error(trained, expected.parameters, start) < TOLERANCE[torch.float64]


def test_without_step_rewards_and_with_turns_of_equal_number_it_is_the_episodes_credit(tiny_dir, tmp_path):
    iterations = [make_iteration(seed, [3] * NUM_TRAJECTORIES) for seed in (1, 2)]
    nothing = [[[0.0] * len(episode.turns) for episode in episodes] for episodes in iterations]
    start = parameters_of(load_model(tiny_dir))
    with pytest.warns(UserWarning, match="found no reward of a single step"):
        to_go = train(load_model(tiny_dir), iterations, tmp_path, step_rewards=nothing, turn_credit="to_go")[-1]
    episode = train(load_model(tiny_dir), iterations, tmp_path)[-1]
    assert relative_error(to_go, {n: p.double() for n, p in episode.items()}, start) < 1e-12


def test_all_at_once_is_refused():
    for options in ({"update_order": "simultaneous"}, {"max_turn_updates": 1}):
        with pytest.raises(ValueError, match="update all of them as one"):
            SeeUPOConfig("unused", use_cpu=True, bf16=False, turn_credit="to_go", **options)


def credit_of(trajectories, rewards, weights=(1.0,), functions=(environment_reward,), per_function=False, **options):
    config = SeeUPOConfig("unused", use_cpu=True, bf16=False, turn_credit="to_go", **options)
    credit = TurnCredit(functions, environment_reward, config)
    return credit.advantages(trajectories, torch.tensor(rewards), torch.tensor(weights), 2, per_function)


def trajectory(*rewards, total=None, stop_reason=None):
    turns = [Turn([1], [2], reward=reward) for reward in rewards]
    return Trajectory(turns, sum(r or 0.0 for r in rewards) if total is None else total, stop_reason)


def test_rewards_from_a_turn_on_are_compared_with_those_who_have_that_turn():
    played = [trajectory(1.0, 0.0, 2.0), trajectory(0.0, 1.0), trajectory(0.5), trajectory(0.5)]
    advantages = credit_of(played, [[3.0], [1.0], [0.5], [0.5]], scale_rewards="none")
    assert advantages == [[1.0, 0.5, 0.0], [-1.0, -0.5, 0.0], [0.0] * 3, [0.0] * 3]
    scaled = credit_of(played, [[3.0], [1.0], [0.5], [0.5]])
    assert scaled[0] == pytest.approx([value / math.sqrt(2 / 3) for value in (1.0, 0.5, 0.0)])


def test_rewards_of_functions_and_what_the_return_has_besides_steps_arrive_at_the_last_turn():
    played = [trajectory(1.0, None, total=2.0), trajectory(0.0, 1.0), trajectory(0.5), trajectory(0.5)]
    rewards = [[2.0, 4.0], [1.0, 0.0], [0.5, 0.0], [0.5, 0.0]]
    functions = (environment_reward, len)
    advantages = credit_of(played, rewards, (1.0, 0.5), functions, scale_rewards="none")
    # the environment's 1 + 1 and 0 + 1, half of the function's 4 and 0
    assert advantages[:2] == [[1.5, 1.0], [-1.5, -1.0]]
    each = credit_of(played, rewards, (1.0, 0.5), functions, per_function=True)
    of_environment, of_function = math.sqrt(0.5 / 3), math.sqrt(8 / 3)
    episode = 0.5 / of_environment + 1 / of_function
    of_sum = math.sqrt(2 * episode**2 / 3)
    assert each[0] == pytest.approx([episode / of_sum, 1 / of_function / of_sum])


@pytest.mark.parametrize("scale_rewards", ["batch", "none"])
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_episodes_of_one_turn_have_the_credit_of_episodes_whatever_the_aggregation(aggregation, scale_rewards):
    rewards, weights, _ = several_functions([1] * 12)
    options = {"normalize": scale_rewards == "batch", "per_function": aggregation == "normalize_then_sum"}
    to_come = torch.tensor([[0.0 if math.isnan(row[-1]) else row[-1]] for row in rewards])
    to_go = to_go_advantages(torch.tensor(rewards), torch.tensor(weights), 3, to_come, 1, **options)
    episode = batch_advantages(torch.tensor(rewards), torch.tensor(weights), 3, **options)
    torch.testing.assert_close(to_go[:, 0], episode, rtol=1e-12, atol=0)
    assert len(set(episode.tolist())) > 6


@pytest.mark.parametrize("scale_rewards", ["batch", "none"])
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_advantages_of_several_functions_are_those_of_the_oracle(aggregation, scale_rewards):
    rewards, weights, steps = several_functions([1, 2, 3, 3, 2, 1, 2, 2, 2, 1, 3, 3])
    settings = OracleSettings(
        lr=1.0,
        scale_rewards=scale_rewards,
        multi_objective_aggregation=aggregation,
        reward_weights=tuple(weights),
    )
    missing = [[None if math.isnan(value) else value for value in row] for row in rewards]
    groups = [missing[n : n + 3] for n in range(0, 12, 3)]
    totals = [row[-1] for row in missing]
    played = [trajectory(*of_turns, total=total) for of_turns, total in zip(steps, totals, strict=True)]
    config = SeeUPOConfig("unused", use_cpu=True, bf16=False, turn_credit="to_go", scale_rewards=scale_rewards)
    credit = TurnCredit([len, environment_reward], environment_reward, config)
    per_function = aggregation == "normalize_then_sum"
    arguments = torch.tensor(rewards), torch.tensor(weights), 3
    found = credit.advantages(played, *arguments, per_function)
    for row, expected in zip(found, advantages_of(groups, settings, steps), strict=True):
        assert row[: len(expected)] == pytest.approx(expected, rel=1e-12)
    normalize = scale_rewards == "batch"
    episodes = batch_advantages(*arguments, normalize=normalize, per_function=per_function).tolist()
    assert episodes == pytest.approx([a for (a,) in advantages_of(groups, settings)], rel=1e-12)


def several_functions(num_turns):
    """Rewards of two functions, some missing, for twelve trajectories; the second is the environment's."""
    generator = random.Random(0)
    steps = [[generator.randint(-8, 8) / 8 for _ in range(num)] for num in num_turns]
    rewards = [[generator.randint(0, 40) / 8, sum(of_turns) + generator.choice([0, 0.5])] for of_turns in steps]
    rewards[2][0] = rewards[5][0] = rewards[5][1] = rewards[7][1] = math.nan
    return rewards, [1.0, 2.0], steps


def test_episodes_that_failed_are_not_compared_with():
    failed = trajectory(1.0, 5.0, stop_reason="env_error")
    played = [trajectory(1.0, 0.0), failed, trajectory(0.0, 1.0), trajectory(1.0, 1.0)]
    advantages = credit_of(played, [[1.0], [math.nan], [1.0], [2.0]], scale_rewards="none")
    assert advantages == [[0.0, 0.0], [0.0, 0.0], [-0.5, 0.0], [0.5, 0.0]]


def test_rounding_makes_no_advantage():
    """0.1 + 0.2 - 0.3 is not 0 in floating point."""
    played = [trajectory(0.1, 0.2), trajectory(0.3, 0.2), trajectory(1.0, 0.2), trajectory(0.0, 0.2)]
    advantages = credit_of(played, [[0.1 + 0.2], [0.5], [1.2], [0.2]])
    assert all(second == 0.0 for _, second in advantages)


def test_nobody_plays():
    assert credit_of([Trajectory([], 0.0)] * 2, [[0.0], [0.0]]) == [[], []]


def test_it_warns_once():
    config = SeeUPOConfig("unused", use_cpu=True, bf16=False, turn_credit="to_go")
    credit = TurnCredit([environment_reward], environment_reward, config)
    arguments = [trajectory(None, None, total=1.0)] * 2, torch.ones(2, 1), torch.ones(1), 2, False
    with pytest.warns(UserWarning, match="no reward of a single step"):
        credit.advantages(*arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        credit.advantages(*arguments)


def test_advantages_are_those_of_a_loop_over_trajectories():
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(-2, 3, (12, 4), generator=generator).double() / 8
    counts = torch.randint(0, 5, (12,), generator=generator).tolist()
    to_come = torch.full((12, 4), torch.nan, dtype=torch.float64)
    for i, count in enumerate(counts):
        for t in range(count):
            to_come[i, t] = steps[i, t:count].sum()
    rewards = to_come[:, :1].nan_to_num(nan=0.0)
    result = to_go_advantages(rewards, torch.ones(1), 3, to_come, 0, normalize=False)
    for i, count in enumerate(counts):
        group = range(i // 3 * 3, i // 3 * 3 + 3)
        for t in range(4):
            values = [to_come[j, t].item() for j in group if counts[j] > t]
            expected = to_come[i, t].item() - sum(values) / len(values) if t < count else 0.0
            assert result[i, t].item() == pytest.approx(expected, abs=1e-15)
