"""Episodes that go on by themselves: those of lock step, whatever comes first, and none waits for another."""

import random
import signal
import threading
import time

import pytest
from byte_tokenizer import byte_tokenizer, tiny_model
from datasets import Dataset
from one_by_one import ORDERS, OneByOne, play_one_by_one
from talk import Talk, row, user
from tiny import ON_CPU

from seeupo_trl import MultiTurnRollout, SeeUPOConfig, SeeUPOTrainer
from seeupo_trl.rollout.sampler import Response


class Jittery(Talk):
    """Answers after a while that has nothing to do with its task."""

    def reset(self, **task):
        time.sleep(random.random() / 50)
        return super().reset(**task)

    def step(self, message):
        time.sleep(random.random() / 50)
        return super().step(message)


def as_data(output):
    """Everything of a rollout but the objects' identities."""
    return [
        ([vars(turn) for turn in t.turns], t.messages, t.reward, t.stop_reason, t.info) for t in output["trajectories"]
    ] + [output[name] for name in ("prompt_ids", "completion_ids", "env_mask", "environment_reward")]


@pytest.mark.parametrize("order", ORDERS)
def test_trajectories_are_those_of_lock_step(make_trainer, monkeypatch, order):
    rows = [row(*[[user(f"Go on, {i}.")] for i in range(n)], number=n) for n in (0, 39, 7, 1, 0, 12, 3, 1)]
    trainer = make_trainer(rows, script=[f"Yes, {i}.<|im_end|>" for i in range(40)], max_completion_length=20)
    prompts = [r["prompt"] for r in rows]
    together = MultiTurnRollout(Jittery, tasks=rows, max_turns=40)(prompts, trainer)
    samplers = play_one_by_one(monkeypatch, order)
    freely = MultiTurnRollout(Jittery, tasks=rows, max_turns=40)(prompts, trainer)
    assert [len(t.turns) for t in freely["trajectories"]] == [1, 40, 8, 2, 1, 13, 4, 2]
    assert as_data(freely) == as_data(together)
    (sampler,) = samplers
    assert sorted(sampler.forgotten) == list(range(8)) and sampler.is_closed


