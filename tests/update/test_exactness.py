"""The trainer ends where a naive implementation of Algorithm 1 ends (see oracle.py and against_oracle.py)."""

import itertools

import pytest
import torch
from against_oracle import (
    LEARNING_RATE,
    SEED,
    TEMPERATURE,
    TOLERANCE,
    VISIBLE,
    assert_matches_oracle,
    load_model,
    parameters_of,
    relative_error,
    run_oracle,
    train,
)
from fixed_rollouts import (
    GROUP_SIZE,
    NUM_GROUPS,
    NUM_TRAJECTORIES,
    as_groups,
    make_iteration,
    ragged_rollouts,
    rewrite_contexts,
)
from peft import LoraConfig, get_peft_model
from tiny import save_tiny_model

from seeupo_trl.update.steps import assign_minibatches


NUM_ITERATIONS = 3


CLIPPING = {"epsilon": 0.01, "epsilon_high": 0.015, "num_iterations": 2}

# Settings of the algorithm, under the names both sides use.
CASES = {
    "reverse": {},
    "forward": {"update_order": "forward"},
    "simultaneous": {"update_order": "simultaneous"},
    "old-turn": {"old_policy": "turn"},
    "old-turn-forward": {"old_policy": "turn", "update_order": "forward"},
    "product-ratio-in-the-surrogate": {"surrogate_ratio": "product", "epsilon": 0.02, "num_iterations": 2},
    "product-ratio-everywhere": {"surrogate_ratio": "product", "turn_ratio": "product", "turn_weight_clip": None},
    "product-ratio": {"turn_ratio": "product"},
    "product-ratio-unclipped": {"turn_ratio": "product", "turn_weight_clip": None},
    "product-ratio-unclipped-old-turn": {"turn_ratio": "product", "turn_weight_clip": None, "old_policy": "turn"},
    "weights-unclipped": {"turn_weight_clip": None},
    "weights-tightly-clipped": {"turn_weight_clip": 0.01},
    "advantage-clip": {"advantage_clip": 1.0},
    "advantages-not-scaled": {"scale_rewards": "none"},
    "one-block": {"max_turn_updates": 1},
    "two-blocks": {"max_turn_updates": 2},
    "three-blocks": {"max_turn_updates": 3},
    "two-blocks-forward": {"max_turn_updates": 2, "update_order": "forward"},
    "three-blocks-old-turn-product": {"max_turn_updates": 3, "old_policy": "turn", "turn_ratio": "product"},
    "kl": {"beta": 1.0},
    "kl-bias-correction": {"beta": 1.0, "use_bias_correction_kl": True},
    "kl-bias-correction-blocks-old-turn": {
        "beta": 1.0,
        "use_bias_correction_kl": True,
        "max_turn_updates": 2,
        "old_policy": "turn",
    },
    "entropy-bonus": {"entropy_coef": 0.5},
    "entropy-bonus-kl-blocks-old-turn": {
        "entropy_coef": 0.5,
        "beta": 1.0,
        "max_turn_updates": 2,
        "old_policy": "turn",
    },
    "grad-clip-inactive": {"max_grad_norm": 1e4, "turn_weight_clip": 0.05},
    "grad-clip": {"max_grad_norm": 2.0},
    "two-epochs": {"num_iterations": 2},
    "two-epochs-old-turn": {"num_iterations": 2, "old_policy": "turn"},
    "luspo": {"loss_type": "luspo", **CLIPPING},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.001, "num_iterations": 2},
    "sapo": {"loss_type": "sapo", "num_iterations": 2, "sapo_temperature_neg": 3.0},
    "vespo": {"loss_type": "vespo", "num_iterations": 2, "vespo_k_neg": 2.5},
    "ratio-clip": CLIPPING,
    "ratio-clip-delta": {**CLIPPING, "delta": 1.02},
    "ratio-clip-delta-kl-bias-correction": {**CLIPPING, "delta": 1.02, "beta": 1.0, "use_bias_correction_kl": True},
}


