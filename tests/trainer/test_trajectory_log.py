"""Saved trajectories hold every token once, are whole or absent, and are read back exactly."""

import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from evaluation_run import make_trainer, tasks
from saved_trajectories import WORDS, make_log, outcome
from tiny import tiny_tokenizer

from seeupo_trl import Trajectory, Turn
from seeupo_trl.envs import StopReason
from seeupo_trl.trajectory_log import SCHEMA, TrajectoryLog, find_files, read_trajectories, restore_turns
from seeupo_trl.trajectory_rows import messages_by_turn, to_json
from seeupo_trl.update.turn_updater import TurnUpdater


@pytest.mark.parametrize("history", ["append", "rewritten", "unrelated"])
def test_turns_are_restored_exactly_and_stored_once(history, tmp_path):
    rng = np.random.default_rng(0)

    def draw(count):
        return rng.choice(WORDS, count).tolist()

    prompt, turns = draw(200), []
    context = list(prompt)
    for _ in range(12):
        action = draw(20)
        turns.append(Turn(list(context), action, [-1.0] * 20))
        if history == "append":
            context += action + draw(5)
        elif history == "rewritten":  # reasoning, the first half of an action, is stripped later
            context += action[10:] + draw(5)
        else:
            context = draw(50)
    log = TrajectoryLog(tmp_path, tiny_tokenizer())
    log.add([outcome(turns=12)], [Trajectory(turns)])
    log.write("train", 1)
    rows = read_trajectories(tmp_path).to_pylist()
    assert restore_turns(rows) == turns
    stored = sum(len(row["context_ids"]) for row in rows)
    assert stored == {"append": 200 + 11 * 5, "rewritten": 200 + 11 * 15, "unrelated": 200 + 11 * 50}[history]


def test_rewards_of_turns_are_kept_and_files_without_them_can_be_read(tmp_path):
    log = TrajectoryLog(tmp_path, tiny_tokenizer())
    turns = [Turn(WORDS[:1], WORDS[1:2], reward=0.5), Turn(WORDS[:3], WORDS[3:4])]
    log.add([outcome(turns=2)], [Trajectory(turns)])
    path = log.write("train", 1)
    rows = read_trajectories(tmp_path).to_pylist()
    assert [row["turn_reward"] for row in rows] == [0.5, None] and restore_turns(rows) == turns
    pq.write_table(pq.read_table(path).drop_columns(["turn_reward"]), path)
    rows = read_trajectories(tmp_path).to_pylist()
    assert [row["turn_reward"] for row in rows] == [None, None]
    assert [turn.action_ids for turn in restore_turns(rows)] == [WORDS[1:2], WORDS[3:4]]


def test_text_columns_are_what_the_tokens_say(tmp_path):
    messages = [
        {"role": "assistant", "content": "w2", "reasoning_content": "w1", "tool_calls": [{"function": {"name": "f"}}]},
        {"role": "tool", "content": "w3"},
        {"role": "user", "content": "w4"},
        {"role": "assistant", "content": "w5"},
    ]
    turns = [Turn(WORDS[:2], WORDS[2:4]), Turn(WORDS[:6], WORDS[6:7])]
    log = TrajectoryLog(tmp_path, tiny_tokenizer())
    log.add([outcome(turns=2)], [Trajectory(turns, messages=messages, info={"a": 1})])
    log.write("train", 1)
    first, second = read_trajectories(tmp_path).to_pylist()
    assert (first["context_text"], first["action_text"]) == ("w0 w1", "w2 w3")
    assert (second["context_kept"], second["context_text"]) == (4, "w4 w5")
    assert (first["reasoning"], first["content"]) == ("w1", "w2")
    assert json.loads(first["tool_calls"]) == [{"function": {"name": "f"}}]
    assert json.loads(first["observations"]) == messages[1:3]
    assert (second["tool_calls"], second["observations"], second["reasoning"]) == (None, "[]", None)
    assert json.loads(first["info"]) == {"a": 1}


