"""The curves of a run: which numbers they show, from which files, and what they leave out."""

import json
import math

import pyarrow.parquet as pq
import pytest
from evaluation_run import make_trainer, tasks
from viewed_run import page_data, render, save, save_state

from seeupo_trl.view.run import read_run


def charts_of(run_dir, **selection):
    return {chart.title: chart for chart in read_run(run_dir, **selection).charts}


def curves_of(run_dir, title):
    return {series.name: dict(zip(series.x, series.y, strict=True)) for series in charts_of(run_dir)[title].series}


def test_rewards_are_means_over_groups_with_their_worst_and_best_episodes(tmp_path):
    # the second group has one episode more, and one that the environment spoiled
    rewards = [(0, 0.0), (0, 1.0), (1, 0.2), (1, 0.4), (1, 0.6)]
    episodes = [{"group": group, "reward": reward} for group, reward in rewards]
    spoiled = {"group": 1, "reward": 9.0, "stop_reason": "env_error"}
    unscored = {"group": 2, "reward": None}
    save(tmp_path, "train", 1, [*episodes, spoiled, unscored])
    save(tmp_path, "train", 2, [{"reward": 0.25}])
    save(tmp_path, "eval", 1, [{"reward": -1.0}])
    train, evaluated = charts_of(tmp_path)["Reward"].series
    assert (train.name, train.x, train.y) == ("train", [1, 2], [pytest.approx(0.45), 0.25])
    assert (train.low, train.high) == ([pytest.approx(0.1), 0.25], [pytest.approx(0.8), 0.25])
    assert (evaluated.name, evaluated.x, evaluated.y) == ("eval", [1], [-1.0])


def test_groups_of_two_evaluations_after_one_iteration_stay_apart(tmp_path):
    first = save(tmp_path, "eval", 3, [{"reward": 0.0}, {"reward": 0.2}])
    kept = pq.read_table(first)
    save(tmp_path, "eval", 3, [{"reward": 1.0}])
    pq.write_table(kept, first.with_name("iteration-000003-2.parquet"))
    (series,) = charts_of(tmp_path)["Reward"].series
    assert (series.y, series.low, series.high) == ([0.55], [0.5], [0.6])


def test_success_is_a_share_of_the_episodes_that_count(tmp_path):
    solved, failed, silent = ({"success": success} for success in (True, False, None))
    save(tmp_path, "train", 1, [solved, failed, silent, {"stop_reason": "env_timeout"}])
    save(tmp_path, "train", 2, [silent])  # nobody said anything
    save(tmp_path, "eval", 2, [{**solved, "group": 0}, {**failed, "group": 1}, {**failed, "group": 1}])
    assert curves_of(tmp_path, "Success") == {"train": {1: pytest.approx(1 / 3, abs=1e-5)}, "eval": {2: 0.5}}


def test_turns_and_stop_reasons_count_every_episode(tmp_path):
    save(tmp_path, "train", 1, [{"turns": 1}, {"turns": 4}, {"turns": 0, "stop_reason": "env_error"}])
    save(tmp_path, "train", 2, [{"turns": 2, "stop_reason": "max_turns"}])
    (series,) = charts_of(tmp_path)["Turns"].series
    assert (series.y, series.low, series.high) == ([pytest.approx(5 / 3, abs=1e-4), 2], [0, 2], [4, 2])
    shares = curves_of(tmp_path, "Stop reasons")
    assert shares["completed"] == {1: pytest.approx(2 / 3, abs=1e-5), 2: 0}
    assert shares["max_turns"] == {1: 0, 2: 1}


def test_stop_reasons_of_every_split_have_the_same_order_and_the_rarest_count_as_one(tmp_path):
    save(tmp_path, "train", 1, [{"stop_reason": f"reason {n}"} for n in range(9) for _ in range(10 - n)])
    save(tmp_path, "eval", 1, [{"stop_reason": "reason 8"}, {"stop_reason": None}])
    charts = charts_of(tmp_path)
    train, evaluated = charts["Stop reasons, train"], charts["Stop reasons, eval"]
    names = [*(f"reason {n}" for n in range(6)), "3 others"]
    assert [series.name for series in train.series] == [series.name for series in evaluated.series] == names
    assert [series.y for series in evaluated.series] == [[0.0]] * 6 + [[1.0]]
    assert sum(series.y[0] for series in train.series) == pytest.approx(1, abs=1e-4)


