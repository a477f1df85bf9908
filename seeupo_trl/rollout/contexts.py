"""
What the policy is shown of the turns before: the context of an episode's next turn, as tokens.

- `"append"`: everything as it was. A context is the previous context, the policy's tokens, and the rendering of the
  environment's new messages.
- `"strip_reasoning"`: reasoning is removed from the turns before the last user message (results of tools are not user
  messages), which is what the chat templates of reasoning models do (Qwen3) and what the published runs did. The rest
  of an earlier turn keeps the tokens the policy generated.
- a function of the messages: whatever it returns is rendered anew with the tokenizer's chat template. Where it returns
  the messages of the last turn with the new ones appended, tokens are appended instead.

Only contexts are built here. What is trained on is always the action as it was sampled, given the context it was
sampled from, so nothing the policy generated is tokenised again for training.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import chain
from typing import Any

from ..envs.base import Observation
from .chat_format import ChatFormat
from .episode import Episode
from .observations import copied


Message = dict[str, Any]
History = str | Callable[[list[Message]], list[Message]]

HISTORIES = ("append", "strip_reasoning")
THINK, END_OF_THINK = "<think>", "</think>"
LONGEST_HEADER = 64  # tokens of a generation prompt


class HistoryError(RuntimeError):
    """A function given as history failed: a mistake of the script, not a fault of an environment."""


def check_history(history: History) -> None:
    """
    Raises:
        `ValueError`:
            When `history` is none of the names and no function.
    """
    if history not in HISTORIES and not callable(history):
        raise ValueError(
            f"history is {history!r}; it must be one of {', '.join(map(repr, HISTORIES))}, or (as an argument of "
            "MultiTurnRollout) a function that takes the messages so far and returns those to show."
        )


def contexts_for(history: History, chat: ChatFormat) -> "Contexts":
    """The builder of contexts for a history."""
    if callable(history):
        return RewrittenContexts(chat, history)
    return StrippedContexts(chat) if history == "strip_reasoning" else AppendedContexts(chat)


class Contexts(ABC):
    """
    Builds the contexts of episodes.

    Args:
        chat ([`~seeupo_trl.rollout.chat_format.ChatFormat`]):
            The policy's chat format.
    """

    def __init__(self, chat: ChatFormat):
        self.chat = chat

    @abstractmethod
    def first(self, episode: Episode) -> list[int]:
        """Context of the first turn."""

    @abstractmethod
    def next(self, episode: Episode) -> list[int]:
        """Context of the turn after the environment's reply to the last one."""


class AppendedContexts(Contexts):
    """Contexts that only grow."""

    def first(self, episode: Episode) -> list[int]:
        return self.chat.render(episode.observation)

    def next(self, episode: Episode) -> list[int]:
        context_ids = episode.context_ids
        return context_ids + self.chat.render_suffix(episode.new_messages, context_ids[-1])