def test_settings_end_at_visibly_different_parameters(tiny_dir, oracle_on_ragged):
    """No case below could pass with the settings of another, nor with the turn weights left out."""
    start = parameters_of(load_model(tiny_dir))
    ends = {name: oracle_on_ragged(**settings) for name, settings in CASES.items() if name != "one-block"}
    ends["without-turn-weights"] = oracle_on_ragged(turn_weight_clip=0.0)
    ends["ratio-never-clipped"] = oracle_on_ragged(epsilon=1e9, num_iterations=2)
    ends.pop("two-epochs")  # its ratios stay within the default epsilon
    for (one, first), (other, second) in itertools.combinations(ends.items(), 2):
        assert relative_error(first, second, start) > VISIBLE, f"{one} and {other}"


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES.keys())
def test_trainer_matches_oracle(settings, tiny_dir, tmp_path, oracle_on_ragged):
    model = load_model(tiny_dir)
    start = parameters_of(model)
    trained = train(model, ragged_rollouts(), tmp_path, **settings)[-1]
    assert relative_error(trained, oracle_on_ragged(**settings), start) < TOLERANCE[torch.float64]


@pytest.mark.parametrize(
    "config",
    [
        {"gradient_checkpointing": True},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": NUM_TRAJECTORIES},
        {"per_device_train_batch_size": NUM_TRAJECTORIES, "gradient_accumulation_steps": 1},
    ],
    ids=["gradient-checkpointing", "one-row-micro-batches", "one-micro-batch"],
)
@pytest.mark.parametrize("settings", [{}, {"old_policy": "turn", "beta": 1.0}], ids=["defaults", "old-turn-kl"])
def test_way_of_computing_does_not_change_the_result(config, settings, tiny_dir, tmp_path, oracle_on_ragged):
    model = load_model(tiny_dir)
    start = parameters_of(model)
    trained = train(model, ragged_rollouts(), tmp_path, **config, **settings)[-1]
    assert relative_error(trained, oracle_on_ragged(**settings), start) < TOLERANCE[torch.float64]


def test_minibatches_are_equal_parts_of_the_batch_drawn_anew_every_iteration():
    draws = [tuple(assign_minibatches(NUM_TRAJECTORIES, 3, SEED, iteration)) for iteration in range(4)]
    assert all(sorted(draw) == sorted([0, 1, 2] * (NUM_TRAJECTORIES // 3)) for draw in draws)
    assert len(set(draws)) > 1


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"old_policy": "turn", "num_iterations": 2},
        {"update_order": "forward", "max_turn_updates": 2, "beta": 1.0, "max_grad_norm": 2.0},
        CLIPPING,
    ],
    ids=["defaults", "old-turn-two-epochs", "forward-blocks-kl-grad-clip", "ratio-clip-two-epochs"],
)
@pytest.mark.parametrize("num_minibatches", [2, 3])
def test_several_minibatches_a_turn(num_minibatches, settings, tiny_dir, tmp_path, oracle_on_ragged):
    """`steps_per_generation / gradient_accumulation_steps` optimizer steps an epoch on every block's pool."""
    model = load_model(tiny_dir)
    start = parameters_of(model)
    steps_per_generation = NUM_TRAJECTORIES // 2
    config = {
        "steps_per_generation": steps_per_generation,
        "gradient_accumulation_steps": steps_per_generation // num_minibatches,
    }
    trained = train(model, ragged_rollouts(), tmp_path, **config, **settings)[-1]
    expected = oracle_on_ragged(num_minibatches=num_minibatches, **settings)
    assert relative_error(trained, expected, start) < TOLERANCE[torch.float64]
    assert relative_error(expected, oracle_on_ragged(**settings), start) > VISIBLE


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"update_order": "forward", "old_policy": "turn"},
        {"beta": 1.0, "use_bias_correction_kl": True},
        {"entropy_coef": 0.5},
    ],
    ids=["defaults", "forward-old-turn", "kl", "entropy-bonus"],
)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_float32(settings, lora, tiny_dir, tmp_path, oracle_on_ragged):
    model = load_model(tiny_dir, torch.float32, lora)
    start = parameters_of(model)
    trained = train(model, ragged_rollouts(), tmp_path, **settings)[-1]
    expected = oracle_on_ragged(lora=lora, **settings)
    assert relative_error(trained, expected, start) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"update_order": "forward", "old_policy": "turn", "max_grad_norm": 2.0},
        {"beta": 1.0},
        {"gradient_checkpointing": True, "max_turn_updates": 2},
    ],
    ids=["defaults", "forward-old-turn-grad-clip", "kl", "gradient-checkpointing-blocks"],
)
def test_lora(config, tiny_dir, tmp_path, oracle_on_ragged):
    """Only the adapter moves; the reference of the KL penalty is the adapter as it was handed over."""
    model = load_model(tiny_dir, lora=True)
    start = parameters_of(model)
    trained = train(model, ragged_rollouts(), tmp_path, **config)[-1]
    settings = {key: value for key, value in config.items() if key != "gradient_checkpointing"}
    assert relative_error(trained, oracle_on_ragged(lora=True, **settings), start) < TOLERANCE[torch.float64]
    assert all(torch.equal(trained[name], start[name]) for name in start if "lora" not in name)


