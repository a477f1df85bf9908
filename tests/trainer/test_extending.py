"""Scripts that extend or steer GRPOTrainer: what they change takes effect here too, or is refused by name."""

import collections
import copy
from types import FunctionType

import pytest
import torch
import trl
from grpo_script import chat_dataset, logged, moved, parameters_of, settings, small_tokens, text_dataset
from packaging.version import Version
from tiny import ON_CPU, load_tiny_model
from tool_calls import Counter, increment
from transformers import Trainer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from seeupo_trl import SeeUPOConfig, SeeUPOTrainer, Trajectory, Turn
from seeupo_trl.grpo_compatibility import (
    CALLED_METHODS,
    FIXED_ATTRIBUTES,
    ORDER_ATTRIBUTES,
    READ_ATTRIBUTES,
    REFUSED_METHODS,
    TOOL_LOOP_METHODS,
    TRL_ATTRIBUTES,
)


# What GRPOTrainer has for the model card and for transformers' own loss.
DECLARATIONS = {"loss_is_scaled_for_ga", "_tag_names", "_name", "_paper"}


class OnStep(TrainerCallback):
    """Does something when the first iteration has ended."""

    def __init__(self, action):
        self.action = action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.action()


# ---- every name of GRPOTrainer is decided ----


def test_every_method_of_grpo_trainer_is_decided():
    methods = {name for name in vars(GRPOTrainer) if not name.startswith("__")} - DECLARATIONS
    decided = REFUSED_METHODS.keys() | TOOL_LOOP_METHODS.keys() | CALLED_METHODS
    assert methods <= decided, "TRL has new methods: decide in grpo_compatibility.py what becomes of an override"


def test_every_public_attribute_of_grpo_trainer_is_decided(tiny_dir, tmp_path):
    arguments = GRPOConfig(**ON_CPU, output_dir=str(tmp_path), num_generations=2, per_device_train_batch_size=2)
    stock = GRPOTrainer(tiny_dir, reward_funcs=small_tokens, args=arguments, train_dataset=text_dataset())
    general = Trainer(load_tiny_model(tiny_dir), args=copy.copy(arguments))
    attributes = {name for name in vars(stock).keys() - vars(general).keys() if not name.startswith("_")}
    decided = READ_ATTRIBUTES | FIXED_ATTRIBUTES | ORDER_ATTRIBUTES | TRL_ATTRIBUTES
    assert attributes <= decided, "TRL has new attributes: decide in grpo_compatibility.py what a change of them does"


@pytest.mark.parametrize("name", REFUSED_METHODS)
def test_an_override_that_would_never_be_called_is_refused(make_of, name):
    extended = type("Extended", (SeeUPOTrainer,), {name: lambda self, *args, **kwargs: None})
    with pytest.raises(TypeError, match=rf"Extended overrides `{name}`, which SeeUPOTrainer does not call"):
        make_of(extended)


@pytest.mark.parametrize("name", TOOL_LOOP_METHODS)
def test_an_override_of_the_tool_loop_is_refused_where_it_does_not_run(make_of, tool_dir, name):
    extended = type("Extended", (SeeUPOTrainer,), {name: getattr(GRPOTrainer, name)})
    make_of(extended, model=tool_dir, train_dataset=chat_dataset(), tools=[increment])
    with pytest.raises(TypeError, match=f"overrides `{name}`"):
        make_of(extended, model=tool_dir, train_dataset=chat_dataset(), environment_factory=Counter)


def test_an_override_by_a_mixin_is_refused_as_well(make_of):
    class Mixin:
        def compute_loss(self, *args, **kwargs):
            return None

    class Extended(Mixin, SeeUPOTrainer):
        pass

    with pytest.raises(TypeError, match=r"Mixin overrides `compute_loss`.*turn_surrogate"):
        make_of(Extended)


# ---- hooks ----


