"""Responses of the policy that are nested too deeply to be read."""

from types import MethodType
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..envs.plain import is_deep, is_deep_text


def bounded_parser(tokenizer: PreTrainedTokenizerBase) -> MethodType:
    """
    The tokenizer's `parse_response`, in which a response that is nested too deeply is one that cannot be parsed, a
    `ValueError`: parsers, templates and environments walk through what they are given, and Python's recursion ends.
    """
    return MethodType(_parse_bounded, tokenizer)  # a copy of the tokenizer gets one of its own


def _parse_bounded(tokenizer: PreTrainedTokenizerBase, response: list[int], **options: Any) -> dict[str, Any]:
    if not is_deep_text(tokenizer.decode(response)):
        try:
            message = type(tokenizer).parse_response(tokenizer, response, **options)
        except RecursionError:  # deeper than its text shows
            message = None
        if message is not None and not is_deep(message):
            return message
    raise ValueError("nested too deeply")