@pytest.mark.parametrize("order", ORDERS)
def test_the_same_seed_plays_the_same_episodes_whatever_arrives_first(tmp_path, monkeypatch, order):
    """With a real model that samples; episodes of a group differ, and so do iterations."""
    tokenizer = byte_tokenizer("qwen2_5")
    rows = [row(*[[user("Go on.")]] * n, number=n) for n in (0, 2)]
    trainer = SeeUPOTrainer(
        model=tiny_model(tokenizer),
        args=SeeUPOConfig(
            str(tmp_path),
            seed=3,
            num_generations=2,
            per_device_train_batch_size=4,
            max_completion_length=4,
            **ON_CPU,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        environment_factory=Jittery,
    )
    trainer.rollout_inputs = [rows[0], rows[0], rows[1], rows[1]]
    rollout = MultiTurnRollout(Jittery)

    def play(step):
        trainer.state.global_step = step
        output = rollout([None] * 4, trainer)
        return [[turn.action_ids for turn in t.turns] for t in output["trajectories"]]

    play_one_by_one(monkeypatch, "first")
    first, other = play(0), play(1)
    play_one_by_one(monkeypatch, order)
    assert play(0) == first and play(1) == other
    assert first != other and first[0] != first[1] and first[2] != first[3]


class Slow(Talk):
    """Its episode waits in the first step until all others have ended."""

    others_have_ended = threading.Event()
    num_ended = 0

    def step(self, message):
        if self.task["number"] == 0:
            assert self.others_have_ended.wait(20)
        result = super().step(message)
        if result.terminated and self.task["number"]:
            Slow.num_ended += 1
            if Slow.num_ended == 3:
                self.others_have_ended.set()
        return result


def test_no_episode_waits_for_a_slow_environment(make_trainer, monkeypatch):
    play_one_by_one(monkeypatch)
    rows = [row(*[[user("Go on.")]] * n, number=n) for n in (0, 5, 1, 2)]
    trainer = make_trainer(rows, script=["Yes.<|im_end|>"] * 6)
    output = MultiTurnRollout(Slow, tasks=rows)([r["prompt"] for r in rows], trainer)
    assert output["stop_reason"] == ["completed"] * 4


class Forgetful(OneByOne):
    """Answers twice, and for episodes that there are not."""

    def poll(self, timeout):
        responses = super().poll(timeout)
        return [*responses, *responses, *(Response(response.key + 100, [5]) for response in responses)]


def test_an_answer_that_nobody_waits_for_is_not_counted(make_trainer, monkeypatch):
    rows = [row(*[[user("Go on.")]] * n) for n in (0, 2)]
    trainer = make_trainer(rows, script=["Yes.<|im_end|>"] * 3)
    expected = MultiTurnRollout(Talk, tasks=rows)
    before = as_data(expected([r["prompt"] for r in rows], trainer))
    trainer.rollout_sampler = lambda ends, settings: Forgetful(trainer, ends)
    assert as_data(expected([r["prompt"] for r in rows], trainer)) == before


class Broken(OneByOne):
    """Answers four requests."""

    left = 4

    def poll(self, timeout):
        if self.pending and not self.left:
            raise self.error
        self.left -= bool(self.pending)
        return super().poll(timeout)


@pytest.mark.parametrize("error", [RuntimeError("no more"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_when_the_sampler_fails_everything_is_given_up_and_the_next_rollout_is_whole(make_trainer, error):
    rows = [row(*[[user("Go on.")]] * n, number=n) for n in (0, 3, 3)]
    trainer = make_trainer(rows, script=["Yes.<|im_end|>"] * 4)
    rollout, samplers = MultiTurnRollout(Jittery, tasks=rows), []

    def rollout_sampler(ends, settings):
        samplers.append((OneByOne if samplers else Broken)(trainer, ends, "first"))
        samplers[-1].error = error
        return samplers[-1]

    trainer.rollout_sampler = rollout_sampler
    with pytest.raises(type(error)):
        rollout([r["prompt"] for r in rows], trainer)
    assert samplers[0].is_closed
    output = rollout([r["prompt"] for r in rows], trainer)
    assert [len(t.turns) for t in output["trajectories"]] == [1, 4, 4]


def test_an_interrupt_ends_a_rollout_that_waits_for_an_environment(make_trainer, monkeypatch):
    class Stuck(Talk):
        def step(self, message):
            time.sleep(60)

    play_one_by_one(monkeypatch)
    rows = [row()]
    trainer = make_trainer(rows, script=["Yes.<|im_end|>"])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    timer = threading.Timer(0.5, lambda: signal.raise_signal(signal.SIGINT))
    timer.start()
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            MultiTurnRollout(Stuck, tasks=rows)([rows[0]["prompt"]], trainer)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 30


def test_waits_are_measured_where_they_are(make_trainer, monkeypatch):
    class Resting(Talk):
        def step(self, message):
            time.sleep(0.2)
            return super().step(message)

    rows = [row(number=0), row([user("Go on.")], number=1)]
    trainer = make_trainer(rows, script=["Yes.<|im_end|>"] * 2)
    for schedule in ("lock step", "free"):
        if schedule == "free":
            play_one_by_one(monkeypatch)
        trainer._metrics["train"].clear()
        MultiTurnRollout(Resting, tasks=rows)([r["prompt"] for r in rows], trainer)
        metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
        assert 0.3 <= metrics["rollout/wait_environment"] < 0.6  # three steps for two episodes
        assert metrics["time/environments"] >= 0.4
        assert metrics["rollout/tokens_per_second"] > 0 and metrics["rollout/requests_in_flight"] > 0
        assert 0 <= metrics["rollout/wait_others"] < 0.3
