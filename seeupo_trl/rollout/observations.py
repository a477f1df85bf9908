"""
What an environment returned, checked and made safe: it may be anything, and of any size.

An object of the wrong kind is the environment's fault and raises; text is mended (characters that no tokenizer takes)
or cut, because what a tool prints is often out of the environment's hands.
"""

import copy
import json
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..envs.base import Observation, StepResult
from ..envs.plain import flag, real_number
from ..envs.tools import TEXT_TYPES, RowObservation, content_of, is_in_parts


Message = dict[str, Any]

_IMMUTABLE = (str, int, float, bool, type(None))

# A text with more characters than this for each token allowed is cut before it is tokenised.
CHARACTERS_PER_TOKEN = 32
REMEMBERED_TOOLS = 256


def check_observation(observation: Any) -> Observation:
    """
    The observation with messages of its own.

    Raises:
        `TypeError`:
            When it is not an [`~seeupo_trl.envs.Observation`] with messages.
    """
    if not isinstance(observation, Observation) or not observation.messages:
        raise TypeError(f"reset() must return an Observation with messages; it returned {_brief(observation)}.")
    tools = observation.tools
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise TypeError(f"Observation.tools must be a list of JSON schemas; got {_brief(tools)}.")
    if not isinstance(observation.info, dict):
        raise TypeError(f"Observation.info must be a dict; got {_brief(observation.info)}.")
    kind = RowObservation if isinstance(observation, RowObservation) else Observation
    messages = _check_messages(observation.messages, takes_any_content=kind is RowObservation)
    return kind(messages, _own_tools(tools), _own_info(observation.info))


def _own_tools(tools: list[dict] | None) -> list[dict] | None:
    """A copy, one for all episodes that have the same tools: schemas are long, and nothing changes them."""
    return None if tools is None else _tools_from(json.dumps(tools))


@lru_cache(REMEMBERED_TOOLS)
def _tools_from(text: str) -> list[dict]:
    tools = json.loads(text)
    return mended(without_none(tools) if "null" in text else tools)


def _own_info(info: dict[str, Any]) -> dict[str, Any]:
    """A copy that the environment does not change later, as deep as what is in it can be copied."""
    try:
        return copied(info)
    except Exception:  # whatever the objects' own copying raises
        return dict(info)


def check_step_result(result: Any) -> StepResult:
    """
    The result with messages of its own.

    Raises:
        `TypeError` or `ValueError`:
            When it is not a [`~seeupo_trl.envs.StepResult`] that the episode can go on with.
    """
    if not isinstance(result, StepResult):
        raise TypeError(f"step() must return a StepResult; it returned {_brief(result)}.")
    try:
        reward = real_number(result.reward)
    except ValueError as error:
        raise ValueError(f"StepResult.reward must be a finite number; got {_brief(result.reward)}.") from error
    if not isinstance(result.info, dict):
        raise TypeError(f"StepResult.info must be a dict; got {_brief(result.info)}.")
    terminated, truncated = _flag(result, "terminated"), _flag(result, "truncated")
    if not result.messages and not (terminated or truncated):
        raise ValueError("step() returned no messages although the episode goes on.")
    return StepResult(
        messages=_check_messages(result.messages),
        reward=reward,
        terminated=terminated,
        truncated=truncated,
        info=_own_info(result.info),
    )


def _flag(result: StepResult, name: str) -> bool:
    value = getattr(result, name)
    try:
        return flag(value)
    except ValueError as error:
        raise TypeError(f"StepResult.{name} must be True or False; got {_brief(value)}.") from error


def _check_messages(messages: Any, takes_any_content: bool = False) -> list[Message]:
    if not isinstance(messages, (list, tuple)):
        raise TypeError(f"Messages must be a list of dicts with role and content; got {_brief(messages)}.")
    checked = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise TypeError(f"A message must be a dict with a role; got {_brief(message)}.")
        content = message.get("content")
        if not takes_any_content and content is not None and not isinstance(content, (str, list)):
            raise TypeError(f"The content of a message must be a text; got {_brief(content)}.")
        if isinstance(content, list):
            content = list(map(_text_part, content)) if is_in_parts(content) else content_of(content)
        checked.append(mended(copied(plain_message({**message, "content": content}))))
    return checked


def _text_part(part: dict[str, Any]) -> dict[str, Any]:
    """A part of a content under the one name for text that templates know."""
    if part["type"] not in TEXT_TYPES or not isinstance(part.get("text"), str):
        raise TypeError(
            f"The content of a message has a part of type {part['type']!r} that is no text; policies here read text "
            "only. Give parts of type 'text', or write data as text (`json.dumps`)."
        )
    return {**part, "type": "text"}