def test_ratio_and_weight_are_means_by_turn_over_what_was_trained_on(tmp_path):
    save(
        tmp_path,
        "train",
        1,
        [
            {"updates": [(1.0, 1.5), (2.0, 1.0)]},
            {"updates": [(1.5, 0.5)]},
            {"turns": 2},
            {"updates": [(math.inf, 1.0)]},
        ],
    )
    save(tmp_path, "train", 2, [{"updates": [(0.5, 1.0)]}])
    save(tmp_path, "eval", 2, [{"turns": 2}])
    assert curves_of(tmp_path, "Ratio by turn") == {"turn 1": {1: 1.25, 2: 0.5}, "turn 2": {1: 2.0}}
    assert curves_of(tmp_path, "M / A by turn") == {"turn 1": {1: 1.0, 2: 1.0}, "turn 2": {1: 1.0}}


def test_many_turns_share_curves(tmp_path):
    save(tmp_path, "train", 1, [{"updates": [(float(turn), 1.0) for turn in range(1, 21)]}])
    curves = curves_of(tmp_path, "Ratio by turn")
    assert list(curves) == [
        "turns 1-3",
        "turns 4-6",
        "turns 7-9",
        "turns 10-12",
        "turns 13-15",
        "turns 16-18",
        "turns 19-20",
    ]
    assert [curve[1] for curve in curves.values()] == [2, 5, 8, 11, 14, 17, 19.5]


def test_entropy_and_seconds_come_from_the_state_that_reaches_farthest(tmp_path):
    save(tmp_path, "train", 1, [{}])
    save(tmp_path, "eval_doors", 2, [{}])
    times = {"time/rollout": 3.0, "time/update": 2.0}
    history = [
        {"step": 1, "entropy": 0.5, **times, "reward": 7},
        {"step": 2, "entropy": 0.25, **times},
        {"step": 2, "eval_entropy": 0.75, "eval_doors_loss": 1, "eval_doors_runtime": 2.0},
        {"step": 2, "train_runtime": 9.0},
    ]
    save_state(tmp_path / "checkpoint-1", history[:1])
    save_state(tmp_path / "checkpoint-2", history)
    save_state(tmp_path / "checkpoint-10-old", [{"step": 99, "entropy": 1.0}])
    save_state(tmp_path, history[:1])
    for place in (tmp_path, tmp_path / "trajectories", next(tmp_path.glob("trajectories/eval_doors/*"))):
        curves = {chart.title: chart for chart in read_run(place).charts}
        entropy = {series.name: (series.x, series.y) for series in curves["Entropy"].series}
        assert entropy["eval_doors"] == ([2], [0.75])
    assert curves_of(tmp_path, "Entropy")["train"] == {1: 0.5, 2: 0.25}
    assert curves_of(tmp_path, "Seconds") == {"rollout": {1: 3, 2: 3}, "update": {1: 2, 2: 2}}


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"log_history": {}}', "[" * 100_000, '{"log_history": ' + "9" * 5000 + "}"],
    ids=["empty", "half", "list", "null", "dictionary", "deep", "long number"],
)
def test_a_broken_state_is_named_and_an_older_one_shown(content, tmp_path):
    save(tmp_path, "train", 1, [{}])
    save_state(tmp_path / "checkpoint-20", content)
    run = read_run(tmp_path)
    assert any("checkpoint-20/trainer_state.json cannot be read" in notice for notice in run.notices)
    assert any("Entropy and seconds are left out" in notice for notice in run.notices)
    save_state(tmp_path / "checkpoint-3", [{"step": 1, "entropy": 0.5}])
    run = read_run(tmp_path)
    assert any("checkpoint-20/trainer_state.json cannot be read" in notice for notice in run.notices)
    assert "Entropy" in [chart.title for chart in run.charts]
    page_data(render(tmp_path, tmp_path / "page.html").read_text())


def test_values_that_are_no_numbers_are_left_out_and_counted(tmp_path):
    save(tmp_path, "train", 1, [{"reward": math.nan}, {"reward": 0.5}])
    text = """{"log_history": [
        {"step": 1, "entropy": NaN}, {"step": 2, "entropy": Infinity}, {"step": 3, "entropy": "</script>"},
        {"step": 4, "entropy": null}, {"step": "5", "entropy": 1}, {"step": 6.5, "entropy": 1}, {"entropy": 1},
        {"step": true, "entropy": 1}, {"step": 8, "entropy": [1]}, {"step": 1e300, "entropy": 1}, 7,
        {"step": 9, "entropy": true}, {"step": 10, "entropy": LONG}, {"step": 11, "entropy": 0.5}, {"step": 12}
    ]}"""
    save_state(tmp_path, text.replace("LONG", "9" * 400))
    run = read_run(tmp_path)
    assert "trainer_state.json: 12 values are no finite numbers of a step and left out." in run.notices
    assert curves_of(tmp_path, "Entropy") == {"train": {11: 0.5}}
    assert curves_of(tmp_path, "Reward") == {"train": {1: 0.5}}
    json.dumps(page_data(render(tmp_path, tmp_path / "page.html").read_text()), allow_nan=False)


