"""
Random combinations of the update's options, each trained by the trainer and by the naive implementation.

`test_fuzz.py` takes a fixed set of cases. For more: `python tests/helpers/fuzz.py FIRST COUNT`. A number makes two
cases, with one reward function and with two, and one that fails prints its options as a dict for `run_case`.
"""

import copy
import random
import sys
import tempfile
import traceback
from typing import Any

import torch
from against_oracle import SEED, TEMPERATURE, load_model, parameters_of, train
from fixed_rollouts import (
    NUM_TRAJECTORIES,
    Episode,
    as_groups,
    draw_step_rewards,
    make_iteration,
    rewrite_contexts,
)
from oracle import OracleSettings, seeupo_iteration
from tiny import VOCABULARY, save_tiny_model

from seeupo_trl.scoring.turn_buffer import Block
from seeupo_trl.update.schedule import update_schedule
from seeupo_trl.update.steps import assign_minibatches


END = VOCABULARY.index("<|im_end|>")
TOLERANCE = 1e-7  # of the distance moved
SMALLEST_DISTANCE = 1e-6
LEARNING_RATE = 0.002  # of against_oracle.py's optimizer


def draw_case(number: int) -> dict[str, Any]:
    """
    The options of a case: `update` goes to the trainer and to the oracle, `layout` to the trainer alone, `episodes`
    says what was played.
    """
    rng = random.Random(number)

    def often(default: Any, *others: Any) -> Any:
        return default if rng.random() < 0.5 else rng.choice(others)

    update: dict[str, Any] = {
        "update_order": often("reverse", "forward", "random", "simultaneous"),
        "max_turn_updates": often(None, 1, 2, 3),
        "old_policy": often("iteration", "turn"),
        "turn_ratio": often("geometric", "product"),
        "turn_credit": often("episode", "to_go"),
        "turn_weight_clip": often(0.2, None, 0.05, 0.01),
        "scale_rewards": often("batch", "none"),
        "advantage_clip": often(None, 1.0, 0.5),
        "beta": often(0.0, 0.1, 1.0),
        "use_bias_correction_kl": often(False, True),
        "entropy_coef": often(0.0, 0.1, 0.5),
        "epsilon": often(0.2, 0.02, 3e-4),
        "epsilon_high": often(None, 0.3, 0.01),
        "loss_type": often("seeupo", "luspo", "cispo", "sapo", "vespo"),
        "num_iterations": often(1, 2, 3),
        "max_grad_norm": often(0.0, 2.0, 0.1),
    }
    if update["update_order"] == "simultaneous" or update["max_turn_updates"] == 1:
        update["turn_credit"] = "episode"
    if update["loss_type"] != "vespo":
        update["surrogate_ratio"] = often("geometric", "product")
    if update["loss_type"] in ("seeupo", "luspo"):
        update["delta"] = often(None, 1.02, 1.5)
    if update["loss_type"] == "cispo":
        update["epsilon_high"] = often(1.001, 5.0)
    if update["loss_type"] == "sapo":
        update |= {"sapo_temperature_pos": often(1.0, 2.0), "sapo_temperature_neg": often(1.05, 3.0)}
    if update["loss_type"] == "vespo":
        update |= {"vespo_k_pos": often(2.0, 1.0), "vespo_k_neg": often(3.0, 2.5), "vespo_lambda_neg": often(2.0, 3.0)}
    rows = rng.choice([1, 2, 3, 6, 12])
    steps = NUM_TRAJECTORIES // rows
    minibatches = rng.choice([n for n in (1, 2, 3, 4, 6) if steps % n == 0])
    layout = {
        "per_device_train_batch_size": rows,
        "steps_per_generation": steps,
        "gradient_accumulation_steps": steps // minibatches,
        "packing": often("auto", "tree", "rows"),
        "max_tokens_per_microbatch": often(None, 72, 100, 300),
        "pad_to_multiple_of": often(None, 8),
        "gradient_checkpointing": often(False, True),
        "mask_truncated_completions": often(False, True),
    }
    episodes = {
        "seed": rng.randrange(10**6),
        "longest": rng.choice([1, 2, 3, 5]),
        "iterations": rng.choice([1, 2, 3]),
        "equal_rewards": often(False, True) and rng.random() < 0.3,
        "rewrites": rng.random() < 0.3,
        "whole": rng.choice([0.5, 0.9]),
    }
    if layout["max_tokens_per_microbatch"] is not None:
        # what a trajectory of five turns needs: in one row, and where contexts are rewritten in as many
        layout["max_tokens_per_microbatch"] += 300 if episodes["rewrites"] else 0
    return {"update": update, "layout": layout, "episodes": episodes, "lora": rng.random() < 0.25}


def draw_case_of_two_functions(number: int) -> dict[str, Any]:
    """The case of the same number with a second reward function, missing rewards and another temperature."""
    case, rng = draw_case(number), random.Random(f"two functions {number}")
    case["update"] |= {
        "temperature": rng.choice([0.5, 0.9, 1.0, 1.5]),
        "multi_objective_aggregation": rng.choice(["sum_then_normalize", "normalize_then_sum"]),
        "reward_weights": rng.choice([(1.0, 1.0), (0.5, 2.0), (1.0, -1.0), (0.0, 1.0)]),
    }
    case["episodes"] |= {"second_function": True, "missing": rng.choice([0.0, 0.2])}
    return case


