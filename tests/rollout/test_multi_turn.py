"""How episodes end, what an environment's fault costs, and how environments are used again."""

import gc
import threading

import pytest
from byte_tokenizer import byte_tokenizer, forced_end
from scripted_trainer import play
from talk import Fragile, Talk, row, user

from seeupo_trl.envs import StopReason
from seeupo_trl.rollout import MultiTurnRollout
from seeupo_trl.trajectory import Trajectory


pytestmark = pytest.mark.usefixtures("both_schedules")


# --- how episodes end -----------------------------------------------------------------------------------------------


def test_an_episode_ends_when_the_environment_ends_it(make_trainer):
    rows = [row([user("Go on.")])]
    trainer = make_trainer(rows, generation_kwargs=forced_end())
    output = play(trainer, rows)
    assert output["stop_reason"] == ["completed"] and output["environment_reward"] == [1.25]
    trajectory = output["trajectories"][0]
    assert isinstance(trajectory, Trajectory)
    assert trajectory.reward == 1.25 and trajectory.stop_reason is StopReason.completed
    assert [m["role"] for m in trajectory.messages] == ["assistant", "user", "assistant"]


def test_episodes_end_after_max_turns(make_trainer):
    rows = [row(*[[user("Go on.")]] * 12)]
    trainer = make_trainer(rows, generation_kwargs=forced_end())
    output = play(trainer, rows, max_turns=3)
    assert output["stop_reason"] == ["max_turns"] and len(output["trajectories"][0].turns) == 3
    assert len(play(trainer, rows)["trajectories"][0].turns) == 10, "the default for a stock GRPOConfig"
    trainer.args.max_turns = None
    assert play(trainer, rows)["stop_reason"] == ["completed"]
    trainer.args.max_turns = 2
    assert len(play(trainer, rows)["trajectories"][0].turns) == 2


def test_the_environment_sees_the_last_message_of_max_turns(make_trainer):
    rows = [row([user("Go on.")])]
    trainer = make_trainer(rows, generation_kwargs=forced_end())
    assert play(trainer, rows, max_turns=2)["stop_reason"] == ["completed"]


def test_a_response_without_end_token_ends_the_episode(make_trainer):
    rows = [row([user("Go on.")])]
    eos = byte_tokenizer("qwen2_5").eos_token_id
    trainer = make_trainer(rows, generation_kwargs={"suppress_tokens": [eos]})
    output = play(trainer, rows)
    assert output["stop_reason"] == ["response_truncated"]
    trajectory = output["trajectories"][0]
    assert len(trajectory.turns) == 1 and len(trajectory.turns[0].action_ids) == 6
    assert trajectory.reward == 0.0 and [m["role"] for m in trajectory.messages] == ["assistant"]


@pytest.mark.parametrize("room", range(1, 7))
def test_a_response_is_cut_at_the_context_limit(make_trainer, room):
    rows = [row()]
    trainer = make_trainer(rows, script=["ABCDE<|im_end|>"])
    trainer.use_vllm = True
    length = len(play(trainer, rows)["prompt_ids"][0])
    output = play(trainer, rows, max_context_length=length + room)
    action = output["trajectories"][0].turns[0]
    assert len(action.action_ids) == len(action.sampling_logps) == room
    assert output["stop_reason"] == ["completed" if room == 6 else "context_overflow"]
    assert output["environment_reward"] == [1.0 if room == 6 else 0.0]


def test_a_context_at_the_limit_ends_the_episode_without_another_turn(make_trainer):
    rows = [row([user("x" * 500)])]
    trainer = make_trainer(rows, generation_kwargs=forced_end())
    output = play(trainer, rows, max_context_length=300)
    assert output["stop_reason"] == ["context_overflow"] and len(output["trajectories"][0].turns) == 1
    assert output["env_mask"] == [[1] * 6]


@pytest.mark.parametrize("left", [1, 0, 2])
def test_an_episode_has_a_budget_of_tokens(make_trainer, left):
    rows = [row([user("Go on.")], [user("And on.")])]
    trainer = make_trainer(rows, script=["Yes.<|im_end|>"] * 3, max_completion_length=20)
    whole = play(trainer, rows)["trajectories"][0]
    opening, second, third = (turn.context_ids for turn in whole.turns)
    budget = len(third) - len(opening) + left
    trajectory = play(trainer, rows, max_episode_tokens=budget)["trajectories"][0]
    assert trajectory.stop_reason == "context_overflow"
    assert [turn.action_ids for turn in trajectory.turns] == [
        *(turn.action_ids for turn in whole.turns[:2]),
        *([whole.turns[2].action_ids[:left]] if left else []),
    ]
    all_tokens = len(third) - len(opening) + len(whole.turns[2].action_ids)
    assert play(trainer, rows, max_episode_tokens=all_tokens)["trajectories"][0].stop_reason == "completed"


def test_the_models_positions_limit_the_context(make_trainer):
    rows = [row([user("x" * 500)])]
    trainer = make_trainer(rows, generation_kwargs=forced_end(), positions=256)
    assert play(trainer, rows)["stop_reason"] == ["context_overflow"]
    trainer.args.max_context_length = 2000
    assert play(trainer, rows)["stop_reason"] == ["completed"]