def test_what_a_run_does_not_have_is_said(tmp_path):
    save(tmp_path, "train", 1, [{"stop_reason": None, "reward": None}])
    save_state(tmp_path, [{"step": 1, "loss": 0.5}])
    run = read_run(tmp_path)
    assert [chart.title for chart in run.charts] == ["Turns"]
    missing = "Reward, Success, Stop reasons, Ratio by turn, M / A by turn, Entropy, Seconds"
    assert run.notices == [f"Left out, as the run has no such values: {missing}."]


def test_curves_show_all_iterations_and_the_list_the_chosen_ones(tmp_path):
    for iteration in range(1, 11):
        save(tmp_path, "train", iteration, [{"reward": float(iteration)}] * 3)
    save(tmp_path, "eval", 10, [{}])
    run = read_run(tmp_path, splits=["train"], max_trajectories=4)
    assert [series.name for series in run.charts[0].series] == ["train"]
    assert run.charts[0].series[0].x == list(range(1, 11))
    assert run.rows["iteration"].to_pylist() == [10, 10, 10, 9]
    assert run.left_out == 26
    run = read_run(tmp_path, iterations=[2, 10**30])
    assert run.charts[0].series[0].x == list(range(1, 11))
    assert run.rows["iteration"].to_pylist() == [2, 2, 2]
    with pytest.raises(ValueError, match="is of any split and iteration 11"):
        read_run(tmp_path, iterations=[11])


def test_files_whose_episodes_are_not_listed_are_not_read_whole(tmp_path, monkeypatch):
    for iteration in range(1, 5):
        save(tmp_path, "train", iteration, [{}] * 2)
    read = []
    reads = pq.read_table
    monkeypatch.setattr(pq, "read_table", lambda path, **kwargs: read.append((path, kwargs)) or reads(path, **kwargs))
    read_run(tmp_path, max_trajectories=2)
    assert [path.name for path, kwargs in read if kwargs["columns"] is None] == ["iteration-000004.parquet"]
    assert all("context_text" not in (kwargs["columns"] or []) for _, kwargs in read)


def test_a_file_of_something_else_is_named(tmp_path):
    path = save(tmp_path, "train", 1, [{}])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"iteration-000001\.parquet cannot be read as saved trajectories"):
        read_run(tmp_path)


def test_curves_of_a_real_run_are_what_its_trainer_logged(tiny_dir, tmp_path):
    options = {"save_trajectories": True, "max_steps": 3, "per_device_train_batch_size": 8, "num_generations": 4}
    options |= {"learning_rate": 0.05, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    trainer = make_trainer(tiny_dir, tmp_path, {**options, "save_steps": 3}, eval_dataset={"x": tasks(3)})
    trainer.train()
    logged = {}
    for entry in trainer.state.log_history:
        for name, value in entry.items():
            logged.setdefault(name, {})[entry["step"]] = value

    def agree(curve, metric):
        assert curve == {step: pytest.approx(value, rel=1e-3) for step, value in logged[metric].items()}
        assert set(curve) <= {1, 2, 3}

    agree(curves_of(tmp_path, "Reward")["train"], "reward")
    agree(curves_of(tmp_path, "Reward")["eval_x"], "eval_x_reward/avg")
    agree(curves_of(tmp_path, "Success")["eval_x"], "eval_x_success/avg@2")
    agree(curves_of(tmp_path, "Turns")["train"], "turns/mean")
    agree(curves_of(tmp_path, "Stop reasons, train")["completed"], "stop_reason/completed")
    agree(curves_of(tmp_path, "Ratio by turn")["turn 1"], "turn_1/ratio_mean")
    agree(curves_of(tmp_path, "M / A by turn")["turn 1"], "turn_1/weight_mean")
    agree(curves_of(tmp_path, "Entropy")["train"], "entropy")
    agree(curves_of(tmp_path, "Entropy")["eval_x"], "eval_entropy")
    for name, metric in {"rollout": "rollout", "passes before the update": "old_pass", "update": "update"}.items():
        agree(curves_of(tmp_path, "Seconds")[name], f"time/{metric}")
    assert read_run(tmp_path).notices == []
