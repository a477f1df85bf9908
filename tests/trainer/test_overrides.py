"""Methods that a script writes anew or patches: what they return is trained on, or they are refused by name."""

import contextlib
import functools

import pytest
import torch
from grpo_script import logged, moved, parameters_of, small_tokens, text_dataset
from transformers import Trainer, TrainerCallback
from trl import GRPOTrainer
from trl.trainer.utils import shuffle_sequence_dict

from seeupo_trl import SeeUPOTrainer
from seeupo_trl.grpo_compatibility import check_overrides, own_methods


class Trained(SeeUPOTrainer):
    """Notes the episodes that an iteration trains on."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.actions = [[turn.action_ids for turn in trajectory.turns] for trajectory in self._batch.trained]
        return loss


# ---- rewards and generation ----


def test_rewards_that_a_subclass_shapes_are_those_of_the_advantages(make_of):
    class Shaped(SeeUPOTrainer):
        def _calculate_rewards(self, *args, **kwargs):
            return super()._calculate_rewards(*args, **kwargs) * 0.0

    trainer = make_of(Shaped)
    before = parameters_of(trainer)
    trainer.train()
    assert not moved(trainer, before)
    assert set(logged(trainer, "frac_reward_zero_std")) == {1.0}


def test_rewards_of_a_method_written_anew_are_trained_on(make_of):
    class Own(SeeUPOTrainer):
        def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
            rewards = [[float(len(set(ids)) + i)] for i, ids in enumerate(completion_ids_list)]
            return self.accelerator.gather(torch.tensor(rewards))

    trainer = make_of(Own, {"max_steps": 1})
    before = parameters_of(trainer)
    trainer.train()
    assert moved(trainer, before)
    assert trainer._batch.rewards_per_func.shape == (4, 1)


def test_rewards_of_a_method_put_into_the_trainer_are_trained_on(make_of):
    trainer = make_of(SeeUPOTrainer)
    own = trainer._calculate_rewards
    trainer._calculate_rewards = lambda *args, **kwargs: own(*args, **kwargs).clamp(0.0, 0.0)
    before = parameters_of(trainer)
    trainer.train()
    assert not moved(trainer, before)
    assert trainer._calculate_rewards is not own  # it is the script's again


def test_tokens_that_a_subclass_writes_over_those_generated_are_trained_on(make_of):
    class Edited(Trained):
        def _generate(self, prompts):
            prompt_ids, completion_ids, *rest = super()._generate(prompts)
            completion_ids[0] = [30, 31]
            return (prompt_ids, completion_ids, *rest)

    trainer = make_of(Edited, {"max_steps": 1, "generation_kwargs": {"min_new_tokens": 6}})
    trainer.train()
    assert trainer.actions[0] == [[30, 31]]
    assert [len(turns[0]) for turns in trainer.actions[1:]] == [6, 6, 6]


def test_the_better_of_two_generations_is_trained_on(make_of):
    class BestOfTwo(Trained):
        def _generate(self, prompts):
            one, two = super()._generate(prompts), super()._generate(prompts)
            self.chosen = [min(pair) for pair in zip(one[1], two[1], strict=True)]
            return (one[0], list(self.chosen), *two[2:])

    trainer = make_of(BestOfTwo, {"max_steps": 1})
    trainer.train()
    assert trainer.actions == [[ids] for ids in trainer.chosen]


def test_a_generation_written_anew_is_trained_on(make_of):
    class Own(Trained):
        def _generate(self, prompts):
            prompt_ids = [[20, 21] for _ in prompts]
            completion_ids = [[30 + i, 31] for i in range(len(prompts))]
            return prompt_ids, completion_ids, None, ["" for _ in prompts], None, {}, None, None

    trainer = make_of(Own, {"max_steps": 1})
    before = parameters_of(trainer)
    trainer.train()
    assert trainer.actions == [[[30 + i, 31]] for i in range(4)]
    assert moved(trainer, before)


# ---- the batch ----


def changed(change):
    """A trainer whose batch is changed before it is trained on."""

    class Changed(Trained):
        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            change(batch)
            return batch

    return Changed


def test_a_mask_that_was_not_there_keeps_tokens_out(make_of):
    def mask(batch):
        batch["tool_mask"] = torch.zeros_like(batch["completion_ids"])
        batch["tool_mask"][0, :2] = 1

    trainer = make_of(changed(mask), {"max_steps": 1, "generation_kwargs": {"min_new_tokens": 6}})
    trainer.train()
    assert [[len(ids) for ids in turns] for turns in trainer.actions] == [[2], [], [], []]


def test_a_hole_in_the_completion_mask_is_what_the_policy_read(make_of):
    def hole(batch):
        batch["completion_mask"][0, 1:3] = 0

    trainer = make_of(changed(hole), {"max_steps": 1, "generation_kwargs": {"min_new_tokens": 6}})
    trainer.train()
    assert [[len(ids) for ids in turns] for turns in trainer.actions] == [[1, 3], [6], [6], [6]]
    first, second = trainer._batch.trajectories[0].turns
    assert len(second.context_ids) == len(first.context_ids) + 3


@pytest.mark.parametrize("name", ["old_per_token_logps", "ref_per_token_logps", "importance_sampling_ratio"])
def test_what_the_update_would_not_read_is_refused(make_of, name):
    def add(batch):
        batch[name] = torch.zeros_like(batch["completion_ids"], dtype=torch.float32)

    with pytest.raises(ValueError, match=rf"`{name}` was put into the batch.*turn_surrogate"):
        make_of(changed(add)).train()


def test_who_reads_log_probabilities_in_the_batch_is_told_where_they_are(make_of):
    with pytest.raises(KeyError, match=r"no `ref_per_token_logps`.*actions\.reference"):
        make_of(changed(lambda batch: batch["ref_per_token_logps"]), {"beta": 0.1}).train()


def test_a_copy_of_the_preparation_of_inputs_is_told_to_call_the_original(make_of):
    class Copied(SeeUPOTrainer):
        def _prepare_inputs(self, inputs):
            return shuffle_sequence_dict(self._generate_and_score_completions(inputs))

    with pytest.raises(TypeError, match=r"split, repeated or permuted.*super\(\)\._prepare_inputs"):
        make_of(Copied).train()


# ---- losses ----


def other_loss(*args, **kwargs):
    return torch.zeros(())


@pytest.mark.parametrize("name", ["_compute_loss", "compute_loss", "_get_per_token_logps_and_entropies"])
@pytest.mark.parametrize("owner", ["trainer", SeeUPOTrainer, GRPOTrainer])
def test_a_loss_that_is_put_into_a_trainer_or_its_classes_is_refused(make_of, name, owner, monkeypatch):
    trainer = make_of(SeeUPOTrainer)
    monkeypatch.setattr(trainer if owner == "trainer" else owner, name, other_loss, raising=False)
    where = "this trainer" if owner == "trainer" else owner.__name__
    with pytest.raises(TypeError, match=rf"`{name}` of {where} was replaced.*turn_surrogate"):
        trainer.train()


@pytest.mark.parametrize("name", ["_compute_loss", "compute_loss"])
def test_a_loss_that_is_wrapped_is_refused_though_it_names_the_module_of_the_original(make_of, name, monkeypatch):
    trainer = make_of(SeeUPOTrainer)
    original = getattr(GRPOTrainer, name)
    monkeypatch.setattr(GRPOTrainer, name, functools.wraps(original)(lambda *args: 2 * original(*args)))
    with pytest.raises(TypeError, match=rf"`{name}` of GRPOTrainer was replaced.*turn_surrogate"):
        trainer.train()


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (GRPOTrainer, "training_step"),
        (GRPOTrainer, "_prepare_inputs"),
        (GRPOTrainer, "_get_train_sampler"),
        (Trainer, "training_step"),
    ],
)
def test_what_is_put_into_a_class_behind_a_method_of_seeupos_own_is_refused(make_of, owner, name, monkeypatch):
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, functools.wraps(original)(lambda *args: original(*args)))
    with pytest.raises(TypeError, match=f"`{name}` of {owner.__name__} is not called.*Put yours into SeeUPOTrainer"):
        make_of(SeeUPOTrainer)


@pytest.mark.parametrize(
    ("owner", "name"),
    [(GRPOTrainer, "_compute_loss"), (GRPOTrainer, "get_off_policy_mask"), (Trainer, "training_step")],
)
def test_a_wrapper_that_was_there_before_the_package_was_imported_is_refused(make_of, owner, name, monkeypatch):
    trainer, original = make_of(SeeUPOTrainer), getattr(owner, name)
    monkeypatch.setattr(owner, name, functools.wraps(original)(lambda *args: original(*args)))
    with pytest.raises(TypeError, match=f"`{name}` of {owner.__name__}"):
        check_overrides(trainer, own_methods(SeeUPOTrainer), plays_tools=False)


def test_a_step_of_a_trainer_that_stands_behind_is_refused(make_of):
    class Stepping(Trainer):
        def training_step(self, *args, **kwargs):
            return super().training_step(*args, **kwargs)

    class Behind(SeeUPOTrainer, Stepping):
        pass

    class Before(Stepping, SeeUPOTrainer):
        pass

    class Preparing(GRPOTrainer):
        def _prepare_inputs(self, generation_batch):
            return super()._prepare_inputs(generation_batch)

    class BehindGRPO(SeeUPOTrainer, Preparing):
        pass

    make_of(Before, {"max_steps": 1}).train()
    with pytest.raises(TypeError, match="`training_step` of Stepping is not called.*a mixin that stands before it"):
        make_of(Behind)
    with pytest.raises(TypeError, match="`_prepare_inputs` of Preparing is not called"):
        make_of(BehindGRPO)


def test_a_loss_that_grpo_hides_as_well_is_left_alone(make_of, monkeypatch):
    class LossMixin:
        compute_loss = _compute_loss = other_loss

    class Extended(SeeUPOTrainer, LossMixin):
        pass

    monkeypatch.setattr(Trainer, "compute_loss", other_loss)
    trainer = make_of(Extended)
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_copy_of_the_training_step_is_told_to_call_the_original(make_of):
    class Copied(SeeUPOTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
            self.accelerator.backward(loss)
            return loss.detach()

    with pytest.raises(TypeError, match=r"`training_step` of its own.*super\(\)\.training_step"):
        make_of(Copied).train()


def test_what_a_script_has_around_the_loss_is_around_each_forward_pass(make_of):
    packed = []

    class Watched(SeeUPOTrainer):
        def compute_loss_context_manager(self):
            stack = contextlib.ExitStack()
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t))
            return stack

    make_of(Watched, {"max_steps": 1}).train()
    assert packed


# ---- callbacks ----


def test_callbacks_hear_of_micro_batches(make_of):
    events = []

    class Events(TrainerCallback):
        def on_substep_end(self, *args, **kwargs):
            events.append("substep")

        def on_optimizer_step(self, *args, **kwargs):
            events.append("step")

    options = {"max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    make_of(SeeUPOTrainer, options, callbacks=[Events()]).train()
    assert events == ["substep", "step"]


def test_in_an_iteration_without_an_update_gradients_are_zero_and_other_optimizers_step(make_of):
    norms, critic = [], torch.nn.Linear(1, 1)

    class Watched(TrainerCallback):
        def on_pre_optimizer_step(self, *args, model, **kwargs):
            norms.append(torch.stack([p.grad.norm() for p in model.parameters() if p.requires_grad]).sum().item())

        def on_step_end(self, *args, **kwargs):
            optimizer.zero_grad()
            critic(torch.ones(1)).sum().backward()
            optimizer.step()

    trainer = make_of(
        SeeUPOTrainer,
        {"max_steps": 2},
        reward_funcs=lambda completion_ids, **columns: [1.0] * len(completion_ids),
        callbacks=[Watched()],
    )
    optimizer = trainer.accelerator.prepare(torch.optim.SGD(critic.parameters(), lr=1.0))
    bias, before = critic.bias.item(), parameters_of(trainer)
    trainer.train()
    assert norms == [0.0, 0.0]
    assert critic.bias.item() == pytest.approx(bias - 2.0)
    assert not moved(trainer, before)


def test_an_epoch_that_a_callback_ends_is_followed_by_one_in_another_order(make_of):
    seen = []

    class OneStep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = True

    def reward(prompts, completion_ids, **columns):
        seen.append(tuple(prompts))
        return small_tokens(completion_ids)

    make_of(
        SeeUPOTrainer, {"max_steps": -1, "num_train_epochs": 4}, reward_funcs=reward, callbacks=[OneStep()]
    ).train()
    assert len(set(seen)) > 1


# ---- data and evaluation ----


def test_a_data_set_that_became_too_small_is_refused(make_of):
    trainer = make_of(SeeUPOTrainer)
    trainer.train_dataset = text_dataset().select(range(1))
    with pytest.raises(ValueError, match="has 1 rows, but one iteration takes 2 prompts"):
        trainer.train()


def test_a_small_training_set_does_not_keep_from_evaluating(make_of):
    trainer = make_of(SeeUPOTrainer, train_dataset=text_dataset().select(range(1)), eval_dataset=text_dataset())
    assert trainer.evaluate()["eval_episodes/tasks"] == 8


@pytest.mark.parametrize("loss_type", ["seeupo", "cispo"])
def test_an_evaluation_has_the_shares_of_clipped_ratios(make_of, loss_type):
    metrics = make_of(SeeUPOTrainer, {"loss_type": loss_type}, eval_dataset=text_dataset()).evaluate()
    assert metrics["eval_clip_ratio/region_mean"] == 0.0
    assert ("eval_cispo_clip_ratio" in metrics) == (loss_type == "cispo")