def test_the_surrogate_of_a_turn_can_be_replaced(make_of):
    calls = []

    class Mean(SeeUPOTrainer):
        def turn_surrogate(self, ratios, weights, actions, settings):
            calls.append((ratios.shape, weights.shape, actions.lengths.tolist()))
            return 0.0 * super().turn_surrogate(ratios, weights, actions, settings)

    trainer = make_of(Mean)
    before = parameters_of(trainer)
    trainer.train()
    assert calls and not moved(trainer, before)
    for ratios, weights, lengths in calls:
        assert ratios == weights == (len(lengths),) and min(lengths) >= 1


def test_a_surrogate_of_another_shape_is_refused(make_of):
    class Summed(SeeUPOTrainer):
        def turn_surrogate(self, *args):
            return super().turn_surrogate(*args).sum()

    with pytest.raises(ValueError, match=r"one value for each of the \d+ actions"):
        make_of(Summed).train()


def test_episodes_can_be_left_out(make_of):
    trained = []

    class Filtered(SeeUPOTrainer):
        def select_episodes(self, episodes):
            episodes.is_left_out[0] = True
            return episodes

        def turn_surrogate(self, ratios, weights, actions, settings):
            trained.append(len(weights))
            return super().turn_surrogate(ratios, weights, actions, settings)

    make_of(Filtered, {"max_steps": 1}).train()
    assert sum(trained) == 3  # of four


# ---- the batch ----


def test_rows_that_a_subclass_replaces_are_trained_on(make_of):
    replayed = []

    class Replay(SeeUPOTrainer):
        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            batch["completion_ids"][0], batch["completion_mask"][0] = 25, 0
            batch["completion_mask"][0, :3] = 1
            return batch

        def turn_surrogate(self, ratios, weights, actions, settings):
            replayed.extend(actions.lengths.tolist())
            return super().turn_surrogate(ratios, weights, actions, settings)

    trainer = make_of(Replay, {"max_steps": 1, "max_completion_length": 8, "generation_kwargs": {"min_new_tokens": 8}})
    trainer.train()
    assert trainer._batch.trajectories[0].turns[0].action_ids == [25] * 3
    assert sorted(replayed) == [3, 8, 8, 8]


def test_episodes_put_in_the_place_of_others_are_rows_of_the_batch(make_of):
    class Replay(SeeUPOTrainer):
        def select_episodes(self, episodes):
            first = episodes.trajectories[0].turns[0].context_ids
            turns = [Turn(first, [26, 27, 28, 29, 30]), Turn([*first, 26, 27, 28, 29, 30, 31], [32, 33])]
            episodes.trajectories[0] = Trajectory(turns=turns)
            episodes.trajectories[1] = Trajectory(turns=turns[:1])
            episodes.is_left_out[1] = True
            return episodes

        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            masks = batch["completion_mask"] * batch["tool_mask"]
            rows.extend(batch["completion_ids"][i][masks[i].bool()].tolist() for i in range(4))
            batch["completion_mask"][:, 0] = 0  # not to be trained on
            return batch

    rows = []
    trainer = make_of(Replay, {"max_steps": 1, "max_completion_length": 4, "generation_kwargs": {"min_new_tokens": 4}})
    trainer.train()
    replayed, left_out, *played = trainer._batch.trajectories
    assert rows[:2] == [[26, 27, 28, 29, 30, 32, 33], []] and [len(row) for row in rows[2:]] == [4, 4]
    assert [turn.action_ids for turn in replayed.turns] == [[27, 28, 29, 30], [32, 33]]
    assert replayed.turns[1].context_ids[-6:] == [26, 27, 28, 29, 30, 31]
    assert [trajectory.turns[0].action_ids for trajectory in played] == [row[1:] for row in rows[2:]]
    assert trainer._batch.trained[1].turns == [] and left_out.turns


