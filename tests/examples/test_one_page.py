"""
`examples/seeupo_in_one_page.py` runs, learns, needs nothing of the package, and updates a model as the trainer does.

Both start from the same weights and train on the rollouts of unkind_rollouts.py with plain SGD; the largest difference
between their parameters, relative to the largest distance a parameter moved, has to stay under `TOLERANCE`.
"""

import ast
import json
import re
import subprocess
import sys
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
import torch
import unkind_rollouts
from datasets import Dataset
from fixed_rollouts import outcome_reward
from tiny import load_tiny_model, tiny_tokenizer
from unkind_rollouts import GROUP_SIZE, NUM_TRAJECTORIES, REWARDS, TURNS, FixedRollouts

from seeupo_trl import SeeUPOConfig, SeeUPOTrainer


SCRIPT = Path(__file__).parents[2] / "examples" / "seeupo_in_one_page.py"
ORDERS = ("reverse", "forward", "simultaneous")
TOLERANCE = 1e-9
# Orders that end this far apart cannot be mistaken for one another in float64.
VISIBLE = 1e-3
LEARNING_RATE = 0.005


@pytest.fixture
def one_page(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import seeupo_in_one_page

    return seeupo_in_one_page


def parameters_of(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one)


def updated_by_one_page(one_page, tiny_dir: str, order: str) -> dict[str, torch.Tensor]:
    """Parameters after the four iterations of the fixed rollouts, whose episodes have nought to eight turns."""
    model = load_tiny_model(tiny_dir, torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for iteration in range(len(TURNS)):
        episodes = []
        for index in range(NUM_TRAJECTORIES):
            prompt, completion, _, turns = unkind_rollouts.episode(iteration, index)
            actions = [slice(len(context), len(context) + len(action)) for context, action in turns]
            episodes.append(one_page.Episode(prompt + completion, actions, float(REWARDS[iteration][index])))
        one_page.update(model, optimizer, episodes, GROUP_SIZE, order)
    return parameters_of(model)


def updated_by_trainer(tiny_dir: str, order: str, output_dir: Path) -> dict[str, torch.Tensor]:
    """Parameters after the same iterations of the trainer, whose settings are its defaults but for the order."""
    model = load_tiny_model(tiny_dir, torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    config = SeeUPOConfig(
        update_order=order,
        output_dir=str(output_dir),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=NUM_TRAJECTORIES // 4,
        num_generations=GROUP_SIZE,
        max_steps=len(TURNS),
        shuffle_dataset=False,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    num_prompts = NUM_TRAJECTORIES // GROUP_SIZE * len(TURNS)
    SeeUPOTrainer(
        model=model,
        reward_funcs=outcome_reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": [f"w{i}" for i in range(num_prompts)]}),
        processing_class=tiny_tokenizer(),
        rollout_func=FixedRollouts(strip=False),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
    ).train()
    return parameters_of(model)


@pytest.mark.parametrize("order", ORDERS)
def test_update_ends_where_the_trainer_ends(one_page, order, tiny_dir, tmp_path):
    start = parameters_of(load_tiny_model(tiny_dir, torch.float64))
    expected = updated_by_trainer(tiny_dir, order, tmp_path)
    actual = updated_by_one_page(one_page, tiny_dir, order)
    assert largest_difference(actual, expected) <= TOLERANCE * largest_difference(expected, start)


def test_orders_end_apart(one_page, tiny_dir):
    """Otherwise the comparison with the trainer could not tell them from one another."""
    start = parameters_of(load_tiny_model(tiny_dir, torch.float64))
    updated = cache(lambda order: updated_by_one_page(one_page, tiny_dir, order))
    for one, other in combinations(ORDERS, 2):
        assert largest_difference(updated(one), updated(other)) > VISIBLE * largest_difference(updated(one), start)


def test_episodes_are_games_by_the_rules(one_page):
    torch.manual_seed(0)
    hidden_numbers = [i % 7 for i in range(200)]
    episodes = one_page.play(one_page.build_model(), hidden_numbers)
    assert {len(episode.turns) for episode in episodes} == {1, 2, 3}
    for episode, hidden in zip(episodes, hidden_numbers, strict=True):
        words = [one_page.VOCABULARY[token] for token in episode.tokens]
        actions = [words[turn] for turn in episode.turns]
        assert all(action == ["."] or len(action) == 2 and action[0] != "." for action in actions)
        guesses = [action[0] for action in actions]
        assert guesses.index(str(hidden)) == len(guesses) - 1 if episode.reward else str(hidden) not in guesses
        assert len(actions) == 3 or episode.reward == 1

        expected = ["<start>"]
        for action in actions:
            expected += action
            if not action[0].isdigit():
                expected.append("what?")
            elif int(action[0]) != hidden:
                expected.append("lower" if hidden < int(action[0]) else "higher")
        assert words == expected


def test_script_prints_its_curve_and_appends_it_to_a_file(one_page, tmp_path):
    runs = tmp_path / "runs.jsonl"
    runs.write_text("{}\n")
    command = [sys.executable, str(SCRIPT), "--iterations", "3", "--seed", "5", "--order", "random"]
    result = subprocess.run([*command, "--json", str(runs)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    first, run = (json.loads(line) for line in runs.read_text().splitlines())
    assert first == {}
    assert (run["seed"], run["order"], len(run["success"])) == (5, "random", 3)
    rows = re.findall(r"^ +(\d+) +(\d\.\d\d)  █+$", result.stdout, re.MULTILINE)
    assert rows == [(str(i + 1), f"{success:.2f}") for i, success in enumerate(run["success"])]
    assert f"uniform guesses {run['chance']:.2f}" in result.stdout

    # the seed fixes the run
    assert one_page.train(seed=5, num_iterations=3, order="random") == run["success"]


@pytest.mark.slow
def test_it_learns(one_page):
    success = one_page.train(seed=0, num_iterations=40, order="reverse")
    assert sum(success[-5:]) / 5 > max(sum(success[:5]) / 5, one_page.CHANCE) + 0.2


def test_one_page_needs_neither_the_package_nor_a_second_page():
    source = SCRIPT.read_text()
    assert len(source.splitlines()) <= 250
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch", "transformers"}
