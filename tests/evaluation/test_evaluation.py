"""Evaluations count each episode once, say how sure they are, and mean the same whatever the batches and processes."""

import json
import math
from contextlib import nullcontext
from datetime import date
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from count_down import CountDown
from datasets import Dataset, IterableDataset
from evaluation_run import evaluate_and_train, make_trainer, tasks
from launching import run_on_two_processes
from tiny import save_tiny_model
from transformers import TrainerCallback

from seeupo_trl import SeeUPOTrainer, Trajectory
from seeupo_trl.envs import StopReason
from seeupo_trl.evaluation.estimators import bootstrap_interval, pass_at, pass_hat
from seeupo_trl.evaluation.outcome import Outcome, _warn_of_success, describe_outcomes, task_of
from seeupo_trl.evaluation.summary import MOST_CATEGORIES, Evaluation, attempts, summarize
from seeupo_trl.trajectory_log import read_trajectories


def outcome(group=0, success=None, reward=0.0, stop_reason=StopReason.completed, category=None, turns=1, **kwargs):
    options = {"index": 0, "task": str(group), "rewards": {}, **kwargs}
    return Outcome(
        group=group,
        success=success,
        reward=reward,
        stop_reason=stop_reason,
        category=category,
        turns=turns,
        **options,
    )


@pytest.mark.parametrize("n", range(1, 8))
def test_estimators_equal_the_enumeration_of_all_draws(n):
    for c in range(n + 1):
        outcomes = [True] * c + [False] * (n - c)
        for j in range(1, n + 1):
            draws = list(combinations(outcomes, j))
            assert pass_at(j, n, c) == pytest.approx(sum(map(any, draws)) / len(draws))
            assert pass_hat(j, n, c) == pytest.approx(sum(map(all, draws)) / len(draws))


@pytest.mark.parametrize("j, n, c", [(0, 2, 1), (3, 2, 1), (1, 2, 3), (1, 2, -1)])
def test_estimators_refuse_impossible_counts(j, n, c):
    for estimate in (pass_at, pass_hat):
        with pytest.raises(ValueError, match="1 <= j <= n"):
            estimate(j, n, c)


def test_attempts_are_powers_of_two_and_k():
    assert [attempts(k) for k in (1, 2, 3, 6, 8)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(1)
    tasks, k, runs = 60, 4, 250
    covered = {"avg@4": 0, "pass@4": 0, "pass^4": 0}
    # tasks differ in difficulty: p ~ Beta(1, 2), so E p = 1/3, E p^4 = 1/15 and E (1 - p)^4 = 1/3
    truth = {"avg@4": 1 / 3, "pass@4": 1 - 1 / 3, "pass^4": 1 / 15}
    for run in range(runs):
        c = rng.binomial(k, rng.beta(1, 2, size=tasks))
        values = {"avg@4": c / k, "pass@4": np.sign(c), "pass^4": (c == k).astype(float)}
        for name, by_task in values.items():
            low, high = bootstrap_interval(by_task, seed=run, num_resamples=400)
            covered[name] += low <= truth[name] <= high
    # binomial standard error of 250 runs: 0.014
    assert 0.91 < covered["avg@4"] / runs < 0.99
    assert 0.91 < covered["pass@4"] / runs < 0.99
    # rare events: the percentile bootstrap is known to be somewhat too narrow
    assert 0.87 < covered["pass^4"] / runs < 0.99


def test_intervals_depend_on_the_seed_alone_and_need_two_tasks():
    values = np.array([0.0, 1.0, 1.0, 0.0, 1.0])
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3, num_resamples=100) != bootstrap_interval(
        values, seed=4, num_resamples=100
    )
    assert bootstrap_interval(np.array([1.0])) is None
    assert bootstrap_interval(np.array([1.0, 1.0])) == (1.0, 1.0)
    low, high = bootstrap_interval(values, confidence=0.5)
    wide = bootstrap_interval(values)
    assert wide[0] < low < values.mean() < high < wide[1]


def test_success_is_a_mean_over_tasks():
    outcomes = [outcome(0, s) for s in (True, True, False, False)] + [outcome(1, s) for s in [False] * 4]
    metrics = summarize(outcomes, 4)
    assert metrics["success/avg@4"] == metrics["success/pass@1"] == 0.25
    assert metrics["success/pass@2"] == pytest.approx((1 - 1 / 6) / 2)
    assert metrics["success/pass@4"] == 0.5
    assert metrics["success/pass^2"] == pytest.approx(1 / 6 / 2)
    assert metrics["success/pass^4"] == 0.0
    assert 0 <= metrics["success/avg@4_low"] <= 0.25 <= metrics["success/avg@4_high"] <= 0.5
    assert "success/pass^1" not in metrics