def plain_message(message: Message) -> Message:
    """A message without what Arrow filled in, see [`without_none`]; its content may be `None`."""
    plain = without_none(message)
    return {**plain, "content": None} if "content" in message and message["content"] is None else plain


def without_none(value: Any) -> Any:
    """
    Plain data without the keys of dicts whose value is `None`: Arrow gives all dicts of a column the same keys, and
    templates print what is there. The value itself where there are none.
    """
    if isinstance(value, dict):
        items = {key: without_none(item) for key, item in value.items() if item is not None}
        same = len(items) == len(value) and all(item is value[key] for key, item in items.items())
        return value if same else items
    if isinstance(value, list):
        items = [without_none(item) for item in value]
        return items if any(new is not old for new, old in zip(items, value, strict=True)) else value
    return value


def copied(value: Any) -> Any:
    """A deep copy; of dicts and lists, as JSON has them, several times faster than `copy.deepcopy`."""
    kind = type(value)
    if kind is dict:
        return {key: copied(item) for key, item in value.items()}
    if kind is list:
        return [copied(item) for item in value]
    return value if kind in _IMMUTABLE else copy.deepcopy(value)


def mended(value: Any) -> Any:
    """
    Plain data in which all text can be encoded: lone surrogates, as in `"\\ud83d"`, have no UTF-8 form, and become a
    question mark. The value itself where there is nothing to mend.
    """
    try:
        if r"\ud" not in json.dumps(value):  # JSON writes a surrogate as \ud83d, and is faster than a walk
            return value
    except (TypeError, ValueError, RecursionError):  # not plain data
        pass
    return _mended(value)


def _mended(value: Any) -> Any:
    if isinstance(value, str):
        return value if _is_encodable(value) else value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, list | tuple):
        items = [_mended(item) for item in value]
        return items if any(new is not old for new, old in zip(items, value, strict=True)) else value
    if isinstance(value, dict):
        items = {_mended(key): _mended(item) for key, item in value.items()}
        same = len(items) == len(value) and all(key in value and items[key] is value[key] for key in items)
        return value if same else items
    return value


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def number_of_characters(message: Message) -> int:
    """Length of a message's text, which may come in parts."""
    content = message.get("content")
    return len(content) if isinstance(content, str) else sum(len(part["text"]) for part in _texts_in(content))


def cut_message(message: Message, limit: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """
    Cut the text of a message, all its parts together, to so many tokens.

    Args:
        message (`dict`):
            The message, which is changed.
        limit (`int`):
            Most tokens that are kept.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            See [`cut_to_tokens`].

    Returns:
        `bool`:
            Whether anything was cut.
    """
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = cut_to_tokens(content, limit, tokenizer)
        return message["content"] is not content
    is_cut = False
    for part in _texts_in(content):
        text = part["text"]
        part["text"] = cut_to_tokens(text, limit, tokenizer)
        is_cut = is_cut or part["text"] is not text
        limit -= min(limit, len(tokenizer(part["text"], add_special_tokens=False)["input_ids"]))
    return is_cut


def _texts_in(content: Any) -> list[dict[str, Any]]:
    """Those parts of a content that hold text; none where it is not in parts."""
    return [part for part in content if isinstance(part.get("text"), str)] if isinstance(content, list) else []


def cut_to_tokens(text: str, limit: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """
    The beginning of a text, with a note where it was cut.

    Args:
        text (`str`):
            Any text, of any length.
        limit (`int`):
            Most tokens that are kept. The note comes on top.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Cuts between tokens, at the offsets that fast tokenizers report; of others, the text of the tokens is kept.
    """
    if len(text) * 4 <= limit:  # no token is shorter than a byte, no character longer than four
        return text
    head = text[: limit * CHARACTERS_PER_TOKEN]
    encoded = tokenizer(head, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
    if len(encoded["input_ids"]) > limit:
        if tokenizer.is_fast:
            head = head[: encoded["offset_mapping"][limit][0]]
        else:
            head = tokenizer.decode(encoded["input_ids"][:limit])
    elif len(head) == len(text):
        return text
    return f"{head}\n[cut: {len(head)} of {len(text)} characters]"


def _brief(value: Any) -> str:
    """A short picture of a value that may be huge, or unable to show itself."""
    try:
        text = repr(value)
    except Exception:
        text = "an object without repr"
    return f"{type(value).__name__} {text[:100]}{'...' if len(text) > 100 else ''}"
