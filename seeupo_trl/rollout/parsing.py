"""Responses of the policy that are nested too deeply to be read."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from ..envs.plain import is_deep, is_deep_text


class BoundedParser:
    """
    A tokenizer's `parse_response`, in which a response that is nested too deeply is one that cannot be parsed, a
    `ValueError`: parsers, templates and environments walk through what they are given, and Python's recursion ends.

    A text and a list of token ids are responses. Batches and arrays, which only scripts parse, are parsed as ever.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.parse_response = tokenizer.parse_response

    def __call__(self, response: Any, *args: Any, **options: Any) -> Any:
        if isinstance(response, list) and all(isinstance(token, int) for token in response):
            text = self.tokenizer.decode(response)
        elif isinstance(response, str):
            text = response
        else:
            return self.parse_response(response, *args, **options)
        if not is_deep_text(text):
            try:
                message = self.parse_response(response, *args, **options)
            except RecursionError as error:  # deeper than its text shows
                raise ValueError("nested too deeply") from error
            if not is_deep(message):
                return message
        raise ValueError("nested too deeply")