class StrippedContexts(Contexts):
    """
    Contexts without the reasoning of earlier user turns.

    Raises:
        `ValueError`:
            When the chat template has no reasoning between `<think>` and `</think>`.
    """

    def __init__(self, chat: ChatFormat):
        super().__init__(chat)
        template = chat.tokenizer.get_chat_template()
        if END_OF_THINK not in template:
            raise ValueError(
                f"history='strip_reasoning' removes what stands between {THINK} and {END_OF_THINK}, but the "
                "tokenizer's chat template has no such reasoning. Use history='append', or a function that returns "
                "the messages to show."
            )
        self._think = chat.tokenizer.encode(THINK, add_special_tokens=False)
        self._end_of_think = chat.tokenizer.encode(END_OF_THINK, add_special_tokens=False)
        self._newlines: dict[int, bool] = {}

    def first(self, episode: Episode) -> list[int]:
        context_ids = self.chat.render(episode.observation)
        # opening, action, reply, action, reply, ...; a reply ends with the header of the next action
        episode.segments = [context_ids]
        return list(context_ids)

    def next(self, episode: Episode) -> list[int]:
        action_ids = episode.turns[-1].action_ids
        segments = episode.segments
        segments += [action_ids, self.chat.render_suffix(episode.new_messages, action_ids[-1])]
        last = len(segments) - 2
        # templates open an action without reasoning by an empty block, which they do not repeat in the history
        segments[last - 1] = self._without_empty_reasoning(segments[last - 1])
        if any(message["role"] == "user" for message in episode.new_messages):
            for number in range(episode.first_with_reasoning, last + 1, 2):
                segments[number - 1 : number + 1] = self._without_reasoning(*segments[number - 1 : number + 1])
            episode.first_with_reasoning = last + 2
        return list(chain.from_iterable(segments))

    def _without_empty_reasoning(self, header: list[int]) -> list[int]:
        start = self._start_of_reasoning(header)
        is_closed = start is not None and _first_occurrence(header[start:], self._end_of_think) is not None
        return header[:start] if is_closed else header

    def _without_reasoning(self, header: list[int], action: list[int]) -> tuple[list[int], list[int]]:
        end = _first_occurrence(action, self._end_of_think)
        if end is None:
            text = self.chat.tokenizer.decode(action)
            if END_OF_THINK not in text:
                return header, action
            # the tag is several tokens here, and was not generated as those
            rest = text.split(END_OF_THINK, 1)[1].lstrip("\n")
            kept = self.chat.tokenizer.encode(rest, add_special_tokens=False)
        else:
            kept = action[end + len(self._end_of_think) :]
            while kept and self._is_newline(kept[0]):
                kept = kept[1:]
        return header[: self._start_of_reasoning(header)], kept

    def _start_of_reasoning(self, header: list[int]) -> int | None:
        """Where the reasoning begins that a header opens, and maybe closes at once; `None` if it opens none."""
        tail = header[-LONGEST_HEADER:]
        start = _last_occurrence(tail, self._think)
        if start is None:
            return None
        text = self.chat.tokenizer.decode(tail[start:])
        if text.replace(THINK, "").replace(END_OF_THINK, "").strip():
            return None
        return len(header) - len(tail) + start

    def _is_newline(self, token_id: int) -> bool:
        if token_id not in self._newlines:
            text = self.chat.tokenizer.decode([token_id])
            self._newlines[token_id] = bool(text) and not text.strip("\n")
        return self._newlines[token_id]


class RewrittenContexts(Contexts):
    """Contexts that a function of the messages decides."""

    def __init__(self, chat: ChatFormat, history: Callable[[list[Message]], list[Message]]):
        super().__init__(chat)
        self._history = history

    def first(self, episode: Episode) -> list[int]:
        episode.shown = self._shown(episode)
        return self.chat.render(Observation(episode.shown, episode.observation.tools))

    def next(self, episode: Episode) -> list[int]:
        appended = [*episode.shown, *episode.messages[-len(episode.new_messages) - 1 :]]
        episode.shown = self._shown(episode)
        if episode.shown == appended:
            context_ids = episode.context_ids
            return context_ids + self.chat.render_suffix(episode.new_messages, context_ids[-1])
        return self.chat.render_history(Observation(episode.shown, episode.observation.tools))

    def _shown(self, episode: Episode) -> list[Message]:
        messages = copied([*episode.observation.messages, *episode.messages])
        try:
            shown = self._history(messages)
        except Exception as error:
            raise HistoryError(f"The function given as history raised {type(error).__name__}: {error}") from error
        if not isinstance(shown, list) or not shown or not all(isinstance(message, dict) for message in shown):
            raise HistoryError(f"history must return the list of messages to show; it returned {str(shown)[:100]!r}.")
        return shown


def _first_occurrence(tokens: list[int], pattern: list[int]) -> int | None:
    starts = range(len(tokens) - len(pattern) + 1)
    return next((i for i in starts if tokens[i : i + len(pattern)] == pattern), None)


def _last_occurrence(tokens: list[int], pattern: list[int]) -> int | None:
    starts = range(len(tokens) - len(pattern), -1, -1)
    return next((i for i in starts if tokens[i : i + len(pattern)] == pattern), None)
