"""Bad input gets a clear error or the right result, never a wrong or half-done update."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset
from two_groups import make_trainer, parameters, rewards, rollout

from seeupo_trl import Trajectory, Turn
from seeupo_trl.trajectory_log import find_files, read_rows


READS_LOGPROBS = {"off_policy_mask_threshold": 0.5}


def assert_nothing_moves(trainer):
    before = parameters(trainer)
    trainer.train()
    assert torch.equal(parameters(trainer), before)
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("rows", [0, 1])
def test_dataset_too_small_for_one_iteration(rows, tiny_dir, tmp_path):
    dataset = Dataset.from_dict({"prompt": ["w1"] * rows})
    with pytest.raises(ValueError, match=f"has {rows} rows, but one iteration takes 2 prompts"):
        make_trainer(tiny_dir, tmp_path, train_dataset=dataset).train()


def test_no_reward_source(tiny_dir, tmp_path):
    with pytest.raises(ValueError, match="No reward source"):
        make_trainer(tiny_dir, tmp_path, reward_funcs=None)


def test_all_rewards_none_changes_nothing(tiny_dir, tmp_path):
    trainer = make_trainer(tiny_dir, tmp_path, reward_funcs=lambda prompts, **kwargs: [None] * len(prompts))
    assert_nothing_moves(trainer)


def test_all_rewards_nan_changes_nothing(tiny_dir, tmp_path):
    trainer = make_trainer(tiny_dir, tmp_path, reward_funcs=lambda prompts, **kwargs: [math.nan] * len(prompts))
    assert_nothing_moves(trainer)


def test_equal_rewards_change_nothing_despite_momentum_and_weight_decay(tiny_dir, tmp_path):
    calls = []

    def first_varied_then_equal(completion_ids, **kwargs):
        calls.append(None)
        return rewards(completion_ids) if len(calls) == 1 else [0.1] * len(completion_ids)

    snapshots = []
    trainer = make_trainer(tiny_dir, tmp_path, reward_funcs=first_varied_then_equal, max_steps=3)
    step = trainer.training_step

    def training_step(*args, **kwargs):
        snapshots.append(parameters(trainer))
        return step(*args, **kwargs)

    trainer.training_step = training_step
    trainer.train()
    assert not torch.equal(snapshots[0], snapshots[1])
    assert torch.equal(snapshots[1], snapshots[2])
    assert torch.equal(snapshots[2], parameters(trainer))


def test_one_missing_reward_leaves_the_others_to_learn(tiny_dir, tmp_path):
    trainer = make_trainer(tiny_dir, tmp_path, reward_funcs=lambda completion_ids, **kwargs: [math.nan, 1.0, 0.0, 2.0])
    before = parameters(trainer)
    trainer.train()
    assert parameters(trainer).isfinite().all()
    assert not torch.equal(parameters(trainer), before)


def test_infinite_reward_names_the_function(tiny_dir, tmp_path):
    def unbounded(completion_ids, **kwargs):
        return [math.inf] + [0.0] * (len(completion_ids) - 1)

    trainer = make_trainer(tiny_dir, tmp_path, reward_funcs=unbounded)
    with pytest.raises(ValueError, match="'unbounded' returned an infinite reward"):
        trainer.train()


def test_error_in_a_reward_function_surfaces_before_any_update(tiny_dir, tmp_path):
    def broken(completion_ids, **kwargs):
        raise RuntimeError("the judge is asleep")

    trainer = make_trainer(tiny_dir, tmp_path, reward_funcs=broken)
    before = parameters(trainer)
    with pytest.raises(RuntimeError, match="the judge is asleep"):
        trainer.train()
    assert torch.equal(parameters(trainer), before)


@pytest.mark.parametrize("completion", [[], [30, 31]], ids=["empty", "environment-only"])
def test_completion_without_model_tokens_is_a_no_op_sample(completion, tiny_dir, tmp_path):
    def silent_first(prompts, trainer):
        output = rollout(prompts, trainer)
        output["completion_ids"][0], output["env_mask"][0] = completion, [0] * len(completion)
        return output

    trainer = make_trainer(
        tiny_dir, tmp_path, rollout_func=silent_first, reward_funcs=lambda prompts, **kwargs: [0.0, 1.0, 3.0, 0.0]
    )
    trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["turns/min"] == 0
    assert logs["turn_1/pool"] == 3
    assert parameters(trainer).isfinite().all()


def test_batch_without_any_model_token_changes_nothing(tiny_dir, tmp_path):
    def silent(prompts, trainer):
        output = rollout(prompts, trainer)
        return {**output, "env_mask": [[0] * len(ids) for ids in output["completion_ids"]]}

    assert_nothing_moves(make_trainer(tiny_dir, tmp_path, rollout_func=silent, beta=0.1))


def test_every_trajectory_may_have_one_turn(tiny_dir, tmp_path):
    trainer = make_trainer(tiny_dir, tmp_path, rollout_func=lambda p, t: rollout(p, t, turns=(1, 1, 1, 1)))
    trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["optimizer_steps"] == 1
    assert logs["tokens/no_grad"] == 0


def test_number_of_turns_may_grow_during_training(tiny_dir, tmp_path):
    def growing(prompts, trainer):
        return rollout(prompts, trainer, turns=[trainer.state.global_step + 1 + i % 2 for i in range(len(prompts))])

    trainer = make_trainer(tiny_dir, tmp_path, rollout_func=growing, max_steps=4)
    trainer.train()
    assert [log["turns/max"] for log in trainer.state.log_history[:4]] == [2, 3, 4, 5]
    assert [log["optimizer_steps"] for log in trainer.state.log_history[:4]] == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"env_mask": [[1]] * 4}, "`env_mask` of 1 values for the 6 completion tokens of sample 0"),
        ({"env_mask": [[2, 1, 0, 1, 0, 1]] * 4}, "an `env_mask` with the value 2 for sample 0"),
        ({"logprobs": [[-1.0] * 5] * 4}, "`logprobs` of sample 0 with 5 values for 6 tokens"),
        ({"logprobs": [None] * 4}, "`logprobs` of sample 0 with 0 values for 6 tokens"),
        ({"logprobs": [[[-1.0, -2.0]] * 6] * 4}, r"`logprobs` of sample 0 with the value \[-1.0, -2.0\]"),
        ({"completion_ids": [[30]]}, "returned 1 `completion_ids` for 4 prompts"),
        ({"prompt_ids": [[]] * 4}, "returned an empty prompt for sample 0"),
        ({"trajectories": [Trajectory(turns=[])]}, "returned 1 `trajectories` for 4 prompts"),
        (
            {"trajectories": [Trajectory(turns=[Turn(context_ids=[5], action_ids=[])])] * 4},
            "turn 1 of trajectory 0 has no action tokens",
        ),
        (
            {"trajectories": [Trajectory(turns=[Turn(context_ids=[], action_ids=[5])])] * 4},
            "turn 1 of trajectory 0 has no context tokens",
        ),
        (
            {"trajectories": [Trajectory(turns=[Turn([5], [6, 7], [-1.0])])] * 4},
            "`sampling_logps` of turn 1 of trajectory 0 with 1 values for 2 tokens",
        ),
        ({"trajectories": [{"steps": 3}] * 4}, "returned a dict in `trajectories`; that key is for"),
    ],
    ids=[
        "mask-length",
        "mask-values",
        "logprobs-length",
        "logprobs-missing",
        "logprobs-nested",
        "missing-completions",
        "empty-prompt",
        "missing-trajectories",
        "empty-action",
        "no-context",
        "sampling-logps",
        "trajectories-of-its-own",
    ],
)
def test_malformed_rollout_says_what_is_wrong(change, message, tiny_dir, tmp_path):
    trainer = make_trainer(tiny_dir, tmp_path, rollout_func=lambda p, t: {**rollout(p, t), **change}, **READS_LOGPROBS)
    before = parameters(trainer)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert torch.equal(parameters(trainer), before)


def trained_on(change, tiny_dir, tmp_path, **options):
    """Parameters after a run on rollouts that are the usual ones but for a change, and the episodes it logged."""

    def changed(prompts, trainer):
        output = rollout(prompts, trainer)
        return {**output, **change(output)}

    trainer = make_trainer(tiny_dir, tmp_path, rollout_func=changed, save_trajectories=True, **options)
    trainer.train()
    return parameters(trainer), read_rows(find_files(tmp_path)).to_pylist()


def turns_with(logps):
    """The episodes as turns, each with these log-probabilities."""

    def turns(output):
        pairs = zip(output["prompt_ids"], output["completion_ids"], strict=True)
        return {"trajectories": [Trajectory([Turn(prompt, ids, logps(ids))]) for prompt, ids in pairs]}

    return turns


def logprobs_of(logps):
    """The log-probabilities of each completion."""
    return lambda output: {"logprobs": [logps(ids) for ids in output["completion_ids"]]}


@pytest.mark.parametrize("place", [logprobs_of, turns_with])
@pytest.mark.parametrize(
    "logps",
    [lambda ids: [], lambda ids: [-1.0], lambda ids: [-1.0] * (len(ids) + 2), lambda ids: [{7: -1.0}] * len(ids)],
    ids=["none", "too-few", "padded", "of-several-tokens"],
)
def test_log_probabilities_that_nothing_reads_may_be_anything(place, logps, tiny_dir, tmp_path):
    given, rows = trained_on(place(logps), tiny_dir, tmp_path / "given")
    expected, _ = trained_on(place(lambda ids: None) if place is turns_with else dict, tiny_dir, tmp_path / "none")
    assert torch.equal(given, expected)
    assert all(row["sampling_logps"] is None for row in rows)


@pytest.mark.parametrize("place", [logprobs_of, turns_with])
def test_log_probabilities_in_vllms_shape_are_read_as_one_for_each_token(place, tiny_dir, tmp_path):
    def nested(ids):
        return [[-token / 1024] for token in ids]

    def flat(ids):
        return [-token / 1024 for token in ids]

    given, rows = trained_on(place(nested), tiny_dir, tmp_path / "nested", **READS_LOGPROBS)
    expected, _ = trained_on(place(flat), tiny_dir, tmp_path / "flat", **READS_LOGPROBS)
    assert torch.equal(given, expected)
    assert all(row["sampling_logps"] == flat(row["action_ids"]) for row in rows)
    unread, _ = trained_on(place(nested), tiny_dir, tmp_path / "unread")
    assert not torch.equal(given, unread)


@pytest.mark.parametrize("other", [np.array, torch.tensor, tuple])
@pytest.mark.parametrize("brings_turns", [False, True])
def test_a_rollout_may_return_arrays_tensors_and_tuples(other, brings_turns, tiny_dir, tmp_path):
    def of(kind, prompts, trainer):
        output = rollout(prompts, trainer)
        output["logprobs"] = [[-1.0] * len(ids) for ids in output["completion_ids"]]
        output = {name: [kind(row) for row in rows] for name, rows in output.items()}
        if brings_turns:
            pairs = zip(output["prompt_ids"], output["completion_ids"], strict=True)
            output["trajectories"] = [Trajectory([Turn(prompt, ids)]) for prompt, ids in pairs]
        return output

    trained = []
    for kind in (other, list):
        trainer = make_trainer(tiny_dir, tmp_path / kind.__name__, rollout_func=partial(of, kind))
        trainer.train()
        trained.append(parameters(trainer))
    assert torch.equal(*trained)


def test_resuming_without_a_checkpoint_is_an_error(tiny_dir, tmp_path):
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        make_trainer(tiny_dir, tmp_path).train(resume_from_checkpoint=True)