def test_messages_that_do_not_fit_the_turns_are_left_out():
    turn = Turn([1], [2])
    answer = {"role": "assistant", "content": ""}
    assert messages_by_turn(Trajectory([turn])) is None
    assert messages_by_turn(Trajectory([turn], messages=[answer, answer])) is None
    assert messages_by_turn(Trajectory([turn], messages=[answer])) == [(answer, [])]


def test_anything_an_environment_reports_can_be_written():
    cyclic = {}
    cyclic["self"] = cyclic
    values = [math.nan, math.inf, np.float32(0.5), np.int64(3), "\ud800", {1: {2}}, (1, 2), b"x", cyclic, 10**5000]
    values.append({"tensor": torch.ones(2), "reason": StopReason.completed, "big": 12345678901234567890})
    loaded = json.loads(to_json(values[:9] + values[10:]))
    assert loaded[:5] == ["nan", "inf", 0.5, 3, "\ud800"]
    assert loaded[5:8] == [{"1": "{2}"}, [1, 2], "b'x'"]
    assert loaded[-1]["big"] == 12345678901234567890
    assert loaded[-1]["reason"] == "completed"
    assert json.loads(to_json(values[9])).startswith("an integer of ")

    class Unshowable:
        def __str__(self):
            raise RuntimeError("no text")

    assert json.loads(to_json({"x": Unshowable(), Unshowable(): 1})) == {
        "x": "Unshowable without text",
        "Unshowable without text": 1,
    }


def test_lone_surrogates_become_replacement_characters(tmp_path):
    log = TrajectoryLog(tmp_path, tiny_tokenizer())
    message = {"role": "assistant", "content": "a\ud800b"}
    log.add([outcome(turns=1, task="\udfff")], [Trajectory([Turn([1], [2])], messages=[message])])
    log.write("train", 1)
    (row,) = read_trajectories(tmp_path).to_pylist()
    assert (row["task"], row["content"]) == ("\ufffd", "a\ufffdb")


def test_no_half_written_file_is_ever_seen(tmp_path, monkeypatch):
    make_log(tmp_path, 1, 1)
    before = read_trajectories(tmp_path)
    seen = []
    write_table = pq.write_table

    def killed(table, path, **kwargs):
        write_table(table, path, **kwargs)
        with open(path, "r+b") as file:
            file.truncate(100)
        seen.extend(find_files(tmp_path))
        raise KeyboardInterrupt

    monkeypatch.setattr(pq, "write_table", killed)
    with pytest.raises(KeyboardInterrupt):
        make_log(tmp_path, 2, 2)
    assert seen == [tmp_path / "trajectories" / "train" / "iteration-000001.parquet"]
    assert read_trajectories(tmp_path).equals(before)


def test_a_run_that_is_repeated_replaces_its_files(tmp_path):
    def write(num_processes, splits=("eval",)):
        logs = [TrajectoryLog(tmp_path, tiny_tokenizer(), i, num_processes) for i in range(num_processes)]
        for split in splits:
            for process, log in enumerate(logs):
                log.add([outcome(process, turns=1)], [Trajectory([Turn([1], [2])])])
                log.write(split, 3)
        return sorted(path.name for path in find_files(tmp_path))

    assert write(1) == ["iteration-000003.parquet"]
    assert write(2) == [f"iteration-000003.process-{i}-of-2.parquet" for i in range(2)]
    assert write(2, ("eval", "eval"))[:2] == [f"iteration-000003-2.process-{i}-of-2.parquet" for i in range(2)]
    assert read_trajectories(tmp_path)["trajectory"].to_pylist() == [0, 1, 0, 1]
    assert write(1) == ["iteration-000003.parquet"]


def test_a_file_that_appears_while_stale_ones_are_looked_for_stays(monkeypatch, tmp_path):
    """The first process tidies up while the second writes."""
    first, second = (TrajectoryLog(tmp_path, tiny_tokenizer(), process, 2) for process in range(2))
    for log in (first, second):
        log.add([outcome(0, turns=1)], [Trajectory([Turn([1], [2])])])
    glob, written = type(tmp_path).glob, []

    def slow_glob(directory, pattern):
        yield from glob(directory, pattern)
        if not written:
            written.append(second.write("eval", 3))

    monkeypatch.setattr(type(tmp_path), "glob", slow_glob)
    written.append(first.write("eval", 3))
    monkeypatch.undo()
    assert len(written) == 2 and sorted(find_files(tmp_path)) == sorted(written)


