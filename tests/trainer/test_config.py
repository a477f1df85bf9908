"""The configuration says early and clearly what it cannot do."""

import copy
import dataclasses
import math
import pickle
import re
import subprocess
import sys
import warnings

import pytest
from transformers import HfArgumentParser
from trl import GRPOConfig, TrlParser

from seeupo_trl import SeeUPOConfig
from seeupo_trl.seeupo_config import PRESETS
from seeupo_trl.trainer_inputs import arguments_for_trl


def config(**kwargs) -> SeeUPOConfig:
    return SeeUPOConfig(**{"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": "none", **kwargs})


def test_defaults_are_the_algorithm_of_the_paper_with_a_bounded_turn_weight():
    defaults = config()
    assert defaults.update_order == "reverse"
    assert defaults.old_policy == "iteration"
    assert defaults.turn_ratio == "geometric"
    assert (defaults.surrogate_ratio, defaults.turn_credit) == ("geometric", "episode")
    assert defaults.turn_weight_clip == 0.2
    assert (defaults.max_turn_updates, defaults.advantage_clip) == (None, None)
    assert defaults.scale_rewards == "batch"
    assert defaults.max_turns == 10


def test_defaults_warn_about_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        config()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"update_order": "backward"}, "`update_order='backward'` is not one of 'reverse', 'forward'"),
        ({"old_policy": "theta"}, "`old_policy='theta'` is not one of"),
        ({"turn_ratio": "mean"}, "`turn_ratio='mean'` is not one of"),
        ({"surrogate_ratio": "mean"}, "`surrogate_ratio='mean'` is not one of"),
        ({"surrogate_ratio": "product", "loss_type": "vespo"}, "`loss_type='vespo'` has its own ratio"),
        ({"turn_credit": "turn"}, "`turn_credit='turn'` is not one of"),
        ({"turn_credit": "to_go", "update_order": "simultaneous"}, "update all of them as one"),
        ({"turn_credit": "to_go", "max_turn_updates": 1}, "update all of them as one"),
        ({"turn_credit": "to_go", "zero_variance": "resample"}, "Choose one of the two"),
        ({"importance_sampling_level": "word"}, "`importance_sampling_level='word'` is not one of 'sequence'"),
        ({"vllm_importance_sampling_mode": "token"}, "`vllm_importance_sampling_mode='token'` is not one of"),
        ({"max_turns": 0}, "`max_turns` must be at least 1"),
        ({"max_turns": 2.5}, "`max_turns` must be at least 1 and whole, or `None` for no limit; got 2.5."),
        ({"max_turn_updates": True}, "`max_turn_updates` must be at least 1 and whole"),
        ({"max_resampling_rounds": 1.5}, "`max_resampling_rounds` is 1.5; give a whole number"),
        ({"advantage_clip": math.nan}, "`advantage_clip` is nan, which is not a number"),
        ({"temperature": math.nan}, "`temperature` is nan, which is not a number"),
        ({"max_turn_updates": 0}, "`max_turn_updates` must be at least 1"),
        ({"max_context_length": -5}, "`max_context_length` must be at least 1"),
        ({"turn_weight_clip": 0.0}, "`turn_weight_clip` must lie between 0 and 1"),
        ({"turn_weight_clip": 1.0}, "`turn_weight_clip` must lie between 0 and 1"),
        ({"advantage_clip": 0.0}, "`advantage_clip` must be positive"),
        ({"top_entropy_quantile": 0.2}, "`top_entropy_quantile=0.2` selects single tokens"),
        ({"loss_type": "gspo"}, "`loss_type='gspo'` is not one of 'seeupo', 'luspo', 'cispo', 'sapo', 'vespo'"),
        ({"loss_type": "cispo", "delta": 4.0}, "`delta=4.0` bounds the ratio of a clipped surrogate"),
        ({"scale_rewards": "median"}, "`scale_rewards='median'` is not one of"),
        ({"optim": "lomo"}, "`optim='lomo'` steps each layer during the backward pass"),
        ({"optim": "adalomo"}, "`optim='adalomo'` steps each layer"),
        ({"optim": "galore_adamw_layerwise"}, "`optim='galore_adamw_layerwise'` steps each layer"),
        ({"optim": "apollo_adamw_layerwise"}, "`optim='apollo_adamw_layerwise'` steps each layer"),
        ({"num_generations": 1}, "at least 2 generations"),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 6}, "must divide `steps_per_generation`"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(**options)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_its_settings_and_takes_others(name):
    given = {"output_dir": "unused", "use_cpu": True, "bf16": False, "report_to": "none"}
    preset = SeeUPOConfig.preset(name, **given)
    assert {field: getattr(preset, field) for field in PRESETS[name]} == PRESETS[name]
    changed = SeeUPOConfig.preset(name, turn_ratio="geometric", turn_weight_clip=0.1, epsilon=0.3, **given)
    assert (changed.turn_ratio, changed.turn_weight_clip, changed.epsilon) == ("geometric", 0.1, 0.3)
    assert f'`"{name}"`' in SeeUPOConfig.preset.__doc__