def play(episodes: dict[str, Any]) -> tuple[list[list[Episode]], list[list] | None]:
    """Rollouts of every iteration, and the turns handed over with them where contexts are rewritten."""
    rng = random.Random(episodes["seed"])
    iterations = []
    for number in range(episodes["iterations"]):
        counts = [rng.randint(0, episodes["longest"]) for _ in range(NUM_TRAJECTORIES)]
        equal = episodes["equal_rewards"] and number == 0
        played = make_iteration(rng.randrange(10**6), counts, equal)
        for episode in played:
            # one of words alone counts as cut; only the last action may end in the end token
            if episode.turns and episode.env_mask[-1] and rng.random() < episodes["whole"]:
                episode.completion_ids.append(END)
                episode.env_mask.append(1)
                context, action = episode.turns[-1]
                episode.turns[-1] = (context, [*action, END])
        iterations.append(played)
    turns = None
    if episodes["rewrites"]:
        turns = [rewrite_contexts(played, rng.randrange(10**6)) for played in iterations]
    return iterations, turns


def draw_other_rewards(played: list[Episode], missing: float, seed: int) -> list[float | None]:
    """Rewards of a second function; a share of these and of the episodes' own is taken away."""
    rng = random.Random(seed)
    for episode in played:
        if rng.random() < missing:
            episode.reward = None
    return [None if rng.random() < missing else rng.randint(-8, 8) / 8 for _ in played]


def trained_turns(played: list[Episode], turns: list | None, masks: bool) -> list:
    """Groups as the oracle reads them, with the turns that are trained on."""
    shown = played
    if turns is not None:
        shown = [Episode([], [], [], new, e.reward) for e, new in zip(played, turns, strict=True)]
    if masks:
        shown = [
            new if old.turns and old.turns[-1][1][-1] == END else Episode([], [], [], [], old.reward)
            for old, new in zip(played, shown, strict=True)
        ]
    return as_groups(shown)


def run_case(directory: str, output: Any, case: dict[str, Any]) -> None:
    """Train on one case in both ways and compare the parameters after every iteration."""
    update, layout = case["update"], case["layout"]
    iterations, turns = play(case["episodes"])
    model = load_model(directory, lora=case["lora"])
    start = parameters_of(model)
    policy, reference = copy.deepcopy(model), copy.deepcopy(model)
    step_rewards = None
    if update["turn_credit"] == "to_go":
        step_rewards = [draw_step_rewards(played, case["episodes"]["seed"] + n) for n, played in enumerate(iterations)]
    other = None
    if case["episodes"].get("second_function"):
        missing, seed = case["episodes"]["missing"], case["episodes"]["seed"]
        other = [draw_other_rewards(played, missing, seed + n) for n, played in enumerate(iterations)]
    rollouts = {"turns": turns, "step_rewards": step_rewards, "other_rewards": other}
    trained = train(model, iterations, output, **rollouts, **update, **layout)
    minibatches = layout["steps_per_generation"] // layout["gradient_accumulation_steps"]
    for step, played in enumerate(iterations):
        groups = trained_turns(played, turns and turns[step], layout["mask_truncated_completions"])
        if other is not None:
            seconds = iter(other[step])
            groups = [[(shown, [next(seconds), reward]) for shown, reward in group] for group in groups]
        longest = max(len(shown) for group in groups for shown, _ in group)
        settings = OracleSettings(
            lr=LEARNING_RATE,
            minibatches=tuple(assign_minibatches(NUM_TRAJECTORIES, minibatches, SEED, step)),
            permutation=_permutation(longest, update["max_turn_updates"], step),
            **{"temperature": TEMPERATURE, **update},
        )
        steps = None if step_rewards is None else step_rewards[step]
        result = seeupo_iteration(policy, groups, settings, ref_model=reference, step_rewards=steps)
        moved = max((result.parameters[name] - start[name].double()).abs().max().item() for name in start)
        difference = max((result.parameters[name] - trained[step][name]).abs().max().item() for name in start)
        # the oracle moves by rounding errors where nothing is learned
        error = difference / max(moved, SMALLEST_DISTANCE)
        assert error < TOLERANCE, f"{error:.1e} after iteration {step}"


def _permutation(num_turns: int, max_turn_updates: int | None, step: int) -> tuple[int, ...]:
    """The order that the trainer's documented seed draws, as numbers of blocks."""
    seed = random.Random(f"{SEED} {step}").getrandbits(32)
    order: list[Block] = update_schedule(num_turns, "random", max_turn_updates, seed)
    return tuple(sorted(order, key=lambda block: block.first).index(block) for block in order)


def main() -> None:
    first, count = map(int, sys.argv[1:])
    torch.set_num_threads(1)
    failed = []
    with tempfile.TemporaryDirectory() as directory:
        model = save_tiny_model(f"{directory}/model")
        for number in range(first, first + count):
            for draw in (draw_case, draw_case_of_two_functions):
                case = draw(number)
                try:
                    run_case(model, f"{directory}/out", case)
                except Exception:
                    failed.append((draw.__name__, number))
                    print(f"--- {draw.__name__}({number}): {case!r}\n{traceback.format_exc()}", flush=True)
    print(f"{2 * count - len(failed)} of {2 * count} cases agree; failed: {failed}")


if __name__ == "__main__":
    main()
