"""
A short supervised warm-up on ground-truth conversations.

A small model writes no tool call by itself, and reinforcement learning cannot reward what never happens. A few steps
on the assistant's tokens of perfect conversations change that.
"""

import logging
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trl.chat_template_utils import get_training_chat_template
from trl.trainer.utils import add_fused_lm_head

from ..scoring.rows import RowScorer
from ..scoring.turn_buffer import TurnBuffer
from ..trajectory import Trajectory, turns_from_mask


logger = logging.getLogger(__name__)


def tokenize_conversation(tokenizer: Any, messages: list[dict], tools: list[dict] | None) -> Trajectory:
    """A ground-truth conversation as the turns a policy would have played."""
    encoded = tokenizer.apply_chat_template(
        messages,
        tools=tools,
        chat_template=get_training_chat_template(tokenizer),
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    token_ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    first = mask.index(1)
    return Trajectory(turns=turns_from_mask(token_ids[:first], token_ids[first:], mask[first:], None))


def train_last_layers(model: PreTrainedModel, count: int) -> None:
    """
    Leave all of a model as it is but its last layers and the norm behind them. The layers before them are computed
    without a backward pass, and their activations, gradients and optimizer states need no memory. With gradient
    checkpointing, which trainers have by default, they would have one all the same, and be computed twice.

    Args:
        model (`PreTrainedModel`):
            A decoder with the attributes `model.layers` and `model.norm`, as Llama, Qwen and most others.
        count (`int`):
            How many layers to train.

    Raises:
        `ValueError`:
            When the model does not have as many layers.
    """
    layers = model.model.layers
    if not 1 <= count <= len(layers):
        raise ValueError(f"trained_layers is {count}; this model has {len(layers)} layers: give 1 to {len(layers)}.")
    if model.is_gradient_checkpointing:
        logger.warning(
            "trained_layers=%d saves no time here: gradient checkpointing computes all layers twice and backward. Set "
            "gradient_checkpointing to false, unless the activations do not fit.",
            count,
        )
    model.requires_grad_(False)
    for module in (*layers[-count:], model.model.norm):
        module.requires_grad_(True)


def warm_up(
    model_path: str | Path,
    target: Path,
    conversations: list[tuple[list[dict], list[dict] | None]],
    steps: int,
    learning_rate: float,
    batch_size: int = 4,
    seed: int = 0,
    trained_layers: int | None = None,
    **loading: Any,
) -> None:
    """
    Train a model on the assistant's tokens of conversations, and save it with its tokenizer.

    Args:
        model_path (`str` or `Path`):
            Model to start from.
        target (`Path`):
            Directory to save to.
        conversations (`list[tuple[list[dict], list[dict]]]`):
            Messages and tools of each conversation.
        steps (`int`):
            Optimizer steps.
        learning_rate (`float`):
            Peak learning rate; it rises for three steps and then falls linearly.
        batch_size (`int`, *optional*, defaults to `4`):
            Conversations of a step.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order of the conversations.
        trained_layers (`int`, *optional*):
            Train only this many of the last layers, see [`train_last_layers`]. `None` trains the whole model.
        **loading:
            Given to `from_pretrained`, as `revision`.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_path, **loading)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, **loading)
    model.train()
    if trained_layers is None:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        train_last_layers(model, trained_layers)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    scorer = RowScorer(model, tokenizer.pad_token_id, temperature=1.0)
    trajectories = [tokenize_conversation(tokenizer, *conversation) for conversation in conversations]
    buffer = TurnBuffer(trajectories)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    rng = random.Random(seed)
    order: list[int] = []
    for step in range(steps):
        if len(order) < batch_size:
            order += rng.sample(range(len(trajectories)), len(trajectories))
        members, order = order[:batch_size], order[batch_size:]
        keys = [(i, turn) for i in set(members) for turn in range(1, len(trajectories[i].turns) + 1)]
        num_tokens = sum(len(buffer.turn(key).action_ids) for key in keys)
        loss = 0.0
        # one conversation after the other, its layers computed twice: activations would be most of the memory
        for batch in scorer.micro_batches(buffer, keys, max_rows=1):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                scores, _ = scorer.score(model, batch)
            share = -torch.cat([score.logps for score in scores.values()]).sum() / num_tokens
            share.backward()
            loss += share.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min((step + 1) / 3, (steps - step) / steps)
        optimizer.step()
        optimizer.zero_grad()
        print(f"\rwarm-up {step + 1}/{steps}  loss {loss:.3f}", end="", flush=True)
    print()
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
