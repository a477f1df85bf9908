"""
The chat format of a tokenizer: messages to tokens that extend earlier tokens, and tokens back to messages.
"""

import copy
import inspect
import json
import logging
from collections.abc import Sequence
from datetime import date
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_parsing.response_templates import load_response_template
from trl.chat_template_utils import (
    add_response_schema,
    get_training_chat_template,
    parse_response,
    supports_tool_calling,
)

from ..envs.base import Observation
from ..envs.tools import TEXT_TYPES, RowObservation
from .observations import mended
from .parsing import BoundedParser


if TYPE_CHECKING:
    from trl import GRPOTrainer


logger = logging.getLogger(__name__)

# trl 1.15 has no such argument: arguments of calls written as XML then keep a guessed type.
PARSES_WITH_TOOLS = "tools" in inspect.signature(parse_response).parameters

REMEMBERED_RENDERINGS = 64
ATTEMPTS = 3  # of comparing two renderings that may have seen different times
# Tokens that may hold the head of the policy's message: few, which come again, or more than templates write behind it.
TAIL_LENGTHS = (6, 32)
# Where a message has its reasoning: under the first name, and under what the template calls it (gpt-oss, LFM2.5).
REASONING = ("reasoning_content", "thinking")

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
DUMMY_QUESTION: Message = {"role": "user", "content": "dummy"}
DUMMY_ANSWER: Message = {"role": "assistant", "content": "dummy"}


class RewritingTemplateError(ValueError):
    """The chat template rewrites history, so a context cannot grow token by token."""


