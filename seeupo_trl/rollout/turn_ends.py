"""
Where a turn of the policy ends: at an end-of-sequence token, a further stop token, or a stop string.

What counts is the text of one response, whatever stood before it. A turn keeps its tokens as they were sampled, up to
and including the one that ends it: the rest of what a backend returned (padding, or tokens of a backend that cannot
stop at strings) was sampled after the end and is dropped.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from .chat_format import REASONING
from .settings import RolloutSettings


if TYPE_CHECKING:
    from trl import GRPOTrainer


# Tokens by which the end of a text is decoded too early, so that no character is cut in two.
MARGIN = 8

Message = dict[str, Any]


class TurnEnds:
    """
    The ends of turns.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The policy's tokenizer.
        eos_token_ids (`Sequence[int]`):
            Tokens at which every backend stops by itself.
        token_ids (`Sequence[int]`, *optional*, defaults to `()`):
            Further tokens that end a turn.
        strings (`Sequence[str]`, *optional*, defaults to `()`):
            Texts that end a turn as soon as a response contains them.

    Raises:
        `ValueError`:
            When the tokenizer has no such token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: Sequence[int],
        token_ids: Sequence[int] = (),
        strings: Sequence[str] = (),
    ):
        unknown = [token_id for token_id in token_ids if not 0 <= token_id < len(tokenizer)]
        if unknown:
            raise ValueError(
                f"stop_token_ids has {unknown[0]}, but the tokenizer has the tokens 0 to {len(tokenizer) - 1}. Take "
                "ids from `tokenizer.convert_tokens_to_ids`."
            )
        self.further_token_ids = [i for i in dict.fromkeys(token_ids) if i not in eos_token_ids]
        self.token_ids = [*eos_token_ids, *self.further_token_ids]
        self.strings = list(dict.fromkeys(strings))
        self._tokenizer = tokenizer
        # no text of a token is shorter than a byte
        self._window = MARGIN + max((len(string.encode()) for string in self.strings), default=0)

    @classmethod
    def of(
        cls,
        settings: RolloutSettings,
        trainer: "GRPOTrainer",
        tokenizer: PreTrainedTokenizerBase,
        end_of_message: Sequence[int] = (),
    ) -> "TurnEnds":
        """
        The ends that a rollout has, those among the trainer's `generation_kwargs` included: `stop_strings` and
        `eos_token_id` of transformers, `stop` and `stop_token_ids` of vLLM.

        Args:
            settings ([`~seeupo_trl.rollout.settings.RolloutSettings`]):
                Options of the rollout.
            trainer ([`~trl.GRPOTrainer`]):
                The trainer whose policy plays.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                Its tokenizer.
            end_of_message (`Sequence[int]`, *optional*, defaults to `()`):
                Tokens that end a message in the chat template.
        """
        given = trainer.args.generation_kwargs or {}
        names = ("stop", "stop_token_ids") if trainer.use_vllm else ("stop_strings", "eos_token_id")
        strings, token_ids = (_listed(given.get(name)) for name in names)
        return cls(
            tokenizer,
            trainer.eos_token_ids,
            [*end_of_message, *settings.stop_token_ids, *token_ids],
            [*settings.stop_strings, *strings],
        )

    def are_in(self, response_ids: list[int]) -> bool:
        """Whether a response is whole: its last token ends the turn."""
        return bool(response_ids) and (response_ids[-1] in self.token_ids or self._have_string(response_ids))

    def length_of(self, response_ids: list[int]) -> int:
        """Number of tokens of a response up to and including the first that ends the turn; all where none does."""
        lengths = [response_ids.index(i) + 1 for i in self.further_token_ids if i in response_ids]
        if self._have_string(response_ids):
            too_short, enough = 0, len(response_ids)
            while enough - too_short > 1:
                middle = (too_short + enough) // 2
                if self._have_string(response_ids[:middle]):
                    enough = middle
                else:
                    too_short = middle
            lengths.append(enough)
        return min(lengths, default=len(response_ids))

    def have_just_ended(self, responses: list[list[int]]) -> list[bool]:
        """Whether each response, in which no stop string was before its last token, has one now."""
        if not self.strings:
            return [False] * len(responses)
        return self._strings_in([response_ids[-self._window :] for response_ids in responses])

    def trimmed(self, message: Message) -> Message:
        """A message whose text ends with its stop string: the token that completed it may hold more than that."""
        for name in ("content", *REASONING):
            text = message.get(name)
            if isinstance(text, str):
                ends = [text.index(string) + len(string) for string in self.strings if string in text]
                message = {**message, name: text[: min(ends, default=len(text))]}
        return message

    @contextmanager
    def applied_to(self, trainer: "GRPOTrainer") -> Iterator[None]:
        """
        Have the trainer's backend stop there. Transformers' continuous batching stops at tokens only, and goes on to
        the end of the message after a stop string.

        Args:
            trainer ([`~trl.GRPOTrainer`]):
                The trainer.
        """
        with ExitStack() as stack:
            if self.further_token_ids or self.strings:
                settings = self._settings_of_vllm if trainer.use_vllm else self._settings_of_transformers
                for owner, values in settings(trainer):
                    stack.enter_context(replaced(owner, **values))
            if self.strings and not trainer.use_vllm:
                model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
                stack.enter_context(replaced(model, generate=self._stopping(model.generate)))
            yield

    def _settings_of_vllm(self, trainer: "GRPOTrainer") -> list[tuple[Any, dict[str, Any]]]:
        vllm = trainer.vllm_generation
        values = {**vllm.generation_kwargs, "stop": self.strings, "stop_token_ids": self.further_token_ids}
        return [(vllm, {"generation_kwargs": values})]

    def _settings_of_transformers(self, trainer: "GRPOTrainer") -> list[tuple[Any, dict[str, Any]]]:
        ends = {"eos_token_id": self.token_ids, "stop_strings": None}
        config = copy(trainer.generation_config)
        config.update(**ends)
        values = {"generation_config": config, "generation_kwargs": {**trainer.generation_kwargs, **ends}}
        return [(trainer, {**values, "eos_token_ids": self.token_ids})]

    def _stopping(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """A model's `generate` that stops at the strings."""

        def generate_to_the_end(*, input_ids: torch.Tensor, **inputs: Any) -> Any:
            criterion = _EndOfRows(partial(self._just_ended, prompt_length=input_ids.shape[1]))
            criteria = StoppingCriteriaList([criterion])
            return generate(input_ids=input_ids, stopping_criteria=criteria, **inputs)

        return generate_to_the_end

    def _just_ended(self, input_ids: torch.Tensor, prompt_length: int) -> torch.Tensor:
        """Whether each row, of which the first tokens are a prompt's, has a stop string at its end, shape `(B,)`."""
        start = max(prompt_length, input_ids.shape[1] - self._window)
        return torch.tensor(self._strings_in(input_ids[:, start:].tolist()), device=input_ids.device)

    def _have_string(self, response_ids: list[int]) -> bool:
        return bool(self.strings) and self._strings_in([response_ids])[0]

    def _strings_in(self, rows: list[list[int]]) -> list[bool]:
        texts = self._tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return [any(string in text for string in self.strings) for text in texts]


class _EndOfRows(StoppingCriteria):
    """
    Ends the rows that a function says. Transformers' own criterion for strings would also take one that begins in the
    prompt, where a response is not whole.
    """

    def __init__(self, have_ended: Callable[[torch.Tensor], torch.Tensor]):
        self._have_ended = have_ended

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        return self._have_ended(input_ids)


@contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Other attributes of an object itself inside the context, which may be methods of its class."""
    before = {name: vars(owner)[name] for name in attributes if name in vars(owner)}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name in attributes:
            if name in before:
                setattr(owner, name, before[name])
            else:
                delattr(owner, name)


def _listed(value: Any) -> list[Any]:
    """An option that is nothing, one thing or a list of them."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple, set)) else [value]