def test_advantages_that_a_subclass_changes_take_effect(make_of):
    class Nothing(SeeUPOTrainer):
        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            batch["advantages"] = torch.zeros_like(batch["advantages"])
            return batch

    trainer = make_of(Nothing)
    before = parameters_of(trainer)
    trainer.train()
    assert not moved(trainer, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch: batch | {"advantages": batch["advantages"][:, None].expand(-1, 6)}, r"shape \(4, 6\)"),
        (lambda batch: batch | {"advantages": batch["advantages"][:2]}, "4 rows and 2 advantages for 4 episodes"),
        (lambda batch: {name: value for name, value in batch.items() if name != "episodes"}, "without `episodes`"),
    ],
)
def test_a_batch_that_does_not_fit_its_episodes_is_refused(make_of, change, message):
    class Changed(SeeUPOTrainer):
        def _generate_and_score_completions(self, inputs):
            return change(super()._generate_and_score_completions(inputs))

    with pytest.raises(ValueError, match=message):
        make_of(Changed).train()


# ---- values that a callback changes ----


def test_beta_can_be_annealed(make):
    trainer = make({"beta": 1.0, "max_steps": 2})
    trainer.add_callback(OnStep(lambda: setattr(trainer, "beta", 0.0)))
    trainer.train()
    assert ["kl" in entry for entry in trainer.state.log_history if "entropy" in entry] == [True, False]


def test_the_clipping_range_can_be_changed(make):
    trainer = make({"num_iterations": 2, "epsilon": 0.99, "epsilon_high": 100.0, "max_steps": 2})

    def tighten():
        trainer.epsilon_low = trainer.epsilon_high = 1e-6

    trainer.add_callback(OnStep(tighten))
    trainer.train()
    wide, tight = logged(trainer, "clip_ratio/region_mean")
    assert wide == 0 and tight > 0


def test_beta_without_a_reference_model_is_refused(make):
    trainer = make()
    trainer.add_callback(OnStep(lambda: setattr(trainer, "beta", 0.1)))
    with pytest.raises(ValueError, match="no reference model"):
        trainer.train()


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [("", "num_iterations", 3), ("", "temperature", 0.5), ("config", "turn_weight_clip", None)],
)
def test_a_change_that_nothing_would_read_is_refused(make, owner, name, value):
    trainer = make()
    trainer.add_callback(OnStep(lambda: setattr(trainer.config if owner else trainer, name, value)))
    with pytest.raises(ValueError, match=rf"`trainer\.{owner + '.' if owner else ''}{name}` was changed"):
        trainer.train()


def test_a_change_that_is_refused_is_said_in_a_few_words(make, tiny_dir):
    trainer = make({"beta": 0.1})
    trainer.ref_model = load_tiny_model(tiny_dir)
    with pytest.raises(ValueError, match=r"`trainer\.ref_model` was changed from Qwen3ForCausalLM") as raised:
        trainer.train()
    assert len(str(raised.value)) < 700


STREAMS = pytest.mark.parametrize("is_stream", [False, True], ids=["dataset", "stream"])


def noted_prompts(is_stream):
    """Data and rewards for a trainer, and the prompts of each batch that are rewarded."""
    batches = []

    def reward(prompts, completion_ids, **columns):
        batches.append(list(prompts))
        return small_tokens(completion_ids)

    dataset = text_dataset().to_iterable_dataset() if is_stream else text_dataset()
    return {"train_dataset": dataset, "reward_funcs": reward}, batches


@STREAMS
@pytest.mark.parametrize("config_class", [SeeUPOConfig, GRPOConfig])
def test_the_order_of_prompts_can_be_set_before_training_begins(make, tmp_path, is_stream, config_class):
    data, batches = noted_prompts(is_stream)
    trainer = make(config_class(**settings(tmp_path)), **data)
    trainer.shuffle_dataset, trainer.num_generations = False, 4
    trainer.train()
    assert batches == [[prompt] * 4 for prompt in text_dataset()["prompt"][:2]]
    trainer.num_generations = 2
    trainer.train()
    assert batches[2] == [prompt for prompt in text_dataset()["prompt"][:2] for _ in range(2)]


