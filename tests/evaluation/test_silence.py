"""Each silent way of learning nothing is said once."""

import logging

import pytest
from datasets import Dataset
from talk import Talk, row
from tiny import ON_CPU, load_tiny_model, save_tiny_model, tiny_tokenizer

from seeupo_trl import SeeUPOConfig, SeeUPOTrainer
from seeupo_trl.evaluation.silence import ALL_EQUAL, ALL_TRUNCATED, NO_GRADIENT, Silence


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


class Detached(SeeUPOTrainer):
    """Its objective does not depend on the parameters."""

    def turn_surrogate(self, *args):
        return 0.0 * super().turn_surrogate(*args)


def train(tmp_path, model_path, reward, detached=False, environment=None, **config):
    trainer = (Detached if detached else SeeUPOTrainer)(
        model=load_tiny_model(model_path),
        reward_funcs=reward,
        args=SeeUPOConfig(
            str(tmp_path),
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=4,
            max_steps=2,
            **{**ON_CPU, **config},
        ),
        train_dataset=Dataset.from_list([row(number=i) for i in range(2)] if environment else [{"prompt": "w1"}] * 2),
        processing_class=tiny_tokenizer(),
        environment_factory=environment,
    )
    trainer.train()


def different(completions, **kwargs):
    return [float(i) for i in range(len(completions))]


def equal(completions, **kwargs):
    return [1.0] * len(completions)


@pytest.mark.parametrize(
    ("reward", "options", "said"),
    [
        (equal, {}, [ALL_EQUAL]),
        (different, {"detached": True}, [NO_GRADIENT]),
        (different, {"generation_kwargs": {"suppress_tokens": [0, 3]}}, [ALL_TRUNCATED]),
        (different, {"generation_kwargs": {"suppress_tokens": [0, 3]}, "environment": Talk}, [ALL_TRUNCATED]),
        (different, {}, []),
    ],
    ids=["equal rewards", "no gradient", "truncated", "truncated episodes", "all is well"],
)
def test_a_run_says_once_why_it_learns_nothing(tmp_path, model_path, caplog, reward, options, said):
    options = {"generation_kwargs": {"forced_eos_token_id": 3}, **options}
    with caplog.at_level(logging.WARNING):
        train(tmp_path, model_path, reward, **options)
    messages = [record.getMessage() for record in caplog.records]
    assert [m for m in messages if m in (ALL_EQUAL, ALL_TRUNCATED, NO_GRADIENT)] == said


def test_what_is_not_silent_is_not_said(caplog):
    silence = Silence()
    silence.hear_episodes({"stop_reason/response_truncated": 0.9}, 1.0)
    silence.hear_episodes({}, 0.5)
    silence.hear_advantages([0.0, 1.0])
    silence.hear_gradients([0.0, 1e-9])
    silence.hear_gradients([float("nan")])
    assert not caplog.records