def test_spoiled_episodes_are_left_out_and_counted():
    spoiled = [
        outcome(0, reward=None, stop_reason=StopReason.env_error),
        outcome(0, success=True, reward=None, stop_reason=StopReason.env_timeout),
    ]
    metrics = summarize([outcome(0, True, 1.0), outcome(0, False), *spoiled], 4)
    assert metrics["success/avg@4"] == 0.5
    assert metrics["success/pass@2"] == 1.0
    # two attempts say nothing about four
    assert "success/pass@4" not in metrics
    assert metrics["reward/avg"] == 0.5
    assert (metrics["episodes/valid"], metrics["episodes/quarantined"], metrics["episodes/tasks"]) == (2, 2, 1)
    assert metrics["stop_reason/env_error"] == metrics["stop_reason/env_timeout"] == 0.25


def test_categories_are_reported_one_by_one():
    outcomes = [outcome(0, True, 1.0, category="easy"), outcome(1, False, category="hard"), outcome(2, False)]
    # an episode that failed early does not know what the other of its task reported
    outcomes.append(outcome(1, None, None, StopReason.env_error))
    metrics = summarize(outcomes, 1)
    assert metrics["success/avg@1"] == pytest.approx(1 / 3)
    assert (metrics["success/easy/avg@1"], metrics["success/hard/avg@1"]) == (1, 0)
    assert (metrics["stop_reason/hard/completed"], metrics["stop_reason/hard/env_error"]) == (0.5, 0.5)
    assert metrics["episodes/hard/quarantined"] == 1


def test_few_categories_are_reported_those_that_came_first(caplog):
    outcomes = [outcome(group, category=f"kind {99 - group}") for group in range(50)]
    metrics = summarize(outcomes, 1)
    reported = {name.split("/")[1] for name in metrics if name.startswith("episodes/kind")}
    assert reported == {f"kind {99 - group}" for group in range(MOST_CATEGORIES)}
    assert metrics["episodes/tasks"] == 50
    assert "50 categories; the metrics of 18 of them are not reported, such as those of kind 67" in caplog.text


@pytest.mark.parametrize("value", [0.5, ["a"], {"a": 1}, True], ids=str)
def test_a_category_is_a_text_or_a_whole_number(value):
    def category(row, **info):
        one = describe_outcomes(
            [row],
            [Trajectory([], info=info)],
            torch.ones(1, 1),
            ["a"],
            torch.ones(1),
            [0.0],
            first_index=0,
            group_size=1,
        )
        return one[0].category

    assert category({"id": 7, "category": value}) is None
    assert category({"id": 7, "category": 3}) == "3"
    assert category({"id": 7}, category="a\ud83db") == "a?b"
    assert category({"id": 7, "category": "row"}, category=value) == "row"


def test_without_success_there_are_rewards_alone():
    metrics = summarize([outcome(i, reward=float(i)) for i in range(10)], 1)
    assert metrics["reward/avg"] == 4.5
    assert 2 < metrics["reward/avg_low"] < 4.5 < metrics["reward/avg_high"] < 7
    assert not any(name.startswith("success") for name in metrics)


def test_an_episode_that_ends_before_it_can_report_success_has_failed():
    metrics = summarize([outcome(0, True), outcome(0, None, stop_reason=StopReason.context_overflow)], 2)
    assert metrics["success/avg@2"] == 0.5


def test_a_category_that_reports_no_success_has_rewards_alone():
    math = [outcome(0, True, 1.0, category="math"), outcome(1, False, category="math")]
    chat = [outcome(2, reward=0.5, category="chat"), outcome(3, None, None, StopReason.env_error, category="chat")]
    cut = [outcome(4, stop_reason=StopReason.context_overflow, category="long")]
    metrics = summarize(math + chat + cut, 1)
    assert metrics["success/math/avg@1"] == metrics["reward/chat/avg"] == 0.5
    assert not any(name.startswith("success/chat/") for name in metrics)
    # nobody can say whether these would have reported it: they ended too early, and have failed
    assert metrics["success/long/avg@1"] == 0.0


