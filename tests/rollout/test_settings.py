"""Options of a rollout: one default each, the same in code and documentation, and one meaning of "no limit"."""

import math
import re
from dataclasses import MISSING, fields, replace

import numpy
import pytest
from talk import Talk

from seeupo_trl import MultiTurnRollout, SeeUPOConfig
from seeupo_trl.rollout.settings import RolloutSettings


SETTINGS = [field.name for field in fields(RolloutSettings)]
COUNTED = ["max_turns", "max_context_length", "max_episode_tokens", "max_concurrent_envs", "max_observation_tokens"]
LIMITS = [*COUNTED, "env_timeout", "request_timeout"]


def documented(owner, name):
    """The default that the docstring of a class gives for an argument, as it stands there; `None` if it gives none."""
    (header,) = re.findall(rf"^ +{name} \((.*)\):$", owner.__doc__, re.MULTILINE)
    default = re.search(r"defaults to `(.*)`$", header)
    return default and default[1]


def written(value):
    """A default as docstrings write it."""
    return f'"{value}"' if isinstance(value, str) else {math.inf: "math.inf"}.get(value, str(value))


def test_the_configuration_and_the_rollout_have_the_same_defaults():
    arguments = SeeUPOConfig("x", use_cpu=True, bf16=False)
    assert RolloutSettings.from_arguments(arguments) == RolloutSettings()


@pytest.mark.parametrize("name", SETTINGS)
def test_docstrings_give_the_defaults_of_the_code(name):
    (default,) = (field.default for field in fields(RolloutSettings) if field.name == name)
    assert default is not MISSING
    assert documented(RolloutSettings, name) == written(default)
    # None, which is no limit or an empty list, is no default to tell of in TRL's docstrings
    assert documented(SeeUPOConfig, name) == (None if default in (math.inf, ()) else written(default))
    # what is not given is as the trainer says
    assert documented(MultiTurnRollout, name) is None


@pytest.mark.parametrize("name", LIMITS)
def test_none_is_no_limit_in_the_configuration(name):
    config = SeeUPOConfig("x", use_cpu=True, bf16=False, **{name: None})
    assert getattr(RolloutSettings.from_arguments(config), name) == math.inf


@pytest.mark.parametrize("name", SETTINGS)
def test_none_is_as_the_trainer_says_in_a_rollout(name):
    arguments = SeeUPOConfig(
        "x",
        use_cpu=True,
        bf16=False,
        history="strip_reasoning",
        max_turns=3,
        max_context_length=300,
        max_episode_tokens=200,
        max_concurrent_envs=5,
        env_timeout=None,
        env_reset_retries=7,
        max_env_failure_rate=0.1,
        max_observation_tokens=None,
        stop_strings=["</a>"],
        stop_token_ids=[3],
        lock_step_rollouts=True,
        request_timeout=None,
    )
    said, default = RolloutSettings.from_arguments(arguments), getattr(RolloutSettings(), name)
    assert getattr(said, name) != default
    assert RolloutSettings.of({name: None}, arguments) == said
    assert RolloutSettings.of({name: default}, arguments) == replace(said, **{name: default})


@pytest.mark.parametrize(
    "options",
    [{"env_timeout": 0}, {"env_reset_retries": -1}, {"max_env_failure_rate": 1.5}, {"max_concurrent_envs": 0}],
)
def test_options_out_of_range_are_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        MultiTurnRollout(Talk, **options)
    with pytest.raises(ValueError, match=name):
        SeeUPOConfig("x", use_cpu=True, bf16=False, **options)


@pytest.mark.parametrize("name", COUNTED)
def test_a_float_without_a_fraction_counts_as_the_whole_number(name):
    assert type(RolloutSettings(**{name: 8192 / 2}).__dict__[name]) is int
    value = getattr(SeeUPOConfig("x", use_cpu=True, bf16=False, **{name: 8192 / 2}), name)
    assert (value, type(value)) == (4096, int)


@pytest.mark.parametrize("value", [math.nan, True, 2.5, "3"], ids=str)
@pytest.mark.parametrize("name", [*COUNTED, "env_reset_retries"])
def test_what_is_counted_is_a_whole_number(name, value):
    with pytest.raises(ValueError, match=f"{name}.* {value!r}"):
        MultiTurnRollout(Talk, **{name: value})
    with pytest.raises(ValueError, match=name):
        SeeUPOConfig("x", use_cpu=True, bf16=False, **{name: value})


@pytest.mark.parametrize("value", [math.nan, True, "3"], ids=str)
@pytest.mark.parametrize("name", ["env_timeout", "request_timeout", "max_env_failure_rate"])
def test_what_is_measured_is_a_number(name, value):
    with pytest.raises(ValueError, match=name):
        RolloutSettings(**{name: value})
    with pytest.raises(ValueError, match=name):
        SeeUPOConfig("x", use_cpu=True, bf16=False, **{name: value})


@pytest.mark.parametrize("value", [numpy.int64(3), math.inf], ids=str)
@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_may_be_a_number_of_numpy_or_none_at_all(name, value):
    assert getattr(RolloutSettings(**{name: value}), name) == value
    config = SeeUPOConfig("x", use_cpu=True, bf16=False, **{name: value})
    assert getattr(RolloutSettings.from_arguments(config), name) == value
    config.to_dict()


@pytest.mark.parametrize("name", ["env_reset_retries", "max_env_failure_rate"])
def test_none_is_refused_where_there_must_be_a_limit(name):
    with pytest.raises(ValueError, match=name):
        SeeUPOConfig("x", use_cpu=True, bf16=False, **{name: None})
