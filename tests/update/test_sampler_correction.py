"""
Corrections for a sampler that is not quite the policy, without vLLM: a stand-in for its engine takes the weights.

The trainer ends where a naive implementation with the same corrections ends (see oracle.py and against_oracle.py).
"""

import random

import pytest
import torch
from against_oracle import LEARNING_RATE, TEMPERATURE, load_model, parameters_of, relative_error
from datasets import Dataset
from fixed_rollouts import GROUP_SIZE, NUM_GROUPS, NUM_TRAJECTORIES, as_groups, make_iteration, outcome_reward
from oracle import OracleSettings, seeupo_iteration, token_logps
from tiny import ON_CPU, tiny_tokenizer
from trl.trainer import grpo_trainer

from seeupo_trl import SeeUPOConfig, SeeUPOTrainer


MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
BOUNDS = {"vllm_importance_sampling_clip_min": 0.8, "vllm_importance_sampling_clip_max": 1.2}


class Sampler:
    """Stands for TRL's vLLM backend; the rollouts are given, so it only has to take the weights."""

    mode = "colocate"
    enable_sleep_mode = False

    def __init__(self, model, **options):
        self.model = model
        self.received = []

    def sync_weights(self):
        self.received.append(parameters_of(self.model))


@pytest.fixture(scope="module")
def episodes():
    return make_iteration(1, [5, 2, 1, 3, 4, 1, 2, 2, 3, 1, 4, 2])


@pytest.fixture(scope="module")
def sampling_logps(tiny_dir, episodes):
    """The policy's own log-probabilities with some noise, by trajectory, turn and token."""
    rng, policy = random.Random(0), load_model(tiny_dir)
    return [
        [
            [logp + rng.gauss(0, 0.15) for logp in token_logps(policy, *turn, TEMPERATURE).tolist()]
            for turn in episode.turns
        ]
        for episode in episodes
    ]


@pytest.fixture
def train(tiny_dir, tmp_path, monkeypatch, episodes, sampling_logps):
    """One iteration of the trainer on the given rollouts; returns the parameters and the trainer."""
    monkeypatch.setattr(grpo_trainer, "VLLMGeneration", Sampler)

    def rollout(prompts, trainer):
        logps = []
        for episode, turns in zip(episodes, sampling_logps, strict=True):
            remaining = [logp for turn in turns for logp in turn]
            logps.append([remaining.pop(0) if model_token else 0.0 for model_token in episode.env_mask])
        return {
            "prompt_ids": [episode.prompt_ids for episode in episodes],
            "completion_ids": [episode.completion_ids for episode in episodes],
            "logprobs": logps,
            "env_mask": [episode.env_mask for episode in episodes],
            "outcome": [episode.reward for episode in episodes],
        }

    def build(**options):
        model = load_model(tiny_dir)
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        trainer = SeeUPOTrainer(
            model=model,
            reward_funcs=outcome_reward,
            args=SeeUPOConfig(
                **{
                    **ON_CPU,
                    "output_dir": str(tmp_path),
                    "per_device_train_batch_size": 2,
                    "gradient_accumulation_steps": NUM_TRAJECTORIES // 2,
                    "num_generations": GROUP_SIZE,
                    "max_steps": 1,
                    "temperature": TEMPERATURE,
                    "max_grad_norm": 0.0,
                    "gradient_checkpointing": False,
                    "use_vllm": True,
                    "model_init_kwargs": {"dtype": torch.float64},
                    **options,
                }
            ),
            train_dataset=Dataset.from_dict({"prompt": ["w1"] * NUM_GROUPS}),
            processing_class=tiny_tokenizer(),
            rollout_func=rollout,
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
        )
        trainer.train()
        return parameters_of(trainer.model), trainer

    return build


@pytest.mark.parametrize(
    "options", [{}, {"old_policy": "turn", "max_turn_updates": 2, "beta": 0.2}], ids=["", "options"]
)
@pytest.mark.parametrize("mode", MODES)
def test_each_mode_ends_where_the_oracle_ends(train, tiny_dir, episodes, sampling_logps, mode, options):
    actual, _ = train(vllm_importance_sampling_mode=mode, **BOUNDS, **options)
    policy = load_model(tiny_dir)
    start = parameters_of(policy)
    settings = {"lr": LEARNING_RATE, "temperature": TEMPERATURE, **BOUNDS, **options}

    def oracle(logps, **overrides):
        return seeupo_iteration(
            load_model(tiny_dir),
            as_groups(episodes),
            OracleSettings(**{**settings, "vllm_importance_sampling_mode": mode, **overrides}),
            ref_model=load_model(tiny_dir),
            sampling_logps=logps,
        ).parameters

    # log-probabilities of the sampler pass through float32
    assert relative_error(actual, oracle(sampling_logps), start) < 1e-6
    assert relative_error(actual, oracle(None), start) > 1e-3
    others = [other for other in MODES if other != mode]
    assert all(
        relative_error(actual, oracle(sampling_logps, vllm_importance_sampling_mode=other), start) > 1e-4
        for other in others
    )


def test_without_the_correction_the_samplers_logps_change_nothing(train, tiny_dir, episodes):
    actual, trainer = train(vllm_importance_sampling_correction=False)
    policy = load_model(tiny_dir)
    start = parameters_of(policy)
    settings = OracleSettings(lr=LEARNING_RATE, temperature=TEMPERATURE)
    expected = seeupo_iteration(policy, as_groups(episodes), settings).parameters
    assert relative_error(actual, expected, start) < 1e-9
    assert not any(name.startswith("sampling/") for entry in trainer.state.log_history for name in entry)


def test_the_sampler_gets_the_weights_once_before_the_updates(train, tiny_dir):
    after, trainer = train()
    start = parameters_of(load_model(tiny_dir))
    (received,) = trainer.vllm_generation.received
    assert all(torch.equal(received[name], start[name]) for name in start)
    assert trainer.state.log_history[0]["turn_updates"] == 5
    assert any(not torch.equal(after[name], start[name]) for name in start)