def test_kl_reference_of_an_adapter_the_trainer_creates_is_the_base_model(tiny_dir, tmp_path):
    peft_config = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)  # what the trainer draws the adapter from
        policy = get_peft_model(load_model(tiny_dir), peft_config)
    start = parameters_of(policy)
    groups = [as_groups(episodes) for episodes in ragged_rollouts()]
    expected, without_kl = (run_oracle(policy, groups, beta=beta)[-1].parameters for beta in (5.0, 0.0))
    optimizer_config = {"optim": "sgd", "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant"}
    model = load_model(tiny_dir)
    trained = train(model, ragged_rollouts(), tmp_path, peft_config=peft_config, beta=5.0, **optimizer_config)[-1]
    assert relative_error(trained, expected, start) < TOLERANCE[torch.float64]
    assert relative_error(expected, without_kl, start) > VISIBLE


def test_tied_embeddings(tmp_path):
    directory = save_tiny_model(tmp_path / "tied", tie_word_embeddings=True)
    assert_matches_oracle(directory, ragged_rollouts(), tmp_path)


def test_learning_rate_schedule_advances_once_an_iteration(tiny_dir, tmp_path):
    assert_matches_oracle(tiny_dir, ragged_rollouts(), tmp_path, num_iterations=2, lr_lambda=lambda step: 0.5**step)


@pytest.mark.parametrize("update_order", ["reverse", "simultaneous"])
def test_single_turn_episodes_are_gspo_with_batch_normalisation(update_order, tiny_dir, tmp_path):
    """With one turn an iteration is one policy-gradient step on the mean log-probability of each response."""
    iterations = [make_iteration(seed, [1] * NUM_TRAJECTORIES) for seed in range(5, 5 + NUM_ITERATIONS)]
    model, expected = load_model(tiny_dir), load_model(tiny_dir)
    start = parameters_of(model)
    trained = train(model, iterations, tmp_path, update_order=update_order)[-1]
    for episodes in iterations:
        rewards = torch.tensor([episode.reward for episode in episodes], dtype=torch.float64)
        advantages = rewards - rewards.view(-1, GROUP_SIZE).mean(dim=1).repeat_interleave(GROUP_SIZE)
        advantages = (advantages - advantages.mean()) / advantages.std()
        objective = 0
        for episode, advantage in zip(episodes, advantages, strict=True):
            ((context, action),) = episode.turns
            logits = expected(torch.tensor([context + action])).logits[0, len(context) - 1 : -1] / TEMPERATURE
            objective -= advantage * torch.nn.functional.cross_entropy(logits, torch.tensor(action))
        expected.zero_grad()
        (objective / NUM_TRAJECTORIES).backward()
        with torch.no_grad():
            for parameter in expected.parameters():
                parameter += LEARNING_RATE * parameter.grad
    assert relative_error(trained, parameters_of(expected), start) < TOLERANCE[torch.float64]


@pytest.mark.parametrize(
    "settings",
    [{}, {"old_policy": "turn", "beta": 1.0}, {"max_turn_updates": 2, "update_order": "forward"}],
    ids=["reverse", "old-turn-kl", "two-blocks-forward"],
)
@pytest.mark.parametrize("rows", [1, 2], ids=["one-row-micro-batches", "two-row-micro-batches"])
def test_contexts_need_not_be_append_only(rows, settings, tiny_dir, tmp_path, oracle_on_ragged):
    """Tokens an environment removed from later contexts are not seen by later turns."""
    turns = [rewrite_contexts(episodes, seed) for seed, episodes in enumerate(ragged_rollouts())]
    config = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": NUM_TRAJECTORIES // rows}
    results = assert_matches_oracle(tiny_dir, ragged_rollouts(), tmp_path, turns, config, **settings)
    start = parameters_of(load_model(tiny_dir))
    assert relative_error(results[-1].parameters, oracle_on_ragged(**settings), start) > VISIBLE


