"""
The trainer ends where a naive implementation of Algorithm 1 ends (see oracle.py).

Both start from the same weights and train on the same rollouts with plain SGD for three iterations; the largest
difference between their parameters, relative to the largest distance a parameter moved, has to stay under `TOLERANCE`.
"""

import copy
import itertools
import math
import random
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from datasets import Dataset
from oracle import OracleSettings, normalised_advantages, ordered_blocks, seeupo_iteration, token_logps
from peft import LoraConfig, get_peft_model
from tiny import VOCABULARY, WORDS, load_tiny_model, save_tiny_model, tiny_tokenizer
from transformers import TrainerCallback
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from seeupo_trl import SeeUPOConfig, SeeUPOTrainer
from seeupo_trl.trajectory import Trajectory, Turn
from seeupo_trl.update.steps import assign_minibatches


TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
# Settings that end this far apart cannot be mistaken for one another in float64.
VISIBLE = 1e-3
NUM_ITERATIONS = 3
NUM_GROUPS = 4
GROUP_SIZE = 3
NUM_TRAJECTORIES = NUM_GROUPS * GROUP_SIZE
LEARNING_RATE = 0.002
TEMPERATURE = 0.9
SEED = 42


# --- Rollouts --------------------------------------------------------------------------------------------------------


@dataclass
class Episode:
    """One rollout twice: as the sequence and mask a rollout function returns, and as the turns the oracle reads."""

    prompt_ids: list[int]
    completion_ids: list[int]
    env_mask: list[int]
    turns: list[tuple[list[int], list[int]]]
    reward: float


def make_episode(rng: random.Random, prompt_ids: list[int], num_turns: int, reward: float) -> Episode:
    """Alternate actions and environment tokens; the environment may speak first, and speaks last half of the time."""
    first, last = VOCABULARY.index(WORDS[0]), VOCABULARY.index(WORDS[-1])

    def tokens(shortest, longest):
        return [rng.randint(first, last) for _ in range(rng.randint(shortest, longest))]

    completion_ids, env_mask, turns = [], [], []
    if num_turns == 0 or rng.random() < 0.25:
        completion_ids += tokens(1, 3)
        env_mask += [0] * len(completion_ids)
    for t in range(num_turns):
        action = tokens(1, 6)
        turns.append((prompt_ids + completion_ids, action))
        completion_ids = completion_ids + action
        env_mask += [1] * len(action)
        if t < num_turns - 1 or rng.random() < 0.5:
            observation = tokens(1, 4)
            completion_ids = completion_ids + observation
            env_mask += [0] * len(observation)
    return Episode(prompt_ids, completion_ids, env_mask, turns, reward)


def make_iteration(seed: int, turn_counts: list[int], equal_rewards: bool = False) -> list[Episode]:
    """Rollouts of `NUM_GROUPS` tasks in generation order; all rewards of the second group are equal."""
    rng = random.Random(seed)
    episodes = []
    for group in range(NUM_GROUPS):
        prompt_ids = [rng.randrange(len(VOCABULARY)) for _ in range(rng.randint(3, 9))]
        for member in range(GROUP_SIZE):
            # Multiples of 1/8: a reward passes through float32 on its way to the trainer.
            reward = 0.5 if equal_rewards or group == 1 else rng.randint(0, 16) / 8
            episodes.append(make_episode(rng, prompt_ids, turn_counts[GROUP_SIZE * group + member], reward))
    return episodes


@cache
def ragged_rollouts() -> tuple[list[Episode], ...]:
    """Three iterations of one to five turns; the second has a trajectory without any model token."""
    return (
        make_iteration(1, [5, 2, 1, 3, 4, 1, 2, 2, 3, 1, 4, 2]),
        make_iteration(2, [1, 3, 2, 2, 1, 3, 4, 0, 1, 2, 4, 3]),
        make_iteration(3, [3, 1, 3, 3, 2, 1, 1, 2, 3, 2, 3, 1]),
    )


def as_groups(episodes: list[Episode]):
    rows = [(episode.turns, episode.reward) for episode in episodes]
    return [rows[start : start + GROUP_SIZE] for start in range(0, len(rows), GROUP_SIZE)]


