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
from dataclasses import replace
from itertools import chain
from typing import Any

from ..envs.base import Observation
from .chat_format import ChatFormat
from .episode import Episode, Segment
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

    def _reply(self, episode: Episode) -> list[int]:
        """Tokens of the environment's reply to the last turn, up to where the policy writes again."""
        last_id = episode.turns[-1].action_ids[-1]
        return self.chat.render_suffix(episode.new_messages, last_id, ends_message=episode.stopped_early)


class AppendedContexts(Contexts):
    """Contexts that only grow."""

    def first(self, episode: Episode) -> list[int]:
        return self.chat.render(episode.observation)

    def next(self, episode: Episode) -> list[int]:
        return episode.context_ids + self._reply(episode)


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
        episode.segments = [Segment.plain(self.chat.render(episode.observation))]
        return list(episode.segments[0].token_ids)

    def next(self, episode: Episode) -> list[int]:
        *earlier, before = episode.segments
        action_ids = episode.turns[-1].action_ids
        earlier += self._turn(before.token_ids, action_ids)
        if any(message["role"] == "user" for message in episode.new_messages):
            earlier = [segment.stripped() for segment in earlier]
        episode.segments = [*earlier, Segment.plain(self._reply(episode))]
        return list(chain.from_iterable(segment.token_ids for segment in episode.segments))

    def _turn(self, before: list[int], action: list[int]) -> list[Segment]:
        """An action and what stands before it, whose header may open the reasoning."""
        before = self._without_empty_reasoning(before)
        answer = self._answer_in(action)
        if answer is None:
            return [Segment.plain(before), Segment.plain(action)]
        return [Segment(before, before[: self._start_of_reasoning(before)]), Segment(action, answer)]

    def _without_empty_reasoning(self, header: list[int]) -> list[int]:
        """Templates open an action without reasoning by an empty block, which they do not repeat in the history."""
        start = self._start_of_reasoning(header)
        is_closed = start is not None and _first_occurrence(header[start:], self._end_of_think) is not None
        return header[:start] if is_closed else header

    def _answer_in(self, action: list[int]) -> list[int] | None:
        """What follows the reasoning of an action; `None` if it has none, or none that ends."""
        end = _first_occurrence(action, self._end_of_think)
        if end is None:
            text = self.chat.tokenizer.decode(action)
            if END_OF_THINK not in text:
                return None
            # the tag is several tokens here, and was not generated as those
            answer = text.split(END_OF_THINK, 1)[1].lstrip("\n")
            return self.chat.tokenizer.encode(answer, add_special_tokens=False)
        answer = action[end + len(self._end_of_think) :]
        while answer and self._is_newline(answer[0]):
            answer = answer[1:]
        return answer

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
        return self.chat.render(replace(episode.observation, messages=episode.shown))

    def next(self, episode: Episode) -> list[int]:
        appended = [*episode.shown, *episode.messages[-len(episode.new_messages) - 1 :]]
        episode.shown = self._shown(episode)
        if episode.shown == appended:
            return episode.context_ids + self._reply(episode)
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
