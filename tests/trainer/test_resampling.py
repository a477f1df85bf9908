"""`zero_variance="resample"`: groups that teach nothing give way to groups of further tasks."""

from itertools import product

import pytest
import torch
from datasets import IterableDataset
from launching import run_on_two_processes
from resampling_run import Task, make_trainer, watched
from tiny import load_tiny_model

from seeupo_trl import SeeUPOConfig, SeeUPOTrainer
from seeupo_trl.update.objective import batch_advantages, groups_without_variance


def logs(trainer):
    return [entry for entry in trainer.state.log_history if "reward" in entry]


def groups(batch, size=4):
    return [batch[i : i + size] for i in range(0, len(batch), size)]


def test_groups_without_variance_give_way_to_others(tiny_dir, tmp_path):
    trainer = make_trainer(tiny_dir, tmp_path)
    batches = watched(trainer)
    trainer.train()
    for batch, entry in zip(batches, logs(trainer), strict=True):
        assert len(batch) == 8
        for group in groups(batch):
            assert len({number for number, *_ in group}) == 1 and group[0][0] % 3 == 0
            assert len({reward for _, _, reward, _ in group}) > 1
            assert all(rewards == [pytest.approx(reward)] for _, _, reward, rewards in group)
        assert entry["frac_reward_zero_std"] == 0 and entry["resampling/groups_without_variance"] == 0
        assert entry["resampling/groups_drawn"] >= entry["resampling/groups_replaced"]
    assert sum(entry["resampling/groups_replaced"] for entry in logs(trainer)) > 0


def test_the_batch_has_the_tokens_of_the_groups_that_are_trained_on(tiny_dir, tmp_path, monkeypatch):
    batches, generate_and_score = [], SeeUPOTrainer._generate_and_score_completions

    def watching(trainer, inputs):
        batches.append(generate_and_score(trainer, inputs))
        return batches[-1]

    monkeypatch.setattr(SeeUPOTrainer, "_generate_and_score_completions", watching)
    trainer = make_trainer(tiny_dir, tmp_path)
    trainer.train()
    assert sum(entry["resampling/groups_replaced"] for entry in logs(trainer)) > 0
    for batch in batches:
        masks = (batch["completion_mask"] * batch["tool_mask"]).bool()
        for i, trajectory in enumerate(batch["episodes"].trajectories):
            (turn,) = trajectory.turns
            assert batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist() == turn.context_ids
            assert batch["completion_ids"][i][masks[i]].tolist() == turn.action_ids


def test_groups_with_variance_stay_where_they_are(tiny_dir, tmp_path):
    kept, filled = (make_trainer(tiny_dir, tmp_path, max_steps=1, zero_variance=name) for name in ("keep", "resample"))
    before, after = watched(kept), watched(filled)
    kept.train(), filled.train()
    pairs = list(zip(groups(before[0]), groups(after[0]), strict=True))
    assert any(old == new for old, new in pairs) or all(old[0][0] % 3 for old, _ in pairs)
    assert all(old == new for old, new in pairs if old[0][0] % 3 == 0)
    # the metrics of the rollout are those of the tasks as they were first drawn
    for name in ("reward", "reward_std", "turns/mean", "completions/mean_length", "rollout/wait_others"):
        assert name in logs(filled)[0]
    assert logs(filled)[0]["reward"] == logs(kept)[0]["reward"]
    assert logs(filled)[0]["completions/mean_length"] == logs(kept)[0]["completions/mean_length"]
    assert logs(filled)[0]["time/generation"] > 0
    assert [len(log) for log in (filled._logs["prompt"], filled._logs["completion"])] == [8, 8]
    shown = [prompt[0]["content"].split()[0] for prompt in filled._logs["prompt"]]
    assert shown == [f"w{number}" for number, *_ in after[0]]


def test_groups_whose_functions_trade_off_stay_where_each_function_is_normalised(tiny_dir, tmp_path):
    def longer(completions, **columns):
        return [len(completion[0]["content"]) / 8 for completion in completions]

    def shorter_if_dull(completions, dull, **columns):
        return [n * (-1 if is_dull else 2) for n, is_dull in zip(longer(completions), dull, strict=True)]

    drawn = {}
    for aggregation in ("sum_then_normalize", "normalize_then_sum"):
        options = {"reward_funcs": [longer, shorter_if_dull], "multi_objective_aggregation": aggregation}
        # four groups: where all trade off, they cancel after all
        options |= {"per_device_train_batch_size": 16, "dull": lambda number: number % 2 == 0}
        trainer = make_trainer(tiny_dir, tmp_path, **options)
        trainer.train()
        drawn[aggregation] = [entry["resampling/groups_drawn"] for entry in logs(trainer)]
        assert all(entry["resampling/groups_without_variance"] == 0 for entry in logs(trainer))
        assert all(entry["frac_reward_zero_std"] == 0 for entry in logs(trainer))
    assert sum(drawn["sum_then_normalize"]) > 0 == sum(drawn["normalize_then_sum"])