def rewrite_contexts(episodes: list[Episode], seed: int) -> list[list[tuple[list[int], list[int]]]]:
    """The episodes' turns with middle tokens removed from later contexts, as when reasoning is stripped."""
    rng = random.Random(seed)
    rewritten = []
    for episode in episodes:
        turns = []
        for t, (context, action) in enumerate(episode.turns):
            if t > 0:
                start = len(episode.prompt_ids) + rng.randint(0, 1)
                context = context[:start] + context[start + rng.randint(1, 3) :]
            turns.append((context, action))
        rewritten.append(turns)
    return rewritten


# --- The two implementations -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def norms_in_the_dtype_of_the_model():
    """Qwen3 normalises in float32 whatever its dtype; in a float64 model that would hide errors of about 1e-7."""
    in_float32 = Qwen3RMSNorm.forward

    def forward(self, hidden_states):
        if hidden_states.dtype != torch.float64:
            return in_float32(self, hidden_states)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * hidden_states * torch.rsqrt(variance + self.variance_epsilon)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Qwen3RMSNorm, "forward", forward)
        yield


def load_model(directory: str, dtype=torch.float64, lora: bool = False):
    if not lora:
        return load_tiny_model(directory, dtype)
    model = load_tiny_model(directory)  # in float32, so that the adapter starts from the same values in every dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # PEFT starts it at zero, where half of the adapter gets no gradient
                torch.nn.init.normal_(parameter, std=0.1)
    return model.to(dtype)


def outcome_reward(completions, outcome, **kwargs):
    return outcome


class Snapshots(TrainerCallback):
    """Keeps the parameters after every iteration."""

    def __init__(self):
        self.parameters = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.parameters.append({name: p.detach().clone() for name, p in model.named_parameters()})


def train(
    model,
    iterations,
    tmp_path,
    *,
    turns=None,
    optimizer=torch.optim.SGD,
    optimizer_kwargs=None,
    lr_lambda=lambda step: 1.0,
    peft_config=None,
    **config,
):
    """
    Train on fixed rollouts through the public interface only, and return the parameters after every iteration.

    Args:
        turns (`list`, *optional*):
            Turns of each trajectory for each iteration, handed over as `trajectories`, not read from the mask.
        peft_config (`PeftConfig`, *optional*):
            Adapter that the trainer creates; the trainer then makes the optimizer as well, from `config`.
    """

    def fixed_rollouts(prompts, trainer):
        step = trainer.state.global_step
        tasks = [step * NUM_GROUPS + i // GROUP_SIZE for i in range(NUM_TRAJECTORIES)]
        assert [prompt[0]["content"] for prompt in prompts] == [f"w{task}" for task in tasks]
        episodes = iterations[step]
        rollouts = {
            "prompt_ids": [episode.prompt_ids for episode in episodes],
            "completion_ids": [episode.completion_ids for episode in episodes],
            "logprobs": None,
            "env_mask": [episode.env_mask for episode in episodes],
            "outcome": [episode.reward for episode in episodes],
        }
        if turns is not None:
            rollouts["trajectories"] = [
                Trajectory([Turn(context, action) for context, action in trajectory]) for trajectory in turns[step]
            ]
        return rollouts

    settings = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": NUM_TRAJECTORIES // 2,
        "num_generations": GROUP_SIZE,
        "max_steps": len(iterations),
        "temperature": TEMPERATURE,
        "max_grad_norm": 0.0,
        "gradient_checkpointing": False,
        "shuffle_dataset": False,
        "seed": SEED,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        # trl 1.15 loads the reference model in float32 unless it is told
        "model_init_kwargs": {"dtype": next(model.parameters()).dtype},
    }
    optimizers = (None, None)
    if peft_config is None:
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = optimizer(trainable, **(optimizer_kwargs or {"lr": LEARNING_RATE}))
        optimizers = (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda))
    snapshots = Snapshots()
    SeeUPOTrainer(
        model=model,
        reward_funcs=outcome_reward,
        args=SeeUPOConfig(**{**settings, **config}),
        train_dataset=Dataset.from_dict(
            {"prompt": [[{"role": "user", "content": f"w{i}"}] for i in range(NUM_GROUPS * len(iterations))]}
        ),
        processing_class=tiny_tokenizer(),
        rollout_func=fixed_rollouts,
        callbacks=[snapshots],
        optimizers=optimizers,
        peft_config=peft_config,
    ).train()
    return snapshots.parameters