class ChatFormat:
    """
    Messages to tokens and back, in the chat format of a trainer's tokenizer.

    `eos_token_ids` end a message of the policy: those at which its backend stops by itself, and `end_of_message`, what
    the chat template writes at the end of a message where that is none of them.
    """

    def __init__(self, trainer: "GRPOTrainer"):
        self.tokenizer: PreTrainedTokenizerBase = trainer.processing_class
        if not isinstance(self.tokenizer, PreTrainedTokenizerBase):
            raise TypeError(
                f"MultiTurnRollout works on text; the trainer's processing_class is a {type(self.tokenizer).__name__}."
                " Pass a tokenizer as `processing_class` (of a processor, its `tokenizer`)."
            )
        if not self.tokenizer.chat_template:
            raise ValueError(
                "Environments speak in messages, and the tokenizer has no chat template. Set "
                "`tokenizer.chat_template`, or train a model that has one."
            )
        self.template_kwargs: dict[str, Any] = trainer.chat_template_kwargs
        self._shows_tools = False  # known when it has shown some
        self._checked_roles: set[tuple[str, bool]] = set()
        self._reads_parts = self._finds_text_in_parts()
        self._renderings: dict[str, list[int]] = {}
        self._end_of = lru_cache(REMEMBERED_RENDERINGS)(self._find_end)
        self._holds_head = lru_cache(REMEMBERED_RENDERINGS)(self._find_head)
        self.end_of_message = self._find_end_of_message(trainer.eos_token_ids)
        self.eos_token_ids: list[int] = [*trainer.eos_token_ids, *self.end_of_message]
        self.chat_template = self._choose_template()
        self._parser = self._build_parser()

    def render(self, observation: Observation) -> list[int]:
        """
        Tokens of the opening conversation, up to where the policy writes.

        Raises:
            `ValueError`:
                When the template shows nothing of the tools or of a message that the environment wrote, or cannot
                render the prompt of a dataset row.
        """
        is_of_row = isinstance(observation, RowObservation)
        self._check_roles(observation.messages, opens=True, are_of_row=is_of_row)
        try:
            self._check_tools(observation)
            return self._tokenize_once(
                observation.messages, self.chat_template, tools=observation.tools or None, add_generation_prompt=True
            )
        except (TypeError, TemplateError) as error:
            if is_of_row:
                raise ValueError(
                    f"The tokenizer's chat template cannot render the dataset's `prompt`: {error}"
                ) from error
            raise

    def render_history(self, observation: Observation) -> list[int]:
        """Tokens of a conversation that was rewritten, by the tokenizer's own template, which may rewrite it too."""
        return self._tokenize(observation.messages, None, tools=observation.tools or None, add_generation_prompt=True)

    def render_suffix(self, messages: list[Message], last_id: int, ends_message: bool = False) -> list[int]:
        """
        Tokens that follow the policy's response when `messages` come next, up to where it writes again.

        The difference of two renderings of a dummy conversation, with and without the messages.

        Args:
            messages (`list[dict]`):
                The new messages.
            last_id (`int`):
                Last token of the response, an end-of-sequence token.
            ends_message (`bool`, *optional*, defaults to `False`):
                Whether to begin with the end of the policy's message, for a response that ended without it.

        Raises:
            `ValueError`:
                When the template shows nothing of a message.
        """
        self._check_roles(messages, opens=False)
        suffix_ids = self._difference(messages, self.chat_template, ends_message)
        if ends_message:
            return suffix_ids
        # In some formats (GLM-4) a message is ended by the first token of the next one.
        return suffix_ids[1:] if suffix_ids[:1] == [last_id] else suffix_ids

    def _difference(self, messages: list[Message], chat_template: str | None, ends_message: bool = False) -> list[int]:
        dialogue = [DUMMY_QUESTION, _answer_before(messages)]
        try:
            before = self._tokenize_once(dialogue, chat_template)
        except TemplateError:  # Llama 3.1 takes one call in a message, and any number of results
            dialogue = [DUMMY_QUESTION, _answer_before(messages[:1])]
            before = self._tokenize_once(dialogue, chat_template)
        for _ in range(ATTEMPTS):
            after = self._tokenize([*dialogue, *messages], chat_template, add_generation_prompt=True)
            shared = shared_length(before, after)
            # what a template writes after the end of a message (Qwen: a newline) was not generated: it is the suffix's
            end = self._end_of(tuple(before))
            if end < shared:
                return after[end if ends_message else end + 1 :]
            if shared == len(before):
                return after[shared:]
            # a template that prints the date or the time: the two were rendered at different ones
            before = self._tokenize(dialogue, chat_template)
        raise RewritingTemplateError(
            "The tokenizer's chat template renders earlier messages differently when messages are appended, so a "
            "context cannot grow token by token, and TRL has no training template for it. Set "
            "`tokenizer.chat_template` to a template that keeps the history as it was, or give MultiTurnRollout a "
            "function as `history`."
        )

    def parse(self, action_ids: list[int], context_ids: list[int], tools: list[dict] | None) -> Message:
        """Read a response as an assistant message; `parse_error` marks one that is malformed."""
        if action_ids[-1] in self.eos_token_ids and action_ids[-1] != self.tokenizer.eos_token_id:
            action_ids = action_ids[:-1]  # the parsers know the tokenizer's own end-of-sequence token only
        message = mended(self._parsed(action_ids, context_ids, tools))
        names = [name for name in REASONING if isinstance(message.get(name), str)]
        if not names:
            return message
        reasoning = message[names[0]]
        if action_ids[-1:] == [self.tokenizer.eos_token_id]:
            # that of reasoning which does not end is in it
            reasoning = reasoning.removesuffix(self.tokenizer.eos_token)
        return {**message, REASONING[0]: reasoning, **dict.fromkeys(names, reasoning)}

    def _parsed(self, action_ids: list[int], context_ids: list[int], tools: list[dict] | None) -> Message:
        if self._parser is None or not action_ids:
            return self._plain_message(action_ids)
        typed = {"tools": tools} if PARSES_WITH_TOOLS else {}
        context_ids = self._tail(context_ids)
        message = parse_response(self._parser, action_ids, prefix=context_ids, **typed)
        # Where it cannot make sense of a response, TRL falls back to plain text, without a word.
        if "tool_calls" not in message and not self._is_plain(action_ids, context_ids):
            message["parse_error"] = True
        return message

    def _plain_message(self, action_ids: list[int]) -> Message:
        return {"role": "assistant", "content": self.tokenizer.decode(action_ids, skip_special_tokens=True)}

    def _is_plain(self, action_ids: list[int], context_ids: list[int]) -> bool:
        try:
            return "tool_calls" not in self._parser.parse_response(action_ids, prefix=context_ids)
        except (ValueError, TypeError):
            return False

    def _find_end(self, token_ids: tuple[int, ...]) -> int:
        """Where the last message of a conversation ends: at the first end that no text follows."""
        ends = (i for i, token_id in enumerate(token_ids) if token_id in self.eos_token_ids)
        return next((i for i in ends if self._is_blank(token_ids[i + 1 :])), len(token_ids))

    def _is_blank(self, token_ids: Sequence[int]) -> bool:
        return not self.tokenizer.decode([i for i in token_ids if i not in self.eos_token_ids]).strip()

    def _tail(self, context_ids: list[int]) -> list[int]:
        """As much of a context as the parser looks at: what follows the last head of an assistant message."""
        if getattr(self._parser, "response_template", None) is None:  # the older kind does not look at contexts at all
            return context_ids
        tails = (context_ids[-length:] for length in TAIL_LENGTHS)
        return next((tail for tail in tails if self._holds_head(tuple(tail))), context_ids)

    def _find_head(self, token_ids: tuple[int, ...]) -> bool:
        return bool(self._parser.response_template.start_anchor_re.search(self.tokenizer.decode(token_ids)))

    def _tokenize_once(self, messages: list[Message], chat_template: str | None, **kwargs: Any) -> list[int]:
        """The same for conversations that come again, as the opening does in each episode of a group."""
        try:
            # templates may print the date
            key = json.dumps([messages, chat_template, kwargs, date.today().isoformat()])
        except TypeError:  # not plain data
            return self._tokenize(messages, chat_template, **kwargs)
        token_ids = self._renderings.pop(key, None)
        if token_ids is None:
            token_ids = self._tokenize(messages, chat_template, **kwargs)
        self._renderings[key] = token_ids  # the most recent one last
        if len(self._renderings) > REMEMBERED_RENDERINGS:
            del self._renderings[next(iter(self._renderings))]
        return list(token_ids)  # of the same integers: those of long contexts take four times the list's memory

    def _tokenize(self, messages: list[Message], chat_template: str | None, **kwargs: Any) -> list[int]:
        if not self._reads_parts:
            messages = list(map(in_one_part, messages))
        return self.tokenizer.apply_chat_template(
            messages, chat_template=chat_template, tokenize=True, return_dict=False, **kwargs, **self.template_kwargs
        )

    def _finds_text_in_parts(self) -> bool:
        """Whether the template writes the text of a content in parts; those of text models, as Qwen3's, may not."""
        text = DUMMY_QUESTION["content"]
        try:
            return text in self._render_text([{**DUMMY_QUESTION, "content": [{"type": "text", "text": text}]}])
        except (ValueError, TypeError, TemplateError):
            return False

    def _choose_template(self) -> str | None:
        """TRL's training template where the tokenizer's own rewrites history, else `None`, the tokenizer's own."""
        followers = [{"role": "user", "content": "dummy"}]
        if supports_tool_calling(self.tokenizer):
            followers.append({"role": "tool", "name": "dummy", "content": "dummy"})
        try:
            for message in followers:
                self._difference([message], chat_template=None)
        except (ValueError, TypeError, TemplateError):
            try:
                return get_training_chat_template(self.tokenizer)
            except ValueError:
                pass  # the first context that would have to grow raises the error
        return None

    def _find_end_of_message(self, eos_token_ids: list[int]) -> list[int]:
        """
        The token that ends a message in the chat template, if the policy's backend would not stop at it: models with a
        chat template that was set after their tokenizer (or base models) name another one as end of a sequence.
        """
        try:
            text = self._render_text([DUMMY_QUESTION, DUMMY_ANSWER])
            longer = self._render_text([DUMMY_QUESTION, DUMMY_ANSWER, DUMMY_QUESTION])
        except (ValueError, TypeError, TemplateError):
            return []
        word = DUMMY_ANSWER["content"]
        # GLM-4 writes nothing at the end of a message: the head of the next one ends it
        for rest in (text.rpartition(word)[2], longer.rpartition(word)[0].rpartition(word)[2]):
            for token_id in self.tokenizer(rest, add_special_tokens=False)["input_ids"]:
                if token_id in eos_token_ids:
                    return []
                if token_id in self.tokenizer.added_tokens_decoder:
                    return [token_id]
                if self.tokenizer.decode([token_id]).strip():
                    break
        names = ", ".join(map(repr, self.tokenizer.convert_ids_to_tokens(eos_token_ids)))
        logger.warning(
            "The tokenizer's chat template ends messages with no special token, so a turn ends only where the policy "
            "writes %s by itself. If responses run on until they are cut, set `stop_strings` or `stop_token_ids` to "
            "what ends a message.",
            names,
        )
        return []

    def _check_roles(self, messages: list[Message], opens: bool, are_of_row: bool = False) -> None:
        """Templates leave out a message whose role they do not know without a word."""
        for role in dict.fromkeys(message["role"] for message in messages):
            # those of openings may have places of their own there
            if (role, opens) in self._checked_roles or (opens and role in ROLES):
                continue
            if not self._shows_role(role, opens):
                where = " in the dataset's `prompt`" if are_of_row else "" if opens else " after one of the policy"
                fault = (
                    f"The tokenizer's chat template shows nothing of a message with the role {role!r}{where}. Give "
                    "the message a role that it knows (mostly 'user' or 'tool'), or set `tokenizer.chat_template` to "
                    "one that knows this."
                )
                if not are_of_row:
                    raise ValueError(fault)
                logger.warning(fault)
            self._checked_roles.add((role, opens))

    def _shows_role(self, role: str, opens: bool) -> bool:
        message = {"role": role, "content": "dummy"} | ({"name": "dummy"} if role == "tool" else {})
        before = [] if opens else [DUMMY_QUESTION, _answer_before([message])]
        after = [DUMMY_QUESTION] if opens else []
        try:
            with_it = self._render_text([*before, message, *after], self.chat_template)
            return with_it != self._render_text([*before, *after], self.chat_template)
        except (ValueError, TypeError, TemplateError):
            return True  # the rendering of the message itself says what is wrong

    def _check_tools(self, observation: Observation) -> None:
        """Templates that know no tools leave them out without a word."""
        if not observation.tools or self._shows_tools:
            return
        messages = list(map(in_one_part, observation.messages))
        with_tools = self._render_text(messages, self.chat_template, tools=observation.tools)
        if with_tools == self._render_text(messages, self.chat_template):
            raise ValueError(
                "The tokenizer's chat template shows nothing of `Observation.tools`. Set `tokenizer.chat_template` to "
                "one that knows tools, or describe them in a message and leave `tools` out."
            )
        self._shows_tools = True

    def _render_text(self, messages: list[Message], chat_template: str | None = None, **kwargs: Any) -> str:
        return self.tokenizer.apply_chat_template(
            messages, chat_template=chat_template, tokenize=False, **kwargs, **self.template_kwargs
        )

    def _build_parser(self) -> PreTrainedTokenizerBase | None:
        parser = copy.deepcopy(self.tokenizer)
        if getattr(parser, "response_template", None) is None:
            try:
                add_response_schema(parser)
            except ValueError:
                logger.warning(
                    "TRL does not know how to parse responses in this tokenizer's chat format: environments get plain "
                    "text and no tool calls. Set `tokenizer.response_template`, or use a chat template TRL knows."
                )
                return None
        if getattr(parser, "response_template", None) is not None:  # else compiled anew for each response
            parser.response_template = load_response_template(parser.response_template)
        parser.parse_response = BoundedParser(parser)
        return parser