def test_an_iteration_that_is_played_again_leaves_one_file_and_those_of_its_evaluations(tmp_path):
    log = TrajectoryLog(tmp_path, tiny_tokenizer())

    def write(split, iteration, group):
        log.add([outcome(group, turns=1)], [Trajectory([Turn([1], [2])])])
        log.write(split, iteration)

    write("eval", 0, 0)
    for group, iterations in enumerate([(1, 2, 3), (2, 3)]):  # the second time from a checkpoint, in one process
        for iteration in iterations:
            write("train", iteration, group)
            write("eval", iteration, group)
    write("eval", 3, 1)  # once more, on purpose
    files = sorted(str(path.relative_to(tmp_path / "trajectories")) for path in find_files(tmp_path))
    played = [f"iteration-00000{number}" for number in (1, 2, 3)]
    evaluated = ["iteration-000000", "iteration-000001", "iteration-000002", "iteration-000003-2", "iteration-000003"]
    assert files == [f"{s}/{n}.parquet" for s, names in (("eval", evaluated), ("train", played)) for n in names]
    rows = read_trajectories(tmp_path).to_pylist()
    assert {row["iteration"] for row in rows if row["trajectory"] == 1} == {2, 3}
    assert {row["iteration"] for row in rows if row["trajectory"] == 0} == {0, 1}


def test_a_run_that_begins_anew_removes_the_later_iterations_of_an_older_one(tmp_path):
    def play(num_iterations, group):
        log = TrajectoryLog(tmp_path, tiny_tokenizer())
        for iteration in range(num_iterations + 1):
            for split in ("train", "eval") if iteration else ("eval",):
                log.add([outcome(group, turns=1)], [Trajectory([Turn([1], [2])])])
                log.write(split, iteration)

    play(4, group=0)
    log = TrajectoryLog(tmp_path, tiny_tokenizer())
    log.write("eval", 0)  # the trained model is evaluated: nothing begins
    assert len(find_files(tmp_path)) == 9
    log.write("train", 5)  # or trained further
    assert len(find_files(tmp_path)) == 10
    play(2, group=1)
    rows = read_trajectories(tmp_path).to_pylist()
    assert {(row["split"], row["iteration"], row["trajectory"]) for row in rows} == {
        (split, iteration, 1)
        for split in ("train", "eval")
        for iteration in (0, 1, 2)
        if (split, iteration) != ("train", 0)
    }


def test_evaluating_as_train_leaves_what_was_trained_on(tiny_dir, tmp_path):
    trainer = make_trainer(tiny_dir, tmp_path, {"save_trajectories": True})
    trainer.train()
    trained = [path.read_bytes() for path in find_files(tmp_path)]
    assert "train_reward/avg" in trainer.evaluate(tasks(3), metric_key_prefix="train")
    evaluated, *rest = find_files(tmp_path)
    assert [path.read_bytes() for path in rest] == trained
    assert set(read_trajectories(evaluated)["split"].to_pylist()) == {"eval-train"}


@pytest.mark.parametrize("split", ["../../evil", "..", "a/b", "eval_x y", "."])
def test_no_split_leaves_the_directory(split, tmp_path):
    log = TrajectoryLog(tmp_path / "run", tiny_tokenizer())
    log.add([outcome()], [Trajectory([])])
    path = log.write(split, 0)
    assert path.parent.parent == log.directory
    assert find_files(tmp_path / "run") == [path]
    assert read_trajectories(path)["split"].to_pylist() == [split]


def test_missing_trajectories_are_an_error_that_helps(tmp_path):
    with pytest.raises(FileNotFoundError, match="save_trajectories=True"):
        read_trajectories(tmp_path)