def test_the_presets_of_the_paper_and_of_its_code_differ_where_these_do():
    differ = {field for field in PRESETS["paper"] if PRESETS["paper"][field] != PRESETS["authors"][field]}
    assert differ == {"old_policy", "turn_ratio", "turn_weight_clip", "advantage_clip"}


def test_a_preset_that_is_none_is_named_with_those_there_are():
    with pytest.raises(ValueError, match="no preset 'theory'; there are 'paper', 'authors'"):
        SeeUPOConfig.preset("theory", output_dir="unused")


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_loss_type_that_only_averages_differently_warns(loss_type):
    with pytest.warns(UserWarning, match=f"`loss_type='{loss_type}'` has no effect"):
        assert config(loss_type=loss_type).loss_type == "seeupo"


@pytest.mark.parametrize("scale_rewards", ["group", True])
def test_group_wise_scaling_warns_and_means_batch(scale_rewards):
    with pytest.warns(UserWarning, match="scale_rewards='group'"):
        assert config(scale_rewards=scale_rewards).scale_rewards == "batch"


def test_token_level_ratio_warns_and_means_sequence():
    with pytest.warns(UserWarning, match="importance_sampling_level='token'"):
        assert config(importance_sampling_level="token").importance_sampling_level == "sequence"


def test_plain_grpo_config_is_upgraded_and_left_as_it_is():
    grpo = GRPOConfig("unused", use_cpu=True, bf16=False, report_to="none", learning_rate=3e-6, num_generations=4)
    upgraded = SeeUPOConfig.from_grpo_config(grpo)
    assert isinstance(upgraded, SeeUPOConfig)
    assert (upgraded.learning_rate, upgraded.num_generations) == (3e-6, 4)
    assert (upgraded.update_order, upgraded.turn_weight_clip) == ("reverse", 0.2)
    assert (upgraded.scale_rewards, upgraded.importance_sampling_level) == ("batch", "sequence")
    assert (upgraded.loss_type, upgraded.use_bias_correction_kl) == ("seeupo", False)
    assert (grpo.scale_rewards, grpo.importance_sampling_level, grpo.loss_type) == ("group", "token", "dapo")


def test_upgrade_refuses_what_was_asked_for_and_cannot_work():
    grpo = GRPOConfig("unused", use_cpu=True, bf16=False, report_to="none", top_entropy_quantile=0.2)
    with pytest.raises(ValueError, match="top_entropy_quantile=0.2"):
        SeeUPOConfig.from_grpo_config(grpo)


def test_every_field_is_documented():
    added = {f.name for f in dataclasses.fields(SeeUPOConfig)} - {f.name for f in dataclasses.fields(GRPOConfig)}
    documented = set(re.findall(r"^        (\w+) \(`", SeeUPOConfig.__doc__, re.MULTILINE))
    assert added <= documented


def test_fields_can_be_given_on_the_command_line():
    (parsed,) = HfArgumentParser(SeeUPOConfig).parse_args_into_dataclasses(
        "--output_dir unused --use_cpu true --bf16 false --update_order random --max_turn_updates 4 "
        "--turn_weight_clip 0.1 --advantage_clip 3".split()
    )
    assert (parsed.update_order, parsed.max_turn_updates) == ("random", 4)
    assert (parsed.turn_weight_clip, parsed.advantage_clip) == (0.1, 3.0)