def run_oracle(model, groups_per_iteration, lr_lambda=lambda step: 1.0, num_minibatches=1, **settings):
    """Every iteration of the naive implementation, in float64, from `model` (left untouched)."""
    policy = copy.deepcopy(model).double()
    reference = copy.deepcopy(policy)
    results = []
    for step, groups in enumerate(groups_per_iteration):
        step_settings = OracleSettings(
            lr=LEARNING_RATE * lr_lambda(step),
            temperature=TEMPERATURE,
            # Any partition is right; the trainer's is the one its documented rule draws.
            minibatches=tuple(assign_minibatches(NUM_TRAJECTORIES, num_minibatches, SEED, step)),
            **settings,
        )
        results.append(seeupo_iteration(policy, groups, step_settings, ref_model=reference))
    return results


def parameters_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def relative_error(actual, expected, start) -> float:
    """Largest difference of two sets of parameters, in units of the largest distance from the start."""
    difference = max((actual[name].double() - expected[name]).abs().max().item() for name in expected)
    distance = max((expected[name] - start[name].double()).abs().max().item() for name in expected)
    return difference / distance


@pytest.fixture(scope="module")
def oracle_on_ragged(tiny_dir):
    """Final parameters of the oracle on the ragged rollouts, for given settings; each is computed once."""

    @cache
    def final(lora=False, **settings):
        results = run_oracle(load_model(tiny_dir, lora=lora), map(as_groups, ragged_rollouts()), **settings)
        return results[-1].parameters

    return final


# --- The oracle itself -----------------------------------------------------------------------------------------------


def test_oracle_advantages_are_centred_per_group_and_scaled_over_the_batch():
    # Group means 0.5 and 3, so the relative advantages are 0.5, -0.5, 0, 0, with unbiased variance 0.5 / 3.
    expected = 0.5 / math.sqrt(0.5 / 3)
    assert normalised_advantages([[1.0, 0.0], [3.0, 3.0]]) == pytest.approx([expected, -expected, 0.0, 0.0])
    assert normalised_advantages([[1.0, 0.0], [3.0, 3.0]], advantage_clip=1.0) == pytest.approx([1.0, -1.0, 0.0, 0.0])
    assert normalised_advantages([[1.0, 0.0], [3.0, 3.0]], scale_rewards="none") == [0.5, -0.5, 0.0, 0.0]
    assert normalised_advantages([[1.0, 1.0], [3.0, 3.0]]) == [0.0, 0.0, 0.0, 0.0]


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


# --- Trainer and oracle ----------------------------------------------------------------------------------------------

CLIPPING = {"epsilon": 0.01, "epsilon_high": 0.015, "num_iterations": 2}

# Settings of the algorithm, under the names both sides use.
CASES = {
    "reverse": {},
    "forward": {"update_order": "forward"},
    "simultaneous": {"update_order": "simultaneous"},
    "old-turn": {"old_policy": "turn"},
    "old-turn-forward": {"old_policy": "turn", "update_order": "forward"},
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


def assert_matches_oracle(directory, iterations, tmp_path, turns=None, config=None, **settings):
    """Compare after every iteration; `config` is for the trainer alone. Returns the oracle's results."""
    model = load_model(directory)
    start = parameters_of(model)
    groups = [as_groups(episodes) for episodes in iterations]
    if turns is not None:
        rewritten = [
            [Episode([], [], [], new, episode.reward) for episode, new in zip(episodes, step_turns, strict=True)]
            for episodes, step_turns in zip(iterations, turns, strict=True)
        ]
        groups = [as_groups(episodes) for episodes in rewritten]
    results = run_oracle(model, groups, **settings)
    trained = train(model, iterations, tmp_path, turns=turns, **(config or {}), **settings)
    for step, (parameters, result) in enumerate(zip(trained, results, strict=True)):
        error = relative_error(parameters, result.parameters, start)
        assert error < TOLERANCE[torch.float64], f"after iteration {step}"
    return results


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