@STREAMS
@pytest.mark.parametrize(("name", "value"), [("num_generations", 4), ("shuffle_dataset", False)])
def test_a_change_of_what_orders_prompts_is_refused_in_a_run(make, is_stream, name, value):
    data, batches = noted_prompts(is_stream)
    trainer = make(**data)
    trainer.add_callback(OnStep(lambda: setattr(trainer, name, value)))
    with pytest.raises(
        ValueError, match=rf"`trainer\.{name}` was changed .* after training began.*before `train\(\)`"
    ):
        trainer.train()
    assert len(batches) == 1


def test_a_sampler_of_the_scripts_own_may_repeat_a_few_rows(make_of):
    class OneRow(SeeUPOTrainer):
        def _get_train_sampler(self, dataset=None):
            return [0, 0, 0, 0] * 4

    data, batches = noted_prompts(is_stream=False)
    make_of(OneRow, **data | {"train_dataset": text_dataset().select([5])}).train()
    assert batches == [[text_dataset()["prompt"][5]] * 4] * 2


# ---- what scripts read ----


def test_groups_without_variance_are_counted_by_group(make):
    trainer = make({"max_steps": 1}, reward_funcs=lambda completion_ids, **kwargs: [0.0, 1.0, 0.5, 0.5])
    trainer.train()
    assert logged(trainer, "frac_reward_zero_std") == [0.5]


def test_the_arguments_that_are_saved_and_logged_are_those_that_were_given(make, tmp_path):
    given = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_iterations": 3, "max_steps": 1}
    trainer = make(given)
    for name, value in given.items():
        assert trainer.args.to_dict()[name] == value
        assert copy.deepcopy(trainer.args).to_dict()[name] == value
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    saved = torch.load(tmp_path / "saved" / "training_args.bin", weights_only=False)
    assert type(saved) is SeeUPOConfig
    assert {name: getattr(saved, name) for name in given} == given