def test_all_options_of_grpo_are_known_on_the_command_line_but_one_that_is_the_default():
    grpo, ours = ({*TrlParser((cls,))._option_string_actions} for cls in (GRPOConfig, SeeUPOConfig))
    assert grpo - ours == {"--no_use_bias_correction_kl", "--no-use-bias-correction-kl"}
    assert SeeUPOConfig(output_dir="out", bf16=False).use_bias_correction_kl is False


@pytest.mark.parametrize("parser", [HfArgumentParser, TrlParser])
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("", None),
        ("--cast_lm_head_to_fp32", True),
        ("--cast_lm_head_to_fp32 true", True),
        ("--cast_lm_head_to_fp32 false", False),
    ],
)
def test_a_flag_that_may_be_unset_is_given_as_in_grpo(parser, option, value):
    given = f"--output_dir unused {option} --use_cpu true --bf16 false".split()
    (parsed,) = parser(SeeUPOConfig).parse_args_into_dataclasses(given)
    assert parsed.cast_lm_head_to_fp32 is value


def test_command_line_names_the_allowed_values(capsys):
    with pytest.raises(SystemExit):
        HfArgumentParser(SeeUPOConfig).parse_args_into_dataclasses("--output_dir x --update_order sideways".split())
    assert "reverse" in capsys.readouterr().err


def test_importing_the_package_loads_no_torch():
    code = "import sys, seeupo_trl; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def limit_of_tool_calls(args: SeeUPOConfig) -> int | None:
    return arguments_for_trl(args, uses_tools=True).max_tool_calling_iterations


def from_command_line(tmp_path, *options: str, yaml: str | None = None) -> SeeUPOConfig:
    given = ["--output_dir", "unused", "--use_cpu", "true", "--bf16", "false", "--report_to", "none", *options]
    if yaml is not None:
        (tmp_path / "config.yaml").write_text(yaml)
        given += ["--config", str(tmp_path / "config.yaml")]
    return TrlParser(SeeUPOConfig).parse_args_and_config(given)[0]


def test_tools_have_no_limit_unless_max_turns_is_given(tmp_path):
    """However the configuration came to be. 10 that was given is a limit, although it is the default."""
    for untouched in (
        config(),
        SeeUPOConfig.from_grpo_config(GRPOConfig("unused", use_cpu=True, bf16=False, report_to="none")),
        SeeUPOConfig.from_grpo_config(config()),
        from_command_line(tmp_path),
        from_command_line(tmp_path, yaml="beta: 0.1"),
        config(max_turns=None),
    ):
        for args in (untouched, pickle.loads(pickle.dumps(untouched)), copy.deepcopy(untouched)):
            assert limit_of_tool_calls(args) is None
    for given in (
        config(max_turns=10),
        from_command_line(tmp_path, "--max_turns", "10"),
        from_command_line(tmp_path, yaml="max_turns: 10"),
    ):
        for args in (given, pickle.loads(pickle.dumps(given)), SeeUPOConfig.from_grpo_config(given)):
            assert limit_of_tool_calls(args) == 9
    assert limit_of_tool_calls(config(max_turns=10, max_tool_calling_iterations=3)) == 3


def test_limits_that_were_not_given_are_written_as_plain_numbers():
    written = config().to_dict()
    assert (type(written["max_turns"]), type(written["env_timeout"])) == (int, float)
    written = config(max_turns=None, env_timeout=None).to_dict()
    assert (written["max_turns"], written["env_timeout"]) == (None, None)


def test_a_configuration_that_is_written_out_in_full_gives_max_turns(tmp_path):
    unwritten = SeeUPOConfig(output_dir=str(tmp_path), use_cpu=True)
    written = SeeUPOConfig(output_dir=str(tmp_path), use_cpu=True, max_turns=unwritten.to_dict()["max_turns"])
    limits = [arguments_for_trl(args, uses_tools=True).max_tool_calling_iterations for args in (unwritten, written)]
    assert limits == [None, 9]