def test_trainer_saves_what_it_trained_on(tiny_dir, tmp_path, monkeypatch):
    options = {"save_trajectories": True, "max_steps": 2, "per_device_train_batch_size": 8, "num_generations": 4}
    options |= {"num_generations_eval": 2, "learning_rate": 0.05, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(tiny_dir, tmp_path, options, eval_dataset={"x": tasks(3)})
    played = []
    logs = TurnUpdater.logs

    def watched(updater):
        played.append((trainer._batch.trajectories, updater))
        return logs(updater)

    monkeypatch.setattr(TurnUpdater, "logs", watched)
    trainer.train()

    table = read_trajectories(tmp_path)
    assert table.schema.equals(SCHEMA)
    rows = table.to_pylist()
    assert {(row["split"], row["iteration"]) for row in rows} == {(s, i) for s in ("train", "eval_x") for i in (1, 2)}
    for iteration, (trajectories, updater) in enumerate(played, start=1):
        saved = [row for row in rows if (row["split"], row["iteration"]) == ("train", iteration)]
        for index, trajectory in enumerate(trajectories):
            mine = [row for row in saved if row["trajectory"] == index]
            assert restore_turns(mine) == trajectory.turns
            assert len({row["reward"] for row in mine}) == 1
            for row in mine:
                assert row["group"] == index // 4
                assert row["advantage"] == updater.weights.advantages[index]
                assert row["success"] == trajectory.info["success"]
                update = updater.record.turns.get((index, row["turn"]))
                assert (row["ratio"] is None) == (update is None) == (row["advantage"] == 0)
                if update is not None:
                    assert row["turn_weight"] == pytest.approx(row["advantage"] * row["relative_turn_weight"])
        trained = [row for row in saved if row["ratio"] is not None]
        assert trained
        for block in updater.plan.blocks:
            last = [row for row in trained if row["turn"] == block.first]
            logged = trainer.state.log_history
            log = next(entry for entry in logged if entry["step"] == iteration and f"turn_{block.label}/pool" in entry)
            mean = sum(row["ratio"] for row in last) / len(last)
            assert mean == pytest.approx(log[f"turn_{block.label}/ratio_mean"], rel=1e-5)
            mean = sum(row["relative_turn_weight"] for row in last) / len(last)
            assert mean == pytest.approx(log[f"turn_{block.label}/weight_mean"], rel=1e-5)
    assert all(row["ratio"] is None for row in rows if row["split"] == "eval_x")
    dataset = load_dataset("parquet", data_files=str(tmp_path / "trajectories/*/*.parquet"), cache_dir=str(tmp_path))
    assert len(dataset["train"]) == len(rows)


def test_an_evaluation_that_fails_leaves_nothing_behind(tiny_dir, tmp_path):
    trainer = make_trainer(tiny_dir, tmp_path, {"save_trajectories": True, "per_device_eval_batch_size": 2})
    step, calls = trainer.prediction_step, []

    def fail_at_the_second_batch(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    trainer.prediction_step = fail_at_the_second_batch
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate(tasks(3))
    trainer.prediction_step = step
    trainer.train()
    assert set(read_trajectories(tmp_path)["split"].to_pylist()) == {"train"}
    assert len(set(read_trajectories(tmp_path)["trajectory"].to_pylist())) == 2


def test_rollout_function_of_trl_is_saved_with_its_messages(tiny_dir, tmp_path):
    from seeupo_trl import SeeUPOConfig, SeeUPOTrainer

    def rollout(prompts, trainer):
        ids = [[5, 6]] * len(prompts)
        return {"prompt_ids": ids, "completion_ids": [[7, 8, 9]] * len(prompts), "logprobs": None}

    trainer = SeeUPOTrainer(
        model=tiny_dir,
        args=SeeUPOConfig(
            output_dir=str(tmp_path), save_trajectories=True, num_generations=2, per_device_train_batch_size=2,
            max_steps=1, use_cpu=True, bf16=False, report_to="none", save_strategy="no",
        ),
        reward_funcs=lambda completions, **kwargs: [0.0, 1.0],
        train_dataset=tasks(2),
        rollout_func=rollout,
    )  # fmt: skip
    trainer.train()
    rows = read_trajectories(tmp_path).to_pylist()
    assert [row["action_ids"] for row in rows] == [[7, 8, 9]] * 2
    assert [row["content"] is None for row in rows] == [False] * 2
    assert [row["ratio"] for row in rows] == pytest.approx([1.0, 1.0])
