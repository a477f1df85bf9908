"""Rollouts of message-level environments with TRL's own trainer."""

import pytest
import trl
from byte_tokenizer import forced_end
from talk import Fragile, Talk, row, user

from seeupo_trl.rollout import MultiTurnRollout


@pytest.mark.skipif(trl.__version__.startswith("1.15"), reason="GRPOTrainer of trl 1.15 needs a GPU to train")
@pytest.mark.parametrize("template", ["qwen2_5", "qwen3"])
def test_it_trains_a_stock_grpo_trainer(make_trainer, template):
    rows = [row([user("Go on.")], number=i) for i in range(4)]

    class Lengthy(Talk):
        def step(self, message):
            result = super().step(message)
            result.reward = float(len(message["content"]))
            return result

    rollout = MultiTurnRollout(Lengthy, tasks=rows)
    trainer = make_trainer(rows, template, rollout=rollout, generation_kwargs=forced_end(), learning_rate=1e-2)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.global_step == 2
    assert "rewards/environment_reward/mean" in trainer.state.log_history[0]
    assert any(not p.equal(before[name]) for name, p in trainer.model.named_parameters())


@pytest.mark.skipif(trl.__version__.startswith("1.15"), reason="GRPOTrainer of trl 1.15 needs a GPU to train")
def test_a_failed_episode_does_not_stop_a_stock_grpo_trainer(make_trainer):
    rows = [row(fails_in=None), row(fails_in="step")]
    rollout = MultiTurnRollout(Fragile, tasks=rows)
    trainer = make_trainer(
        rows, rollout=rollout, generation_kwargs=forced_end(), per_device_train_batch_size=4, steps_per_generation=1
    )
    trainer.train()
    assert trainer.state.log_history[0]["rewards/environment_reward/mean"] == 1.0


def test_the_same_rollout_serves_two_trainers(make_trainer):
    rows = [row([user("Go on.")])]
    rollout = MultiTurnRollout(Talk, tasks=rows)
    for template in ("qwen2_5", "qwen3"):
        trainer = make_trainer(rows, template, generation_kwargs=forced_end())
        (trajectory,) = rollout([rows[0]["prompt"]], trainer)["trajectories"]
        text = trainer.processing_class.decode(trajectory.turns[0].context_ids)
        assert ("You are Qwen" in text) == (template == "qwen2_5")
