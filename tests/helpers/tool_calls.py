"""Tiny models whose vocabulary has whole tool calls as single tokens, so that they call at random, and tools."""

from pathlib import Path

import torch
from tiny import VOCABULARY, tiny_config, tiny_tokenizer
from transformers import AddedToken, PreTrainedTokenizerFast, Qwen3ForCausalLM


# One token each: a call that works, the same with text for a number, one without arguments, one that names no tool,
# one that is not JSON, and two that are nested deeply
CALL = '<tool_call> {"name": "increment", "arguments": {"step": 2}} </tool_call>'
TEXT_CALL = '<tool_call> {"name": "increment", "arguments": {"step": "w2"}} </tool_call>'
BARE_CALL = '<tool_call> {"name": "look", "arguments": {}} </tool_call>'
WRONG_NAME = '<tool_call> {"name": "decrement", "arguments": {"step": 2}} </tool_call>'
MALFORMED = "<tool_call> {increment </tool_call>"
DEEP, BOTTOMLESS = (
    f'<tool_call> {{"name": "look", "arguments": {{"thing": {"[" * depth}{"]" * depth}}}}} </tool_call>'
    for depth in (500, 5000)
)
CALLS = [CALL, TEXT_CALL, BARE_CALL, WRONG_NAME, MALFORMED, DEEP, BOTTOMLESS]

# How TRL finds the calls in a response of the tiny models.
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|> assistant",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close_pattern": r"</tool_call>\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
    },
}


def calling_tokenizer(calls: list[str]) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with one more token for each call."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in calls])
    tokenizer.response_template = RESPONSE_TEMPLATE
    return tokenizer


def save_calling_model(directory: str | Path, calls: list[str]) -> str:
    """Write a random model for these calls and its tokenizer to `directory`, and return its path."""
    tokenizer = calling_tokenizer(calls)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(tiny_config(vocab_size=len(tokenizer), initializer_range=0.02))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def only(*texts: str, calls: list[str] = CALLS) -> dict[str, list[int]]:
    """Sampling settings under which the policy can say nothing but these tokens and the end of its turn."""
    allowed = {*texts, "<|im_end|>"}
    return {"suppress_tokens": [index for index, token in enumerate([*VOCABULARY, *calls]) if token not in allowed]}


def increment(step: int) -> int:
    """
    Adds to a counter.

    Args:
        step: What to add.

    Returns:
        What was added.
    """
    return step


class Counter:
    """An environment of TRL: public methods are tools, and it owns its reward."""

    def reset(self, start: int = 0, **row) -> str:
        self.value = start
        return f"w{start}"

    def increment(self, step: int) -> int:
        """
        Adds to the counter.

        Args:
            step: What to add.

        Returns:
            The counter.
        """
        self.value += step
        return self.value

    def get_reward(self) -> float:
        return float(self.value)
