"""`rollouts_ahead=1`: the next batch is played while this one is updated."""

import io
import sys
import threading
import time
from contextlib import chdir, redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ahead_run import Apart, Pays, Trainer, make_trainer
from datasets import Dataset
from launching import run_on_two_processes
from oracle import OracleSettings, seeupo_iteration
from tiny import load_tiny_model, tiny_tokenizer
from transformers import TrainerCallback

from seeupo_trl import MultiTurnRollout, SeeUPOConfig, SeeUPOTrainer


def parameters(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def threads_of_rollouts():
    return [thread.name for thread in threading.enumerate() if thread.name == "seeupo-rollout-ahead"]


class Kept(TrainerCallback):
    """The parameters before and after each iteration."""

    def __init__(self):
        self.parameters = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.parameters.append({name: p.detach().clone() for name, p in model.named_parameters()})

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.on_step_begin(args, state, control, model)


def test_the_next_batch_is_played_while_this_one_is_updated(tiny_dir, tmp_path, monkeypatch):
    """Each update waits until the batch in flight is whole."""
    trainer, seen = make_trainer(tiny_dir, tmp_path, num_tasks=6), []
    surrogate = trainer.turn_surrogate

    def turn_surrogate(*args):
        until = time.monotonic() + 20
        while threads_of_rollouts():
            assert time.monotonic() < until
            time.sleep(0.01)
        seen.append((trainer.state.global_step, [sampler.is_closed for sampler in trainer.samplers]))
        return surrogate(*args)

    monkeypatch.setattr(trainer, "turn_surrogate", turn_surrogate)
    trainer.train()
    assert trainer.staleness() == [0, 1, 1, 0]  # three batches an epoch; the fourth is the next epoch's first
    assert dict(seen) == {0: [True] * 2, 1: [True] * 3, 2: [True] * 3, 3: [True] * 4}
    assert not threads_of_rollouts()


def test_tasks_and_seeds_are_those_of_a_run_that_does_not_play_ahead(tiny_dir, tmp_path):
    ahead, plain = (make_trainer(tiny_dir, tmp_path, rollouts_ahead=n, max_steps=7) for n in (1, 0))
    ahead.train(), plain.train()
    for name in ("numbers", "seeds"):
        assert [batch[name] for batch in ahead.batches] == [batch[name] for batch in plain.batches]
    assert ahead.batches[0] == plain.batches[0] and ahead.batches[1] != plain.batches[1]
    assert not equal(parameters(ahead), parameters(plain)) and plain.staleness() == []
    times = [entry["time/rollout"] for entry in ahead.state.log_history if "time/rollout" in entry]
    assert len(times) == 7


@pytest.mark.parametrize(
    ("replacing", "look"),
    [(lambda path: redirect_stdout(io.StringIO()), lambda: sys.stdout), (chdir, Path.cwd)],
    ids=["standard output", "the working directory"],
)
def test_a_callback_may_replace_what_threads_share_while_the_next_batch_plays(tiny_dir, tmp_path, replacing, look):
    replaced, kept, before = threading.Event(), [], look()

    class PaysMeanwhile(Pays):
        def step(self, message):
            if threads_of_rollouts():
                assert replaced.wait(20)
            return super().step(message)

    class Replaces(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            with replacing(tmp_path):
                own = look()
                replaced.set()
                until = time.monotonic() + 20
                while threads_of_rollouts():
                    assert time.monotonic() < until
                    time.sleep(0.01)
                kept.append(look() == own)
                replaced.clear()

    trainer = make_trainer(tiny_dir, tmp_path, environment=PaysMeanwhile)
    trainer.add_callback(Replaces())
    trainer.train()
    assert trainer.staleness() == [0, 1, 1, 1]
    assert kept == [True] * 8 and look() == before


def test_a_batch_is_sampled_by_the_policy_before(tiny_dir, tmp_path):
    trainer, kept = make_trainer(tiny_dir, tmp_path, num_tasks=6), Kept()
    trainer.add_callback(kept)
    trainer.train()
    origins = [
        [equal(dict(sampler.model.named_parameters()), p) for p in kept.parameters].index(True)
        for sampler in trainer.samplers
    ]
    assert origins == [0, 0, 1, 3]


def test_each_iteration_ends_where_the_oracle_ends_with_the_same_stale_samples(tiny_dir, tmp_path):
    model, kept = load_tiny_model(tiny_dir, torch.float64), Kept()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    bounds = {"vllm_importance_sampling_clip_min": 0.8, "vllm_importance_sampling_clip_max": 1.2}
    trainer = make_trainer(
        model,
        tmp_path,
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
        max_grad_norm=0.0,
        gradient_checkpointing=False,
        temperature=0.8,
        vllm_importance_sampling_mode="sequence_truncate",
        max_steps=3,
        **bounds,
    )
    trainer.add_callback(kept)
    trainer.train()
    settings = OracleSettings(lr=0.05, temperature=0.8, vllm_importance_sampling_mode="sequence_truncate", **bounds)
    assert trainer.staleness() == [0, 1, 1]
    for step, batch in enumerate(trainer.batches):
        before, after = kept.parameters[step : step + 2]
        rows = list(zip(batch["turns"], batch["rewards"], strict=True))
        groups = [rows[i : i + 2] for i in range(0, len(rows), 2)]

        def end(logps, before=before, groups=groups):
            policy = load_tiny_model(tiny_dir, torch.float64)
            policy.load_state_dict(before)
            return seeupo_iteration(policy, groups, settings, sampling_logps=logps).parameters

        def distance(expected, before=before, after=after):
            moved = sum((after[name] - before[name]).square().sum() for name in before).sqrt()
            return sum((after[name] - expected[name]).square().sum() for name in before).sqrt() / moved

        assert distance(end(batch["logps"])) < 1e-5  # log-probabilities of the sampler pass through float32
        assert (distance(end(None)) > 1e-3) == (step > 0)


@pytest.mark.parametrize("evaluates", [False, True], ids=["", "with evaluations"])
def test_a_resumed_run_is_the_uninterrupted_one(tiny_dir, tmp_path, evaluates):
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "num_tasks": 24}
    evaluations = Dataset.from_list([{"prompt": [{"role": "user", "content": "w1"}], "number": 1}] * 4)

    def trainer(name):
        new = make_trainer(tiny_dir, tmp_path / name, **options, per_device_eval_batch_size=2)
        new.eval_dataset = evaluations if evaluates else None

        class Evaluates(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_evaluate = evaluates and state.global_step % 2 == 0

        new.add_callback(Evaluates())
        return new

    whole = trainer("whole")
    whole.train()
    assert whole.staleness() == [0, 1, 1, 0, 1, 1]
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.batches == whole.batches[3:]
    assert equal(parameters(resumed), parameters(whole))


def test_a_checkpoint_that_nobody_expected_drops_the_batch_in_flight(tiny_dir, tmp_path):
    class Saves(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = state.global_step == 2

    whole = make_trainer(tiny_dir, tmp_path / "whole", num_tasks=24, save_strategy="steps", save_steps=100)
    whole.add_callback(Saves())
    whole.train()
    assert whole.staleness() == [0, 1, 0, 1]
    resumed = make_trainer(tiny_dir, tmp_path / "resumed", num_tasks=24)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.batches == whole.batches[2:]
    assert equal(parameters(resumed), parameters(whole))


def test_what_a_dropped_batch_played_with_is_used_again(tiny_dir, tmp_path):
    """The first batch that is played ahead is never answered; its episodes wait for the sampler when it is dropped."""
    made, polls = [], []

    class Counted(Pays):
        def __init__(self):
            made.append(self)

    class Holds(Apart):
        def poll(self, timeout):
            if threading.current_thread() is not threading.main_thread() and len(trainer.samplers) == 2:
                polls.append(timeout)
                time.sleep(timeout)
                return []
            return super().poll(timeout)

    class HoldsTheSecond(Trainer):
        sampler_class = Holds

    class Saves(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            until = time.monotonic() + 20
            while state.global_step == 1 and (not polls or polls[-1] < 0.1):  # until no environment is at work
                assert time.monotonic() < until
                time.sleep(0.01)
            control.should_save = state.global_step == 1

    trainer = make_trainer(tiny_dir, tmp_path, trainer_class=HoldsTheSecond, environment=Counted)
    trainer.add_callback(Saves())
    start = time.monotonic()
    trainer.train()
    assert trainer.staleness() == [0, 0, 1, 1] and len(made) == 4
    assert trainer.samplers[1].is_closed and max(polls) <= 0.2 and time.monotonic() - start < 30


def test_evaluations_wait_for_the_batch_in_flight(tiny_dir, tmp_path):
    """They sample from the updated policy, the batch from the one before."""
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "w1"}], "number": 1}] * 4)
    running = []

    class Watched(Trainer):
        def rollout_sampler(self, ends, settings):
            if not self.model.training:
                running.extend(threads_of_rollouts())
            return super().rollout_sampler(ends, settings)

    options = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8}
    trainer, kept = make_trainer(tiny_dir, tmp_path, trainer_class=Watched, eval_dataset=rows, **options), Kept()
    trainer.add_callback(kept)
    trainer.train()
    assert trainer.staleness() == [0, 1, 1, 1] and not running
    origins = [
        [equal(dict(sampler.model.named_parameters()), p) for p in kept.parameters].index(True)
        for sampler in trainer.samplers
    ]
    assert origins == [0, 0, 1, 1, 2, 2, 3, 4]  # the first batch; each next one, and the evaluation after the update