def test_an_opening_over_the_limit_gives_an_episode_without_turns(make_trainer):
    rows = [row(opening="x" * 500), row()]
    trainer = make_trainer(rows, generation_kwargs=forced_end())
    output = play(trainer, rows, max_context_length=300)
    assert output["stop_reason"] == ["context_overflow", "completed"]
    assert output["trajectories"][0].turns == [] and output["trajectories"][0].reward == 0.0
    assert output["completion_ids"][0] == [trainer.processing_class.eos_token_id]
    assert output["env_mask"][0] == [0]
    assert len(output["prompt_ids"][0]) > 500


def test_no_policy_call_is_made_when_no_episode_is_left(make_trainer):
    rows = [row(opening="x" * 500)]
    trainer = make_trainer(rows, script=["never"])
    assert play(trainer, rows, max_context_length=300)["stop_reason"] == ["context_overflow"]
    assert not hasattr(trainer, "contexts")


def test_episodes_of_different_lengths_share_the_batch(make_trainer, both_schedules):
    rows = [row(*[[user("Go on.")]] * n) for n in (0, 3, 1)]
    trainer = make_trainer(rows, script=["Yes.<|im_end|>"] * 4)
    output = play(trainer, rows)
    assert [len(t.turns) for t in output["trajectories"]] == [1, 4, 2]
    if both_schedules == "lock step":
        assert [len(batch) for batch in trainer.contexts] == [3, 2, 1, 1]
    assert output["stop_reason"] == ["completed"] * 3


@pytest.mark.parametrize(
    ("fails_in", "text", "turns"),
    [
        ("reset", "OSError: no server", 0),
        ("reset type", "TypeError: reset() must return an Observation", 0),
        ("step", "KeyError: 'lost'", 1),
        ("silence", "ValueError: step() returned no messages", 1),
    ],
)
def test_an_environment_error_costs_its_own_episode_only(make_trainer, caplog, fails_in, text, turns):
    rows = [row(fails_in=fails_in, name="broken one"), row(fails_in=None)]
    trainer = make_trainer(rows, generation_kwargs=forced_end())
    rollout = MultiTurnRollout(Fragile, tasks=rows)
    output = rollout([r["prompt"] for r in rows], trainer)

    assert output["stop_reason"] == ["env_error", "completed"]
    assert output["environment_reward"] == [None, 1.0]
    broken = output["trajectories"][0]
    assert broken.reward is None and text in broken.info["error"] and len(broken.turns) == turns
    assert "broken one" in caplog.text and text in caplog.text
    assert all(
        len(ids) == len(mask) > 0 for ids, mask in zip(output["completion_ids"], output["env_mask"], strict=True)
    )
    assert all(output["prompt_ids"])


def test_when_every_environment_fails_the_first_error_is_raised(make_trainer):
    rows = [row(fails_in="reset", number=i) for i in range(2)]
    trainer = make_trainer(rows, generation_kwargs=forced_end())
    with pytest.raises(RuntimeError, match="All 2 environments of the batch failed.*OSError: no server") as caught:
        MultiTurnRollout(Fragile, tasks=rows)([r["prompt"] for r in rows], trainer)
    assert isinstance(caught.value.__cause__, OSError)


def test_a_wrong_factory_is_refused(make_trainer):
    with pytest.raises(TypeError, match="environment_factory is a Talk"):
        MultiTurnRollout(Talk())
    rows = [row()]
    trainer = make_trainer(rows, generation_kwargs=forced_end())
    with pytest.raises(TypeError, match="returned a dict"):
        MultiTurnRollout(dict, tasks=rows)([rows[0]["prompt"]], trainer)


# --- the pool -------------------------------------------------------------------------------------------------------


def test_environments_are_reused_and_closed(make_trainer):
    made = []

    def factory():
        made.append(Talk())
        return made[-1]

    rows = [row(number=i) for i in range(3)]
    trainer = make_trainer(rows, generation_kwargs=forced_end())
    rollout = MultiTurnRollout(factory, tasks=rows)
    for _ in range(3):
        rollout([r["prompt"] for r in rows], trainer)
    assert len(made) == 3 and [environment.resets for environment in made] == [3, 3, 3]
    rollout.close()
    assert [environment.closed for environment in made] == [1, 1, 1]
    rollout([rows[0]["prompt"]], trainer)
    assert len(made) == 4
    del rollout
    gc.collect()
    assert [environment.closed for environment in made] == [1, 1, 1, 1]


def test_a_failed_environment_is_closed_and_replaced(make_trainer):
    made = []

    def factory():
        made.append(Fragile())
        return made[-1]

    rows = [row(fails_in="step"), row(fails_in=None)]
    trainer = make_trainer(rows, generation_kwargs=forced_end())
    rollout = MultiTurnRollout(factory, tasks=rows)
    for _ in range(2):
        rollout([r["prompt"] for r in rows], trainer)
    assert len(made) == 3 and sum(environment.closed for environment in made) == 2
    assert sorted(environment.resets for environment in made) == [1, 1, 2]


def test_environments_run_at_the_same_time(make_trainer):
    """Each step waits for all the others, and each reset for all but the first, which only works if they overlap."""
    resets, steps = threading.Barrier(3, timeout=30), threading.Barrier(4, timeout=30)

    class Together(Talk):
        def reset(self, number, **task):
            if number > 0:
                resets.wait()
            return super().reset(**task)

        def step(self, message):
            steps.wait()
            return super().step(message)

    rows = [row(number=i) for i in range(4)]
    trainer = make_trainer(rows, generation_kwargs=forced_end())
    output = MultiTurnRollout(Together, tasks=rows)([r["prompt"] for r in rows], trainer)
    assert output["stop_reason"] == ["completed"] * 4