def in_one_part(message: Message) -> Message:
    """A message whose parts, if they are all text, are one."""
    parts = message.get("content")
    if not isinstance(parts, list) or not all(isinstance(p, dict) and p.get("type") in TEXT_TYPES for p in parts):
        return message
    return {**message, "content": "".join(part["text"] for part in parts)}


def _answer_before(messages: list[Message]) -> Message:
    """A message of the policy that some messages may follow."""
    if messages[0]["role"] != "tool":
        return DUMMY_ANSWER
    # templates may derive the header of a result from the call, and some (Mistral) check that the ids agree
    results = [message for message in messages if message["role"] == "tool"]
    identified = [result for result in results if "tool_call_id" in result]
    if not identified and len(results) > 1:
        # or Gemma 4, for which a missing id is like any other missing one, gives all results the name of one call
        identified = [{**result, "tool_call_id": f"dummy{i}"} for i, result in enumerate(results)]
    calls = [
        {
            "type": "function",
            "function": {"name": result.get("name", "dummy"), "arguments": {}},
            **({"id": result["tool_call_id"]} if "tool_call_id" in result else {}),
        }
        for result in identified or results
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def shared_length(first: list[int], second: list[int]) -> int:
    """Length of the longest common prefix."""
    length = min(len(first), len(second))
    if first[:length] == second[:length]:
        return length
    shared, different = 0, length  # by bisection: comparing slices is much faster than a loop
    while different - shared > 1:
        middle = (shared + different) // 2
        if first[shared:middle] == second[shared:middle]:
            shared = middle
        else:
            different = middle
    return shared