def test_success_comes_from_the_environment_before_the_threshold():

    trajectories = [
        Trajectory([], info={"success": False, "category": "reported"}),
        Trajectory([]),
        Trajectory([]),
        Trajectory([]),
    ]
    rewards = torch.tensor([[1.0, 1.0], [0.5, 0.9], [0.0, 0.2], [torch.nan, torch.nan]])
    outcomes = describe_outcomes(
        [{"id": 7, "category": "row"}] * 4,
        trajectories,
        rewards,
        ["a", "b"],
        torch.tensor([0.0, 1.0]),
        [0.0] * 4,
        first_index=4,
        group_size=2,
        success_threshold=0.9,  # not a float32 number
    )
    assert [e.success for e in outcomes] == [False, True, False, None]
    assert [e.category for e in outcomes] == ["reported", "row", "row", "row"]
    assert [(e.index, e.group, e.task) for e in outcomes] == [(4, 2, "7"), (5, 2, "7"), (6, 3, "7"), (7, 3, "7")]
    assert outcomes[1].rewards == {"a": 0.5, "b": pytest.approx(0.9)}
    assert outcomes[3].reward is None


def test_a_task_without_id_is_known_by_all_columns_of_its_row():
    assert task_of({"prompt": "w1", "target": 2}) == task_of({"target": 2, "prompt": "w1"})
    different = [{"prompt": "w1"}, {"prompt": "w2"}, {"prompt": "w1", "target": 1}, {"prompt": "w1", "target": 2}]
    assert len({task_of(row) for row in different}) == 4


def test_a_task_is_known_by_the_contents_of_its_images():
    pillow = pytest.importorskip("PIL.Image")

    def row(colour, day=1):
        image = {"type": "image", "image": pillow.new("RGB", (4, 4), colour)}
        return {
            "prompt": [{"role": "user", "content": [image]}],
            "day": date(2026, 1, day),
            "x": np.ones(2000),
            "b": b"0",
        }

    assert task_of(row("red")) == task_of(row("red"))
    assert task_of({"x": (i for i in ())}) == task_of({"x": (i for i in ())})  # of which nothing is known
    assert len({task_of(row("red")), task_of(row("blue")), task_of(row("red", day=2))}) == 3


def test_rows_are_the_same_tasks_in_every_evaluation(tiny_dir, tmp_path):
    rows = Dataset.from_dict({"turns": [1, 1, 2], "target": [1, 2, 3]})  # no prompt: the environment brings it
    seen = []
    for name, batch_size in (("a", 2), ("b", 6)):
        options = {"per_device_eval_batch_size": batch_size, "success_threshold": 1.0}
        trainer = make_trainer(tiny_dir, tmp_path / name, options, environment_factory=CountDown)
        trainer.evaluate(rows)
        seen.append([outcome.task for outcome in trainer.last_evaluation])
    assert seen[0] == seen[1] and len(set(seen[0])) == 3


class Unshowable:
    def __str__(self):
        raise RuntimeError("no text")

    __repr__ = __str__


@pytest.mark.parametrize(
    "reported, success",
    [
        (np.array([True]), True),
        (np.bool_(False), False),
        (torch.tensor(1), True),
        (0.0, False),
        (np.array([True, True]), None),
        (math.nan, None),
        ("False", None),
        (Unshowable(), None),
    ],
    ids=range(8),
)
def test_success_is_a_boolean_or_a_number(reported, success):
    def described(**options):
        trajectory = Trajectory([], info={"success": reported, "category": Unshowable()})
        columns = [{"prompt": Unshowable()}], [trajectory], torch.ones(1, 1), ["a"], torch.ones(1), [0.0]
        (outcome,) = describe_outcomes(*columns, first_index=0, group_size=1, **options)
        return outcome

    assert described().success is success and described().category is None
    assert described(success_threshold=1.0).success is (True if success is None else success)


def test_a_success_that_says_nothing_is_warned_about(caplog):
    _warn_of_success.cache_clear()
    columns = [{}], [Trajectory([], info={"success": "yes"})], torch.ones(1, 1), ["a"], torch.ones(1), [0.0]
    for _ in range(2):
        describe_outcomes(*columns, first_index=0, group_size=1)
    assert caplog.text.count('`info["success"]` is a str that says neither yes nor no') == 1


def test_groups_must_fit_into_batches():
    with pytest.raises(ValueError, match="make it a multiple of `num_generations_eval`"):
        Evaluation(Dataset.from_dict({"prompt": ["w"]}), k=4, batch_size=3, num_processes=2, seed=0)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 7, 8, 9])
