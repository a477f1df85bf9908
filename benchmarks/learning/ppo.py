"""PPO with a critic, on TRL's trainer: what SeeUPO and GRPO do without."""

from typing import TYPE_CHECKING, Any

import torch
from transformers import Qwen3ForTokenClassification
from trl import GRPOTrainer


if TYPE_CHECKING:
    from policy import Rollout


LAMBDA = 0.95


class PPOTrainer(GRPOTrainer):
    """
    TRL's clipped surrogate with the advantage of each token from a critic (generalized advantage estimation,
    [1506.02438](https://arxiv.org/abs/1506.02438)), normalised over the batch. An episode's reward comes with its last
    token, nothing is discounted, and what an environment writes is no step. The critic is a network of its own, of the
    policy's shape and learning rate; it takes as many steps a batch as the policy does.
    """

    rollout_func: "Rollout"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # as wide and deep as the policy, from the same kind of start
        config = type(self.model.config).from_dict({**self.model.config.to_dict(), "classifier_dropout": 0.0})
        config.num_labels = 1
        self.critic = Qwen3ForTokenClassification(config)
        self.critic_optimizer = torch.optim.AdamW(self.critic.parameters(), self.args.learning_rate, weight_decay=0.0)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        mask = output["completion_mask"] * output["tool_mask"]
        with torch.no_grad():
            values = self._values(output)
        rewards = torch.tensor(self.rollout_func.last_rewards)
        advantages = generalized_advantages(values, rewards, mask)
        self._train_critic(output, values + advantages, mask)
        chosen = advantages[mask.bool()]
        output["advantages"] = (advantages - chosen.mean()) / (chosen.std() + 1e-4)
        return output

    def _values(self, output: dict[str, Any]) -> torch.Tensor:
        """What the critic expects before each token of the completions, shape `(batch, completion length)`."""
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        seen = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        values = self.critic(input_ids=ids, attention_mask=seen).logits[..., 0]
        return values[:, output["prompt_ids"].shape[1] - 1 : -1]

    def _train_critic(self, output: dict[str, Any], targets: torch.Tensor, mask: torch.Tensor) -> None:
        for _ in range(self.num_iterations):
            loss = ((self._values(output) - targets) ** 2 * mask).sum() / mask.sum()
            self.critic_optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.critic.parameters(), self.args.max_grad_norm)
            self.critic_optimizer.step()


def generalized_advantages(values: torch.Tensor, rewards: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Advantages of the policy's tokens, 0 elsewhere.

    Args:
        values (`torch.Tensor`): What is expected before each token, shape `(batch, length)`.
        rewards (`torch.Tensor`): What an episode earned, which comes with its last token, shape `(batch,)`.
        mask (`torch.Tensor`): 1 for the policy's tokens, shape `(batch, length)`.
    """
    advantages = torch.zeros_like(values)
    zero = torch.zeros_like(rewards)
    to_come, next_value, next_advantage = rewards, zero, zero
    for t in reversed(range(values.shape[1])):
        acts = mask[:, t].bool()
        advantage = to_come + next_value - values[:, t] + LAMBDA * next_advantage
        advantages[:, t] = torch.where(acts, advantage, zero)
        to_come = torch.where(acts, zero, to_come)
        next_value = torch.where(acts, values[:, t], next_value)
        next_advantage = torch.where(acts, advantage, next_advantage)
    return advantages