@pytest.mark.parametrize("turn_ratio", ["geometric", "product"])
def test_weight_clip_bounds_each_ratio_and_their_product(turn_ratio, tiny_dir, tmp_path):
    """A ratio far on one side of 1 cannot undo more than its own bound of a product on the other side."""
    iterations = [make_iteration(seed, [5, 4, 3] * NUM_GROUPS) for seed in (27, 127)]
    results = assert_matches_oracle(tiny_dir, iterations, tmp_path, turn_weight_clip=0.01, turn_ratio=turn_ratio)
    assert any(
        abs(min(max(block.weights_before[i] * block.factors[i], 0.99), 1.01) - block.weights_after[i]) > VISIBLE
        for block in results[0].blocks
        for i in block.pool
        if results[0].advantages[i] != 0
    )


def test_episodes_that_grow_longer_during_training(tiny_dir, tmp_path):
    iterations = [make_iteration(seed, [1, 1, seed, 1, seed, 1] * 2) for seed in (1, 3, 5)]
    results = assert_matches_oracle(tiny_dir, iterations, tmp_path)
    assert [len(result.blocks) for result in results] == [1, 3, 5]


def test_trajectories_without_model_tokens_count_in_the_statistics(tiny_dir, tmp_path):
    iterations = [make_iteration(seed, [0, 1, 2, 0, 2, 0, 0, 0, 2, 1, 1, 0]) for seed in range(8, 8 + NUM_ITERATIONS)]
    results = assert_matches_oracle(tiny_dir, iterations, tmp_path)
    assert any(results[0].advantages[i] for i in (0, 6, 7, 11))


@pytest.mark.parametrize("update_order", ["reverse", "simultaneous"])
def test_iterations_without_any_model_token_change_nothing(update_order, tiny_dir, tmp_path):
    model = load_model(tiny_dir)
    start = parameters_of(model)
    iterations = [make_iteration(11, [0] * NUM_TRAJECTORIES)] * 2
    for parameters in train(model, iterations, tmp_path, update_order=update_order):
        assert all(torch.equal(parameters[name], start[name]) for name in start)


def test_equal_rewards_change_nothing_even_with_momentum_and_weight_decay(tiny_dir, tmp_path):
    """No optimizer step is taken where no trajectory has an advantage."""
    iterations = [make_iteration(seed, [2, 1, 3] * NUM_GROUPS, equal_rewards=seed != 1) for seed in range(4)]
    model = load_model(tiny_dir)
    start = parameters_of(model)
    optimizer_kwargs = {"lr": 1e-3, "weight_decay": 0.1}
    before, learned, *after = train(
        model, iterations, tmp_path, optimizer=torch.optim.AdamW, optimizer_kwargs=optimizer_kwargs
    )
    assert all(torch.equal(before[name], start[name]) for name in start)
    assert not all(torch.equal(learned[name], start[name]) for name in start)
    for parameters in after:
        assert all(torch.equal(parameters[name], learned[name]) for name in start)


def test_kl_penalty_acts_where_all_rewards_are_equal(tiny_dir, tmp_path):
    iterations = [make_iteration(seed, [2, 1, 3] * NUM_GROUPS, equal_rewards=seed > 1) for seed in (1, 2, 3)]
    first, *rest = assert_matches_oracle(tiny_dir, iterations, tmp_path, beta=1.0)
    for result in rest:
        assert result.advantages == [0.0] * NUM_TRAJECTORIES
        assert any(not torch.equal(p, first.parameters[name]) for name, p in result.parameters.items())


def test_random_order_is_one_permutation_of_the_blocks_an_iteration(tiny_dir, tmp_path):
    """Every iteration ends where the oracle ends for exactly one order of the blocks, and the orders vary."""
    model = load_model(tiny_dir)
    iterations = [*ragged_rollouts(), ragged_rollouts()[0]]
    start = previous = parameters_of(model)
    trained = train(model, iterations, tmp_path, update_order="random", max_turn_updates=3)
    orders = []
    for episodes, parameters in zip(iterations, trained, strict=True):
        matches = []
        for permutation in itertools.permutations(range(3)):
            policy = load_model(tiny_dir)
            policy.load_state_dict(previous)
            settings = {"update_order": "random", "permutation": permutation, "max_turn_updates": 3}
            (result,) = run_oracle(policy, [as_groups(episodes)], **settings)
            if relative_error(parameters, result.parameters, start) < TOLERANCE[torch.float64]:
                matches.append(permutation)
        assert len(matches) == 1
        orders += matches
        previous = parameters
    assert len(set(orders)) > 1