def test_it_is_bounded(tiny_dir, tmp_path):
    trainer = make_trainer(tiny_dir, tmp_path, max_steps=1, dull=lambda number: True, max_resampling_rounds=2)
    trainer.train()
    (entry,) = logs(trainer)
    assert entry["resampling/groups_drawn"] == 4 and entry["resampling/groups_replaced"] == 0
    assert entry["resampling/groups_without_variance"] == 2 and entry["frac_reward_zero_std"] == 1


def test_advantages_are_those_of_the_batch_that_is_trained_on(tiny_dir, tmp_path):
    trainer = make_trainer(tiny_dir, tmp_path, max_steps=1)
    batches, seen = watched(trainer), []
    score = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: [batch := score(inputs), seen.append(batch)][0]
    trainer.train()
    rewards = torch.tensor([reward for _, _, reward, _ in batches[0]], dtype=torch.float64)
    centred = rewards - rewards.view(-1, 4).mean(dim=1).repeat_interleave(4)
    torch.testing.assert_close(seen[0]["advantages"].double(), centred / centred.std(), rtol=1e-4, atol=1e-5)


def test_the_same_seed_draws_the_same_tasks_after_a_resume(tiny_dir, tmp_path):
    whole = make_trainer(tiny_dir, tmp_path / "whole", max_steps=3)
    batches = watched(whole)
    whole.train()
    make_trainer(tiny_dir, tmp_path / "cut", max_steps=3, save_strategy="steps", save_steps=1).train()
    resumed = make_trainer(tiny_dir, tmp_path / "cut", max_steps=3)
    again = watched(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-1"))
    assert again == batches[1:]


def test_two_processes_fill_their_batches_together(tiny_dir, tmp_path):
    first, second = run_on_two_processes("resampling_run.py", tmp_path, tiny_dir)
    assert first["parameters"] == second["parameters"]
    for one, other, entry in zip(first["batches"], second["batches"], first["logs"], strict=True):
        (group,) = groups(one + other)
        assert len({number for number, *_ in group}) == 1
        if entry["resampling/groups_without_variance"] == 0:
            assert group[0][0] % 3 == 0 and len({reward for _, _, reward, _ in group}) > 1
    assert sum(entry["resampling/groups_replaced"] for entry in first["logs"]) > 0


def test_the_expected_gradient_is_that_of_keeping_divided_by_the_probability_of_variance():
    """Enumerated: two tasks, groups of two, one parameter a task (the log-odds of success)."""
    success = {"easy": 0.9, "hard": 0.5}
    kept, replaced, probability = torch.zeros(2), torch.zeros(2), 0.0
    for (index, p), outcomes in product(enumerate(success.values()), product([0.0, 1.0], repeat=2)):
        weight = 0.5 * torch.tensor([p if outcome else 1 - p for outcome in outcomes]).prod().item()
        rewards = torch.tensor(outcomes)[:, None]
        advantages = batch_advantages(rewards, torch.ones(1), 2, normalize=False)
        score = torch.tensor([outcome - p for outcome in outcomes], dtype=advantages.dtype)
        gradient = torch.zeros(2)
        gradient[index] = (advantages * score).mean()
        kept += weight * gradient
        if not groups_without_variance(rewards, torch.ones(1), 2).item():
            replaced += weight * gradient
            probability += weight
    torch.testing.assert_close(replaced / probability, kept / probability)
    assert 0.3 < probability < 0.4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zero_variance": "drop"}, "`zero_variance='drop'` is not one of 'keep', 'resample'"),
        ({"max_resampling_rounds": 0}, "`max_resampling_rounds` is 0"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SeeUPOConfig("x", use_cpu=True, bf16=False, **options)


def test_a_stream_of_tasks_cannot_be_drawn_from(tiny_dir, tmp_path):
    rows = IterableDataset.from_generator(lambda: iter([{"prompt": "w1"}] * 4))
    args = SeeUPOConfig(str(tmp_path), zero_variance="resample", use_cpu=True, bf16=False, max_steps=1)
    with pytest.raises(ValueError, match="must be a `datasets.Dataset`; got IterableDataset"):
        SeeUPOTrainer(load_tiny_model(tiny_dir), args=args, train_dataset=rows, environment_factory=Task)