def test_groups_without_variance_give_way_in_a_batch_that_was_played_ahead(tiny_dir, tmp_path):
    class Dull(Pays):
        def step(self, message):
            result = super().step(message)
            return replace(result, reward=1.0) if self.number % 3 else result

    trainer = make_trainer(tiny_dir, tmp_path, environment=Dull, zero_variance="resample", max_resampling_rounds=6)
    trainer.train()
    assert trainer.staleness() == [0, 1, 1, 1]
    replaced = [e["resampling/groups_replaced"] for e in trainer.state.log_history if "rollout/staleness" in e]
    assert sum(replaced) > 0


@pytest.mark.parametrize("error", [RuntimeError("in the update"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_what_goes_wrong_in_the_update_ends_the_batch_in_flight(tiny_dir, tmp_path, monkeypatch, error):
    plain = make_trainer(tiny_dir, tmp_path, max_steps=2)
    plain.train()

    is_asked = threading.Event()

    class SecondIsStuck(Pays):
        def step(self, message):
            if self.number in plain.batches[1]["numbers"]:
                is_asked.set()
                time.sleep(60)
            return super().step(message)

    trainer = make_trainer(tiny_dir, tmp_path, environment=SecondIsStuck)

    def turn_surrogate(*args):
        assert is_asked.wait(20)
        raise error

    monkeypatch.setattr(trainer, "turn_surrogate", turn_surrogate)
    start = time.monotonic()
    with pytest.raises(type(error)):
        trainer.train()
    assert time.monotonic() - start < 20
    assert not threads_of_rollouts() and all(sampler.is_closed for sampler in trainer.samplers)


def test_what_goes_wrong_in_the_sampler_ends_the_run(tiny_dir, tmp_path):
    class Breaks(Apart):
        def response(self, request):
            if threading.current_thread() is not threading.main_thread():
                raise OSError("the server is gone")
            return super().response(request)

    class BreaksAhead(Trainer):
        sampler_class = Breaks

    trainer = make_trainer(tiny_dir, tmp_path, trainer_class=BreaksAhead)
    with pytest.raises(OSError, match="the server is gone"):
        trainer.train()
    assert trainer.state.global_step == 1 and not threads_of_rollouts()
    assert all(sampler.is_closed for sampler in trainer.samplers)


def test_too_many_faults_of_environments_end_the_run(tiny_dir, tmp_path):
    plain = make_trainer(tiny_dir, tmp_path, max_steps=2)
    plain.train()

    class Fails(Pays):
        def step(self, message):
            if self.number in plain.batches[1]["numbers"]:
                raise OSError("no more")
            return super().step(message)

    trainer = make_trainer(tiny_dir, tmp_path, environment=Fails)
    with pytest.raises(RuntimeError, match="no more"):
        trainer.train()
    assert trainer.state.global_step == 1 and not threads_of_rollouts()


def test_a_sampler_without_logps_is_refused(tiny_dir, tmp_path):
    class Silent(Apart):
        def response(self, request):
            return replace(super().response(request), logps=None)

    class SamplesSilently(Trainer):
        sampler_class = Silent

    with pytest.raises(ValueError, match="this one reported none"):
        make_trainer(tiny_dir, tmp_path, trainer_class=SamplesSilently).train()


def test_a_sampler_without_weights_of_its_own_is_refused_before_anything_is_played(tiny_dir, tmp_path):
    class Attached(Apart):
        is_independent = False

    class SamplesFromThePolicy(Trainer):
        sampler_class = Attached

    trainer = make_trainer(tiny_dir, tmp_path, trainer_class=SamplesFromThePolicy)
    with pytest.raises(ValueError, match="`Attached` has no `is_independent = True`"):
        trainer.train()
    assert [sampler.is_closed for sampler in trainer.samplers] == [True]
    with pytest.raises(ValueError, match="`TransformersSampler` has no `is_independent = True`"):
        make_trainer(tiny_dir, tmp_path, trainer_class=SeeUPOTrainer).train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollouts_ahead": 2}, "`rollouts_ahead` is 2; give 0, or 1"),
        ({"rollouts_ahead": -1}, "`rollouts_ahead` is -1"),
        ({"vllm_importance_sampling_correction": False}, "`vllm_importance_sampling_correction=True`"),
        ({"lock_step_rollouts": True}, "exclude each other"),
        ({"save_strategy": "steps", "save_steps": 1}, "no effect with `save_steps=1`"),
        ({"loss_type": "vespo", "vllm_importance_sampling_mode": "sequence_mask"}, "'token_truncate'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SeeUPOConfig(**{"output_dir": "x", "use_cpu": True, "bf16": False, "rollouts_ahead": 1, **options})


class PlaysItsOwnWay(MultiTurnRollout):
    def __call__(self, prompts, trainer):
        return super().__call__(prompts, trainer)


@pytest.mark.parametrize(
    "given",
    [
        {"rollout_func": lambda prompts, trainer: {}},
        {"rollout_func": PlaysItsOwnWay(Pays)},
        {},
    ],
    ids=["rollout function", "subclass", "single turns"],
)
def test_other_rollouts_are_refused(tiny_dir, tmp_path, given):
    args = SeeUPOConfig(str(tmp_path), rollouts_ahead=1, use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="works with environments"):
        SeeUPOTrainer(
            load_tiny_model(tiny_dir),
            reward_funcs=lambda completions, **kwargs: [1.0] * len(completions),
            args=args,
            train_dataset=Dataset.from_dict({"prompt": ["w1"] * 64}),
            processing_class=tiny_tokenizer(),
            **given,
        )


def test_a_dataset_of_one_batch_is_refused(tiny_dir, tmp_path):
    with pytest.raises(ValueError, match="rows for one batch only"):
        make_trainer(tiny_dir, tmp_path, num_tasks=3)
    trainer = make_trainer(tiny_dir, tmp_path, num_tasks=4, max_steps=2)
    trainer.train()
    assert trainer.staleness() == [0, 1]


def test_environments_that_bring_their_tasks_are_played_ahead_too(tiny_dir, tmp_path):
    class Own(Pays):
        def reset(self, seed, **task):
            return super().reset(seed % 50, seed)

    class KeepsNothing(Trainer):
        def select_episodes(self, episodes):
            return episodes

    trainer = KeepsNothing(
        load_tiny_model(tiny_dir),
        args=SeeUPOConfig(
            str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to="none",
            logging_steps=1,
            save_strategy="no",
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=6,
            max_steps=3,
            rollouts_ahead=1,
        ),
        processing_class=tiny_tokenizer(),
        environment_factory=Own,
    )
    trainer.train()
    assert trainer.staleness() == [0, 1, 1]


def test_two_processes_play_ahead_together(tiny_dir, tmp_path):
    first, second = run_on_two_processes("ahead_run.py", tmp_path, tiny_dir)
    assert first["parameters"] == second["parameters"]
    assert first["staleness"] == [0, 1, 1, 1]
    for one, other in zip(first["batches"], second["batches"], strict=True):
        assert one["numbers"] == other["numbers"] and one["seeds"] == other["seeds"]
        assert one["turns"] != other["turns"]