def test_an_optimizer_with_two_modes_is_in_the_right_one(make, tiny_dir):
    class ScheduleFree(torch.optim.SGD):
        mode = "eval"

        def train(self):
            self.mode = "train"

        def eval(self):
            self.mode = "eval"

        def step(self, *args, **kwargs):
            assert self.mode == "train"
            return super().step(*args, **kwargs)

    model = load_tiny_model(tiny_dir)
    optimizer = ScheduleFree(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = make(
        {"eval_strategy": "steps", "eval_steps": 1},
        model=model,
        optimizers=(optimizer, schedule),
        eval_dataset=text_dataset(),
    )
    before = parameters_of(trainer)
    trainer.train()
    assert moved(trainer, before)


def test_a_trainer_that_was_never_constructed_has_its_defaults():
    bare = object.__new__(SeeUPOTrainer)
    assert bare._tool_rollout is None and bare._evaluation is None and not bare._is_idle


def test_a_subclass_may_count_what_it_evaluated(make_of):
    class Counting(SeeUPOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.num_evaluated = 0

        def evaluate(self, *args, **kwargs):
            self.num_evaluated += 1
            return super().evaluate(*args, **kwargs)

    trainer = make_of(Counting, eval_dataset=text_dataset())
    trainer.evaluate()
    assert trainer.num_evaluated == 1


# ---- every method that a run calls ----


def calls_of(trainer_class, config_class, directory, model):
    """How often each method of the trainer is called in a run with evaluation, checkpoints and a resumption."""
    calls = collections.Counter()
    names = {
        name
        for owner in GRPOTrainer.__mro__
        for name, value in vars(owner).items()
        if isinstance(value, FunctionType) and not name.startswith("__")
    }

    def counted(name):
        def method(self, *args, **kwargs):
            calls[name] += 1
            return getattr(super(counting, self), name)(*args, **kwargs)

        return method

    refused = REFUSED_METHODS if issubclass(trainer_class, SeeUPOTrainer) else {}
    counting = type("Counting", (trainer_class,), {name: counted(name) for name in names - refused.keys()})
    options = {"beta": 0.1, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    arguments = config_class(**settings(directory, max_steps=2, logging_steps=1, **options))
    data = {"train_dataset": text_dataset(), "eval_dataset": text_dataset().select(range(2))}
    trainer = counting(model, reward_funcs=small_tokens, args=arguments, **data)
    trainer.train()
    trainer.train(resume_from_checkpoint=str(directory / "checkpoint-1"))
    trainer.save_model(str(directory / "final"))
    return calls


@pytest.mark.skipif(Version(trl.__version__) < Version("1.16.0"), reason="trl 1.15 itself trains on GPUs only")
def test_every_method_that_a_run_of_grpo_calls_is_called_here_as_often(tiny_dir, tmp_path):
    """So an override of any of them takes effect, also of those that only the Trainer underneath has."""
    stock = calls_of(GRPOTrainer, GRPOConfig, tmp_path / "stock", tiny_dir)
    ours = calls_of(SeeUPOTrainer, SeeUPOConfig, tmp_path / "ours", tiny_dir)
    # around forward passes, of which there are others; and one that only shards inputs for context parallelism
    elsewhere = {"autocast_smart_context_manager", "compute_loss_context_manager", "_prepare_context_parallel_inputs"}
    different = {name for name, times in stock.items() if ours[name] != times} - REFUSED_METHODS.keys() - elsewhere
    assert different <= {"_get_output_dir"}  # asked for trajectories, too
    assert all(ours[name] for name in different | elsewhere - {"_prepare_context_parallel_inputs"})


def test_what_a_subclass_does_to_the_prepared_batch_takes_effect(make_of):
    class Nothing(SeeUPOTrainer):
        def _prepare_inputs(self, inputs):
            batch = super()._prepare_inputs(inputs)
            return batch | {"advantages": torch.zeros_like(batch["advantages"])}

    trainer = make_of(Nothing)
    before = parameters_of(trainer)
    trainer.train()
    assert not moved(trainer, before)


def test_an_evaluation_may_play_another_number_of_episodes(make_of):
    played = []

    class Once(SeeUPOTrainer):
        def evaluate(self, *args, **kwargs):
            before, self.num_generations_eval = self.num_generations_eval, 1
            try:
                return super().evaluate(*args, **kwargs)
            finally:
                self.num_generations_eval = before

    def reward(completion_ids, **columns):
        played.append(len(completion_ids))
        return small_tokens(completion_ids)

    trainer = make_of(Once, reward_funcs=reward, eval_dataset=text_dataset().select(range(4)))
    assert trainer.evaluate()["eval_episodes/tasks"] == 4
    assert sum(played) == 4


def test_metrics_and_logs_of_a_subclass_are_logged(make_of):
    class Logging(SeeUPOTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = super().training_step(model, inputs, num_items_in_batch)
            self._metrics["train"]["prompts"].append(float(len(inputs)))
            self.log({"of_this_step": 7.0})
            return loss

    trainer = make_of(Logging, {"max_steps": 2, "logging_steps": 1})
    trainer.train()
    assert logged(trainer, "prompts") == [4.0, 4.0] and logged(trainer, "of_this_step") == [7.0, 7.0]


def test_the_norm_at_which_gradients_are_clipped_can_be_changed(make):
    trainer = make({"max_steps": 2, "optim": "sgd", "max_grad_norm": 1.0})
    trainer.add_callback(OnStep(lambda: setattr(trainer.args, "max_grad_norm", 1e-12)))
    trainer.add_callback(OnStep(lambda: snapshots.append(parameters_of(trainer))))
    snapshots = []
    trainer.train()
    after = parameters_of(trainer)
    assert max((after[name] - value).abs().max() for name, value in snapshots[0].items()) < 1e-9