def test_rows_that_fill_the_last_batch_of_a_stream_are_found(num_rows):
    # what accelerate's shards of a stream yield on two processes with batches of two
    stream = [row for row in range(num_rows) for _ in range(2)]
    while len(stream) % 4:
        stream += stream[:4]
        stream = stream[: -(-num_rows * 2 // 4) * 4]
    evaluation = Evaluation(IterableDataset.from_generator(iter), k=2, batch_size=2, num_processes=2, seed=0)
    for start in range(0, len(stream), 4):
        evaluation._batches.append([outcome(group=row) for row in stream[start : start + 4]])
    assert [e.task for e in evaluation.outcomes()] == [str(row) for row in range(num_rows) for _ in range(2)]


@pytest.mark.parametrize("batch_size", [2, 8])
def test_every_episode_counts_once_whatever_the_batches(batch_size, tiny_dir, tmp_path):
    trainer = make_trainer(tiny_dir, tmp_path, {"per_device_eval_batch_size": batch_size})
    metrics = trainer.evaluate(tasks(5))
    # tasks 0 and 2 succeed twice, 1 and 3 once; 4 once, and its second attempt is spoiled
    assert metrics["eval_success/avg@2"] == pytest.approx(4 / 5)
    assert metrics["eval_success/pass@2"] == pytest.approx(4 / 4)
    assert metrics["eval_success/pass^2"] == pytest.approx(2 / 4)
    assert metrics["eval_success/even/avg@2"] == pytest.approx(1.0)
    assert metrics["eval_success/odd/avg@2"] == pytest.approx(0.5)
    assert metrics["eval_episodes/quarantined"] == 1
    assert metrics["eval_reward/avg"] == pytest.approx(4 / 5)
    assert metrics["eval_reward"] == pytest.approx(7 / 9)  # TRL's: over episodes
    assert metrics["eval_stop_reason/env_error"] == pytest.approx(0.1)
    assert trainer.state.log_history[-1]["eval_success/pass^2"] == metrics["eval_success/pass^2"]


def test_each_dataset_has_its_own_names(tiny_dir, tmp_path):
    trainer = make_trainer(tiny_dir, tmp_path, {}, eval_dataset={"a": tasks(2), "b": tasks(4)})
    metrics = trainer.evaluate()
    assert (metrics["eval_a_episodes/tasks"], metrics["eval_b_episodes/tasks"]) == (2, 4)
    assert "eval_b_success/odd/pass@2_low" in metrics
    assert "eval_success/avg@2" not in metrics


@pytest.mark.parametrize("fails", [False, True], ids=["predict", "failed"])
def test_an_evaluation_reports_nothing_of_what_was_played_before(fails, tiny_dir, tmp_path):
    batches = []

    def reward(completions, log_metric, **columns):
        batches.append(None)
        log_metric("number", float(len(batches)))
        return [math.inf if fails and len(batches) == 2 else 0.0] * len(completions)

    trainer = make_trainer(tiny_dir, tmp_path, {}, reward_funcs=reward, eval_dataset={"a": tasks(2), "b": tasks(2)})
    with pytest.raises(ValueError, match="infinite") if fails else nullcontext():
        trainer.predict(tasks(4))
    assert len(batches) == 2
    trainer.evaluate()
    assert [log["eval_number"] for log in trainer.state.log_history if "eval_number" in log] == [3.0, 4.0]


def test_what_a_script_logs_between_evaluations_is_logged(tiny_dir, tmp_path):
    class Logging(SeeUPOTrainer):
        def evaluate(self, *args, **kwargs):
            self._metrics["eval"]["bank"].append(5.0)
            return super().evaluate(*args, **kwargs)

    class Memory(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer._log_metric("memory", float(state.global_step))

    options = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1}
    given = {"trainer_class": Logging, "eval_dataset": tasks(2), "callbacks": [Memory()]}
    trainer = make_trainer(tiny_dir, tmp_path, options, **given)
    trainer.train()
    logs = trainer.state.log_history
    assert [log["eval_bank"] for log in logs if "eval_bank" in log] == [5.0]
    # what is pending belongs to the batch that is played next, as in GRPO
    assert [log[name] for log in logs for name in ("memory", "eval_memory") if name in log] == [1.0, 2.0]


def test_a_prediction_in_a_callback_leaves_the_iteration_its_metrics(tiny_dir, tmp_path):
    class Predicting(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.predict(tasks(2))

    trainer = make_trainer(tiny_dir, tmp_path, {"max_steps": 2, "logging_steps": 1}, callbacks=[Predicting()])
    trainer.train()
    assert [("reward" in log, "eval_reward" in log) for log in trainer.state.log_history[:2]] == [(True, False)] * 2


def test_the_best_model_may_be_chosen_by_success(tiny_dir, tmp_path):
    options = {"metric_for_best_model": "eval_success/avg@2", "eval_strategy": "steps", "eval_steps": 1}
    options |= {"save_strategy": "best", "max_steps": 1, "save_total_limit": 1}
    trainer = make_trainer(tiny_dir, tmp_path, options, eval_dataset=tasks(2))
    trainer.train()
    values = [log["eval_success/avg@2"] for log in trainer.state.log_history if "eval_success/avg@2" in log]
    assert values == [trainer.state.best_metric]


def test_threshold_gives_success_to_environments_that_report_none(tiny_dir, tmp_path):
    rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": "w0"}]] * 2, "turns": [1, 2]})
    options = {"success_threshold": 0.5}
    trainer = make_trainer(tiny_dir, tmp_path, options, environment_factory=CountDown)
    assert trainer.evaluate(rows)["eval_success/avg@2"] == 1.0
    trainer = make_trainer(tiny_dir, tmp_path, {}, environment_factory=CountDown)
    metrics = trainer.evaluate(rows)
    assert metrics["eval_reward/avg"] >= 1.0
    assert not any("success" in name for name in metrics)


def test_example_evaluates_categories_and_says_how_to_look(tiny_dir, tmp_path, monkeypatch, capsys):
    pytest.importorskip("bfcl_eval", reason="bfcl-eval is installed without its dependencies, see the README")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    import evaluate_bfcl
    from trl import ModelConfig, TrlParser

    model = save_tiny_model(tmp_path / "model", max_position_embeddings=4096)
    options = {"model_name_or_path": model, "output_dir": str(tmp_path / "out"), "num_tasks": 2}
    options |= {"num_generations_eval": 2, "per_device_eval_batch_size": 8, "max_completion_length": 8, "bf16": False}
    command = [
        "--config",
        str(evaluate_bfcl.DEMONSTRATION),
        "--categories",
        "multi_turn_base",
        "multi_turn_miss_param",
    ]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    parser = TrlParser((evaluate_bfcl.EvaluationArguments, evaluate_bfcl.Config, ModelConfig))
    metrics = evaluate_bfcl.main(*parser.parse_args_and_config(command))
    assert metrics["eval_success/multi_turn_miss_param/pass@2"] == 0
    assert (metrics["eval_episodes/valid"], metrics["eval_episodes/tasks"]) == (8, 4)
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text())["eval_success/pass^2"] == 0
    rows = read_trajectories(tmp_path / "out").to_pylist()
    assert {row["task"] for row in rows} == {f"multi_turn_{c}_{i}" for c in ("base", "miss_param") for i in (100, 150)}
    lines = capsys.readouterr().out.splitlines()
    header = next(line for line in lines if "pass^2" in line)
    assert header.split() == ["avg@2", "pass@2", "pass^2", "tasks", "spoiled", "episodes"]
    row = next(line for line in lines if line.startswith("multi_turn_base"))
    assert row.split()[1:] == ["0.000", "[0.000,", "0.000]"] * 3 + ["2", "0"]
    assert any("python -m seeupo_trl.view" in line for line in lines)


@pytest.mark.slow
def test_two_processes_report_what_one_reports(tiny_dir, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = evaluate_and_train(tiny_dir, tmp_path / "one")
    results = run_on_two_processes("evaluation_run.py", tmp_path / "two", tiny_dir)
    for two in results:
        # sizes 1, 3 and 5 on batches of two groups, a stream of 3, and an iteration of training
        assert two["trajectories"] == one["trajectories"]
        for name, value in one["metrics"].items():
            if not name.endswith(("_loss", "runtime", "per_second", "preparation_time")):
                assert two["metrics"][name] == pytest.approx(value), name
    sizes = {split: len(outcomes) for split, outcomes in one["trajectories"].items()}
    assert sizes == {"eval_1": 2, "eval_3": 6, "eval_5": 10, "eval_stream": 6, "train": 4}
    assert {"eval_1_success/avg@2", "eval_5_success/odd/pass^2_low"} <= one["metrics"].keys()
