"""Iterations without an update, and episodes that are left out: what is logged, and what is warned about."""

import logging

import pytest
import torch
from tiny import VOCABULARY, tiny_tokenizer
from two_groups import make_trainer, parameters, rewards, rollout


# what a script written for GRPO finds in every line of its log
ALWAYS_THERE = [
    "entropy",
    *(f"clip_ratio/{name}" for name in ("low_mean", "low_min", "high_mean", "high_max", "region_mean")),
]


def equal_every_second_time():
    calls = []

    def reward(completion_ids, **columns):
        calls.append(None)
        return rewards(completion_ids) if len(calls) % 2 else [0.5] * len(completion_ids)

    return reward


def logs_of(trainer) -> list[dict[str, float]]:
    return [log for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("packing", ["tree", "rows"])
def test_metrics_of_grpo_are_there_in_every_iteration(packing, tiny_dir, tmp_path):
    options = {"max_steps": 3, "learning_rate": 0.0, "packing": packing}
    trainer = make_trainer(tiny_dir, tmp_path, reward_funcs=equal_every_second_time(), **options)
    trainer.train()
    learned, idle, _ = logs_of(trainer)
    assert learned["optimizer_steps"] > 0 == idle["optimizer_steps"]
    for name in ALWAYS_THERE:
        assert name in learned
    assert {name: idle[name] for name in ALWAYS_THERE[1:]} == dict.fromkeys(ALWAYS_THERE[1:], 0.0)
    assert (idle["ratio/mean"], idle["turn_weight/mean"], idle["loss"], idle["grad_norm"]) == (1.0, 1.0, 0.0, 0.0)


def test_entropy_of_an_iteration_without_an_update_is_that_of_all_tokens(tiny_dir, tmp_path):
    everything = make_trainer(tiny_dir, tmp_path, learning_rate=0.0, entropy_coef=1e-6, max_turn_updates=1)
    everything.train()
    idle = make_trainer(tiny_dir, tmp_path, reward_funcs=lambda completion_ids, **columns: [1.0] * len(completion_ids))
    idle.train()
    assert logs_of(idle)[0]["entropy"] == pytest.approx(logs_of(everything)[0]["entropy"], rel=1e-5)


def test_metrics_are_there_when_nobody_plays_a_turn(tiny_dir, tmp_path):
    def silent(prompts, trainer):
        output = rollout(prompts, trainer)
        return {**output, "env_mask": [[0] * len(ids) for ids in output["completion_ids"]]}

    trainer = make_trainer(tiny_dir, tmp_path, rollout_func=silent, beta=0.1)
    trainer.train()
    assert {name: logs_of(trainer)[0][name] for name in (*ALWAYS_THERE, "kl")} == dict.fromkeys(
        (*ALWAYS_THERE, "kl"), 0.0
    )


def first_two_are_whole(prompts, trainer):
    output = rollout(prompts, trainer)
    for ids, mask in list(zip(output["completion_ids"], output["env_mask"], strict=True))[:2]:
        ids.append(VOCABULARY.index("<|im_end|>"))
        mask.append(1)
    return output


def test_an_episode_whose_last_response_was_cut_is_left_out_whole_and_its_reward_counts(tiny_dir, tmp_path):
    trainer = make_trainer(
        tiny_dir, tmp_path, rollout_func=first_two_are_whole, mask_truncated_completions=True, save_trajectories=True
    )
    seen = []
    select = trainer.select_episodes
    trainer.select_episodes = lambda episodes: (seen.append(episodes), select(episodes))[1]
    trainer.train()
    (episodes,) = seen
    assert [len(trajectory.turns) for trajectory in episodes.trajectories] == [3, 2, 3, 2]
    assert [len(trajectory.turns) for trajectory in episodes.trained] == [3, 2, 0, 0]
    assert all(outcome.advantage != 0 for outcome in episodes.outcomes)
    assert logs_of(trainer)[0]["episodes/left_out"] == 2
    everything = make_trainer(tiny_dir, tmp_path, rollout_func=first_two_are_whole)
    everything.train()
    assert logs_of(everything)[0]["episodes/left_out"] == 0
    assert not torch.equal(parameters(trainer), parameters(everything))


@pytest.mark.parametrize(
    "options",
    [{"stop_token_ids": [39]}, {"stop_strings": ["w39"]}, {"generation_kwargs": {"eos_token_id": 39}}],
    ids=["token", "string", "generation_kwargs"],
)
def test_an_episode_that_ends_with_a_stop_string_or_token_is_whole(options, tiny_dir, tmp_path):
    """Responses of the rows end with the tokens 30, 37, 44 and 51, further by 9 for each turn but the first."""
    last = [rollout(["w0"] * 4, None)["completion_ids"][i][-2] for i in range(4)]
    stop = last[1]
    named = {"stop_token_ids": [stop], "stop_strings": [tiny_tokenizer().decode([stop])]}
    options = {name: named.get(name, {"eos_token_id": stop}) for name in options}

    def without_last_result(prompts, trainer):
        output = rollout(prompts, trainer)
        return {**output, **{name: [row[:-1] for row in output[name]] for name in ("completion_ids", "env_mask")}}

    trainer = make_trainer(
        tiny_dir, tmp_path, rollout_func=without_last_result, mask_truncated_completions=True, **options
    )
    trainer.train()
    whole = [token == stop for token in last]
    assert whole == [False, True, False, False]
    assert trainer._batch.is_left_out == [not one for one in whole]
    (log,) = logs_of(trainer)
    assert log["episodes/left_out"] == 3 and log["completions/clipped_ratio"] == 0.75
    assert {log[f"completions/{name}_terminated_length"] for name in ("mean", "min", "max")} == {2.0}


@pytest.mark.parametrize("is_cut_off", [True, False])
def test_gradient_of_zero_in_spite_of_advantages_is_warned_about(is_cut_off, tiny_dir, tmp_path, caplog):
    trainer = make_trainer(tiny_dir, tmp_path, reward_funcs=equal_every_second_time(), max_steps=2)
    if is_cut_off:
        trainer.model.model.norm.register_forward_hook(lambda module, args, output: output.detach().requires_grad_())
        trainer.model.lm_head.weight.requires_grad_(False)
    trainer.train()
    told = sum("All gradients of this iteration are exactly 0" in record.message for record in caplog.records)
    assert told == is_cut_off  # once: the second iteration has no advantages


@pytest.mark.parametrize(("loss_type", "name"), [("cispo", "cispo_clip_ratio"), ("vespo", "vespo/phi_seq_mean")])
def test_loss_types_log_what_trl_logs_of_them(loss_type, name, tiny_dir, tmp_path):
    """Before anything moves the ratio and `phi` are 1, and the last turn has one trajectory, of positive weight."""
    options = {"loss_type": loss_type, "epsilon_high": 0.9, "max_steps": 2, "learning_rate": 0.5}
    trainer = make_trainer(tiny_dir, tmp_path, reward_funcs=equal_every_second_time(), **options)
    trainer.train()
    learned, idle = logs_of(trainer)
    by_turn = {key: value for key, value in learned.items() if key.startswith("turn_") and key.endswith(name)}
    assert len(by_turn) == learned["turn_updates"] > 1
    assert by_turn[max(by_turn)] == pytest.approx(1.0)
    assert all(value < 1 for turn, value in by_turn.items() if turn != max(by_turn))
    pools = {turn: learned[turn.replace(name, "pool")] for turn in by_turn}
    mean = sum(pools[turn] * value for turn, value in by_turn.items()) / sum(pools.values())
    assert learned[name] == pytest.approx(mean)
    assert idle[name] == (0.0 if loss_type == "cispo" else 1.0)


@pytest.mark.parametrize("loss_type", ["seeupo", "luspo", "cispo", "sapo", "vespo"])
def test_no_loss_type_is_advised_on_as_if_it_were_trls(loss_type, tiny_dir, tmp_path, caplog):
    make_trainer(tiny_dir, tmp_path, loss_type=loss_type)
    assert not [record.getMessage() for record in caplog.records if "importance_sampling_level" in record.getMessage()]
    logging.getLogger("trl.trainer.grpo_trainer").warning("`importance_sampling_level` is heard of again")
    assert "heard of again" in caplog.text
