"""The user's configuration: classes of its own, changes before and after the trainer is made, several trainers."""

import copy
import json
import pickle
import re
import warnings
from dataclasses import dataclass, field, fields
from types import SimpleNamespace

import pytest
import torch
from grpo_script import config, logged, moved, parameters_of, settings, text_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from trl import GRPOConfig

from seeupo_trl import SeeUPOConfig, SeeUPOTrainer
from seeupo_trl.grpo_compatibility import FIXED_ARGUMENTS


@dataclass
class OfSeeUPO(SeeUPOConfig):
    """What scripts add to a configuration."""

    curriculum: str = field(default="easy")

    @property
    def is_hard(self):
        return self.curriculum == "hard"

    def to_dict(self):
        return super().to_dict() | {"note": "mine"}

    def get_warmup_steps(self, num_training_steps):
        return num_training_steps


@dataclass
class OfGRPO(GRPOConfig):
    """The same for GRPO."""

    curriculum: str = field(default="easy")
    is_hard = OfSeeUPO.is_hard
    get_warmup_steps = OfSeeUPO.get_warmup_steps

    def to_dict(self):
        return super().to_dict() | {"note": "mine"}


@dataclass(slots=True)
class WithSlots(OfSeeUPO):
    """One whose fields, inherited ones too, are not in its `__dict__`."""

    phase: int = 0


@dataclass(slots=True)
class OfGRPOWithSlots(OfGRPO):
    phase: int = 0


OWN_CLASSES = pytest.mark.parametrize("own_class", [OfSeeUPO, OfGRPO, WithSlots, OfGRPOWithSlots])


class OnFirstStep(TrainerCallback):
    """Changes the arguments, or something else, when the first iteration has ended."""

    def __init__(self, owner=None, **values):
        self.owner = owner
        self.values = values

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            for name, value in self.values.items():
                setattr(self.owner or args, name, value)


@pytest.fixture
def two_turns(tiny_dir):
    """Episodes of two turns, and rewards that tell them apart."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)

    def rollout(prompts, trainer):
        return {
            "prompt_ids": tokenizer(prompts)["input_ids"],
            "completion_ids": [[20 + n, 21, 22, 23 + n, 3] for n in range(len(prompts))],
            "logprobs": [[0.0] * 5] * len(prompts),
            "env_mask": [[1, 1, 0, 1, 1]] * len(prompts),
        }

    return {
        "rollout_func": rollout,
        "reward_funcs": lambda completion_ids, **columns: [ids[0] for ids in completion_ids],
    }


# ---- classes of the user's ----


@OWN_CLASSES
def test_arguments_keep_the_class_of_the_configuration(make, tmp_path, own_class):
    trainer = make(own_class(**settings(tmp_path, curriculum="hard", max_steps=2, gradient_accumulation_steps=2)))
    for args in (trainer.args, trainer.config, copy.copy(trainer.args), copy.deepcopy(trainer.args)):
        assert isinstance(args, own_class) and isinstance(args, SeeUPOConfig)
        assert args.is_hard
        written = args.to_dict()
        assert (written["curriculum"], written["note"]) == ("hard", "mine")
        assert (written["update_order"], written["gradient_accumulation_steps"]) == ("reverse", 2)
        assert {f.name for f in fields(args)} >= {f.name for f in fields(SeeUPOConfig)} | {"curriculum"}
    trainer.train()
    assert logged(trainer, "learning_rate") == [0.0, 0.005]  # its own warm-up


@OWN_CLASSES
def test_saved_arguments_are_of_the_class_that_was_given(make, tmp_path, own_class):
    given = {"curriculum": "hard", "gradient_accumulation_steps": 2, "num_iterations": 3}
    trainer = make(own_class(**settings(tmp_path, **given)))
    trainer.save_model(tmp_path / "saved")
    saved = torch.load(tmp_path / "saved" / "training_args.bin", weights_only=False)
    assert isinstance(saved, own_class) and type(saved) is type(trainer.config)
    assert {name: getattr(saved, name) for name in given} == given
    assert pickle.loads(pickle.dumps(saved)).to_dict() == saved.to_dict() == trainer.args.to_dict()


def test_rollouts_have_the_options_of_a_configuration_with_slots(make, tmp_path):
    trainer = make(WithSlots(**settings(tmp_path, stop_token_ids=list(range(96)))))
    trainer.train()
    assert logged(trainer, "completions/mean_length") == [1.0, 1.0]


def test_a_field_of_the_users_with_the_name_of_one_of_ours_is_said():
    with pytest.warns(UserWarning, match="WithTurns has a field `max_turns`, and so has SeeUPOConfig"):

        @dataclass
        class WithTurns(SeeUPOConfig):
            max_turns: int = 2


def test_a_default_that_is_changed_in_a_subclass_is_no_other_field():
    with warnings.catch_warnings():
        warnings.simplefilter("error")

        @dataclass
        class Saving(SeeUPOConfig):
            save_trajectories: bool = True
            max_turns: int | None = 2
            max_context_length: "int | None" = 4096  # as text, where `from __future__ import annotations` is

    assert Saving.max_turns == 2


def test_a_field_of_a_grpo_configuration_with_the_name_of_one_of_ours_is_said_and_kept(make, tmp_path):
    @dataclass
    class WithTurns(GRPOConfig):
        max_turns: int = 2

    with pytest.warns(UserWarning, match="WithTurns has a field `max_turns`"):
        assert make(WithTurns(**settings(tmp_path))).args.max_turns == 2


@pytest.mark.parametrize("own", [{"a": 1}, SimpleNamespace(a=1)], ids=["dict", "namespace"])
@pytest.mark.parametrize("is_set_first", [True, False])
def test_a_trainer_may_have_a_config_of_its_own(tiny_dir, tmp_path, own, is_set_first):
    class WithConfig(SeeUPOTrainer):
        def __init__(self, *args, **kwargs):
            if is_set_first:
                self.config = own
            super().__init__(*args, **kwargs)
            self.config = own

    reward = lambda completion_ids, **columns: [float(ids[0]) for ids in completion_ids]  # noqa: E731
    trainer = WithConfig(
        tiny_dir, reward_funcs=reward, args=config(tmp_path, max_steps=1), train_dataset=text_dataset()
    )
    before = parameters_of(trainer)
    trainer.train()
    assert moved(trainer, before) and trainer.config is own


# ---- several trainers ----


@pytest.mark.parametrize("config_class", [SeeUPOConfig, GRPOConfig])
def test_a_second_trainer_made_from_the_first_ones_arguments_trains_as_it_did(make, tmp_path, config_class):
    given = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
    first = make(config_class(**settings(tmp_path, **given, num_iterations=3, max_steps=1)))
    second = make(first.args)
    assert second.args.to_dict() == first.args.to_dict()
    assert vars(second.args) == vars(first.args)
    for trainer in (first, second):
        trainer.train()
    assert logged(second, "optimizer_steps") == logged(first, "optimizer_steps") == [6.0]


# ---- changes before the trainer is made ----


@pytest.mark.parametrize("config_class", [SeeUPOConfig, GRPOConfig])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("top_entropy_quantile", 0.1, "selects single tokens"),
        ("loss_type", "nonsense", "`loss_type='nonsense'` is not one of"),
        ("gradient_accumulation_steps", 2, "must divide `steps_per_generation`"),
        ("per_device_train_batch_size", 2, "changed after the configuration was made"),
        ("optim", "lomo", "steps each layer during the backward pass"),
    ],
)
def test_a_configuration_that_was_changed_is_checked_again(make, tmp_path, config_class, name, value, message):
    args = config_class(**settings(tmp_path))
    setattr(args, name, value)
    with pytest.raises(ValueError, match=message):
        make(args)


@pytest.mark.parametrize("value", ["group", True])
def test_a_changed_scale_of_rewards_means_what_it_means_when_it_is_given(make, tmp_path, value):
    args = config(tmp_path)
    args.scale_rewards = value
    with pytest.warns(UserWarning, match="scale_rewards='group'"):
        trainer = make(args)
    assert trainer.args.scale_rewards == trainer.scale_rewards == "batch"
    assert args.scale_rewards is value


def test_a_configuration_that_was_not_changed_warns_once(make, tmp_path):
    with pytest.warns(UserWarning, match="scale_rewards='group'"):
        args = config(tmp_path, scale_rewards="group")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make(args)


# ---- changes after the trainer was made ----


@pytest.mark.parametrize("config_class", [SeeUPOConfig, GRPOConfig, WithSlots, OfGRPOWithSlots])
def test_a_change_of_the_users_configuration_is_refused_where_grpo_would_read_it(make, tmp_path, config_class):
    args = config_class(**settings(tmp_path))
    trainer = make(args)
    args.max_steps = 4
    with pytest.raises(ValueError, match=r"`args\.max_steps` was changed from 2 to 4"):
        trainer.train()


@pytest.mark.parametrize("config_class", [SeeUPOConfig, GRPOConfig])
def test_what_no_trainer_reads_may_be_changed_and_added(make, tmp_path, config_class):
    args = config_class(**settings(tmp_path, max_steps=1))
    trainer = make(args)
    args.resume_from_checkpoint, args.do_train, args.do_eval, args.run_note = "x", True, True, "mine"
    trainer.config.run_note = "mine"
    trainer.train()
    assert trainer.state.global_step == 1


@OWN_CLASSES
def test_a_field_that_scripts_add_may_change_in_a_run(make, tmp_path, own_class):
    args = own_class(**settings(tmp_path))
    trainer = make(args)
    for owner in (args, trainer.config, trainer.args):
        trainer.add_callback(OnFirstStep(owner, curriculum="hard"))
    trainer.train()
    assert trainer.state.global_step == 2
    assert args.is_hard and trainer.config.is_hard and trainer.args.is_hard


def test_a_change_of_the_arguments_takes_effect_in_the_next_iteration(make, two_turns):
    settings_of_run = {"max_steps": 2, "optim": "sgd", "max_grad_norm": 0.0}
    trainer = make(settings_of_run, callbacks=[OnFirstStep(advantage_clip=1e-6, max_turn_updates=1)], **two_turns)
    trainer.train()
    assert logged(trainer, "optimizer_steps") == [2.0, 1.0]
    assert max(map(abs, list(trainer._logs["advantages"])[-4:])) <= 1e-6


def test_changed_arguments_are_checked(make, two_turns):
    trainer = make(callbacks=[OnFirstStep(max_turn_updates=0)], **two_turns)
    with pytest.raises(ValueError, match="`max_turn_updates` must be at least 1"):
        trainer.train()


@pytest.mark.parametrize("name", sorted(FIXED_ARGUMENTS))
def test_a_change_of_arguments_that_are_read_once_is_refused(make, name):
    trainer = make(callbacks=[OnFirstStep(**{name: 3})])
    with pytest.raises(ValueError, match=rf"`trainer\.args\.{name}` was changed"):
        trainer.train()


def test_a_surrogate_that_there_is_not_is_refused_in_a_run_as_well(make):
    trainer = make({"max_steps": 1})
    trainer.loss_type = "nonsense"
    with pytest.raises(
        ValueError, match="`trainer.loss_type` was changed to 'nonsense', which is not one of 'seeupo'"
    ):
        trainer.train()


# ---- options of the Trainer that do not go with updates turn by turn ----


def test_accumulation_over_iterations_is_refused(tmp_path):
    kwargs = {"gradient_accumulation_kwargs": {"num_steps": 2}}
    with pytest.raises(ValueError, match="`num_steps` in .* Use `gradient_accumulation_steps`"):
        config(tmp_path, accelerator_config=kwargs)
    config(tmp_path, accelerator_config={"gradient_accumulation_kwargs": {"num_steps": 1}})


def test_noise_on_embeddings_is_said(make):
    with pytest.warns(UserWarning, match="`neftune_noise_alpha=5.0` draws new noise"):
        make({"neftune_noise_alpha": 5.0})


@pytest.mark.parametrize(
    ("lora_dropout", "attention_dropout", "options", "said"),
    [
        (0.05, 0.0, {}, r"lora_dropout\.default\.p` is 0\.05"),
        (0.0, 0.1, {}, r"self_attn\.attention_dropout` is 0\.1"),
        (0.05, 0.0, {"disable_dropout": True}, None),
        (0.0, 0.0, {}, None),
    ],
)
def test_dropout_is_said_once(lora_dropout, attention_dropout, options, said, make, tiny_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_dir, attention_dropout=attention_dropout)
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=lora_dropout)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        make(options, model=model, processing_class=AutoTokenizer.from_pretrained(tiny_dir), peft_config=adapter)
    messages = [str(warning.message) for warning in record if "dropout" in str(warning.message)]
    assert len(messages) == (said is not None)
    assert said is None or re.search(said, messages[0])


def test_a_checkpoint_that_is_asked_for_within_an_iteration_is_made_after_it(make, two_turns, tmp_path):
    class Ask(TrainerCallback):
        steps = 0

        def on_optimizer_step(self, args, state, control, **kwargs):
            self.steps += 1
            if self.steps == 3:  # the first of two in the second iteration
                callbacks = trainer.callback_handler.callbacks
                [saving] = [c for c in callbacks if isinstance(c, JITCheckpointCallback)]
                saving.jit_manager.is_checkpoint_requested = True  # as a signal does

    options = {"optim": "sgd", "lr_scheduler_type": "constant", "max_steps": 4}
    trainer = make(options | {"enable_jit_checkpoint": True}, callbacks=[Ask()], **two_turns)
    trainer.train()
    [checkpoint] = tmp_path.glob("checkpoint-*")
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == 2
    whole, resumed = make(options, **two_turns), make(options, **two_turns)
    whole.train()
    resumed.train(resume_from_checkpoint=str(checkpoint))
    after = parameters_of(whole)
    assert all(torch.equal(value, after[name]) for name, value in parameters_of(resumed).items())
