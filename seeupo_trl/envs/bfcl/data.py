"""
The tasks of BFCL v4 multi-turn and the documents of their functions, as the `bfcl-eval` package ships them.

The four categories are variants of the same 200 tasks: `base`; `miss_func`, where a function's document is held back
for a while; `miss_param`, where the user leaves out something needed at first; `long_context`, where the services
return much more than asked for. Task i has the same services in all of them, so a split by number never puts variants
of one task on both sides.
"""

import copy
import json
import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from .package import MULTI_TURN_FUNC_DOC_FILE_MAPPING, bfcl_eval


PREFIX = "multi_turn_"
CATEGORIES = ("multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param", "multi_turn_long_context")
SPLITS = ("train", "test", "all")
SPLIT_SCHEMES = ("paper", "stratified")
TOOL_DETAILS = ("raw", "full", "trimmed", "brief")

# What the official harness appends to the documents it lists, and what it writes when it sends those held back.
LANGUAGE_HINT = " Note that the provided function is in Python 3 syntax."
ADDITIONAL_FUNCTIONS = "{functions}\nI have updated some more functions you can choose from. What about now?"

JSON_SCHEMA_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}

DATA = Path(bfcl_eval.__file__).parent / "data"


def check_option(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Raise a `ValueError` that names the allowed values, unless `value` is one of them."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}.")


def category_names(category: str | Sequence[str]) -> list[str]:
    """
    Official names of categories.

    Args:
        category (`str` or `list[str]`):
            Official names (`"multi_turn_base"`) or short ones (`"base"`); `"all"` for all of them.

    Returns:
        `list[str]`: each category once, in the order given.
    """
    given = [category] if isinstance(category, str) else list(category)
    if "all" in given:
        return list(CATEGORIES)
    names = [name if str(name).startswith(PREFIX) else f"{PREFIX}{name}" for name in given]
    for name, official in zip(given, names, strict=True):
        if official not in CATEGORIES:
            short = ", ".join(repr(name.removeprefix(PREFIX)) for name in CATEGORIES)
            raise ValueError(
                f"category is {name!r}; it must be one of {', '.join(map(repr, CATEGORIES))}, short {short}, a list "
                "of them, or 'all'."
            )
    if not names:
        raise ValueError("category is an empty list; name at least one category.")
    return list(dict.fromkeys(names))


@lru_cache
def load_entries(category: str) -> dict[str, dict[str, Any]]:
    """The test entries of a category by id, each with its `ground_truth`. Treat them as read-only."""
    file_name = f"BFCL_v4_{category}.json"
    entries = {entry["id"]: entry for entry in _read_json_lines(DATA / file_name)}
    for answer in _read_json_lines(DATA / "possible_answer" / file_name):
        entries[answer["id"]]["ground_truth"] = answer["ground_truth"]
    return entries


def load_entry(task_id: str) -> dict[str, Any]:
    """The test entry of a task, such as `"multi_turn_base_0"`. Treat it as read-only."""
    category = str(task_id).rpartition("_")[0]
    check_option(f"The category of the task id {task_id!r}", category, CATEGORIES)
    entries = load_entries(category)
    if task_id not in entries:
        raise ValueError(
            f"There is no task {task_id!r}; those of its category are {category}_0 to _{len(entries) - 1}."
        )
    return entries[task_id]


def category_of(entry: dict[str, Any]) -> str:
    """Official name of the category of an entry."""
    return entry["id"].rpartition("_")[0]


def split_numbers(split: str, split_scheme: str, seed: int) -> list[int]:
    """
    Numbers of the tasks of a split, see [`~seeupo_trl.envs.bfcl.load_bfcl`]. They hold for every category.

    Args:
        split (`str`):
            `"train"`, `"test"` or `"all"`.
        split_scheme (`str`):
            `"paper"` or `"stratified"`.
        seed (`int`):
            Seed of the stratified split.
    """
    check_option("split", split, SPLITS)
    check_option("split_scheme", split_scheme, SPLIT_SCHEMES)
    entries = list(load_entries("multi_turn_base").values())
    numbers = list(range(len(entries)))
    if split == "all":
        return numbers
    if split_scheme == "paper":
        half = len(numbers) // 2
        return numbers[:half] if split == "train" else numbers[half:]
    rng = random.Random(seed)
    groups: dict[tuple[str, ...], list[int]] = {}
    for number, entry in enumerate(entries):
        groups.setdefault(tuple(sorted(entry["involved_classes"])), []).append(number)
    dealt = []
    for _, group in sorted(groups.items()):
        rng.shuffle(group)
        dealt += group
    return sorted(dealt[0 if split == "train" else 1 :: 2])


@lru_cache
def load_function_docs(class_name: str) -> list[dict[str, Any]]:
    """The documented functions of a service, as BFCL writes them. Treat them as read-only."""
    return _read_json_lines(DATA / "multi_turn_func_doc" / MULTI_TURN_FUNC_DOC_FILE_MAPPING[class_name])


def function_docs(entry: dict[str, Any], held_back_until: int | None = None) -> list[dict[str, Any]]:
    """
    Documents of the functions of a task.

    Args:
        entry (`dict`):
            The test entry.
        held_back_until (`int`, *optional*):
            Index of a user turn. `None`: the functions listed from the beginning, those of all services involved but
            the ones held back. Else those which that turn adds.
    """
    docs = [doc for name in entry["involved_classes"] for doc in load_function_docs(name)]
    held_back = entry.get("missed_function", {})
    if held_back_until is None:
        names = {name for added in held_back.values() for name in added}
        return [doc for doc in docs if doc["name"] not in names]
    by_name = {doc["name"]: doc for doc in docs}
    return [by_name[name] for name in held_back.get(str(held_back_until), [])]


def user_messages(entry: dict[str, Any], turn: int, detail: str) -> list[dict[str, Any]]:
    """
    What the user says at the beginning of a user turn.

    In `miss_func` one turn has no words of its own: it adds the functions held back. The official harness of
    function-calling models that are prompted with text (`QwenFCHandler`) writes their documents into that message and
    leaves the tools of the system prompt as they were.

    Args:
        entry (`dict`):
            The test entry.
        turn (`int`):
            Index of the user turn.
        detail (`str`):
            How much of a document to show, see [`~seeupo_trl.envs.bfcl.BfclEnvironment`].
    """
    added = function_docs(entry, held_back_until=turn)
    if not added:
        return [dict(message) for message in entry["question"][turn]]
    functions = [_shorten(doc, detail) for doc in added]
    return [{"role": "user", "content": ADDITIONAL_FUNCTIONS.format(functions=functions)}]


def to_tool_schema(function_doc: dict[str, Any], detail: str) -> dict[str, Any]:
    """
    Turn a function document of BFCL into a tool for chat templates.

    Args:
        function_doc (`dict`):
            One of [`load_function_docs`].
        detail (`str`):
            `"raw"`, `"full"`, `"trimmed"` or `"brief"`, see [`~seeupo_trl.envs.bfcl.BfclEnvironment`].
    """
    doc = copy.deepcopy(_shorten(function_doc, detail))
    if detail in ("raw", "full"):
        doc["description"] += LANGUAGE_HINT
    if detail == "raw":
        return doc
    function = {key: _to_json_schema(doc[key]) if key in ("parameters", "response") else doc[key] for key in doc}
    return {"type": "function", "function": function}


def _shorten(function_doc: dict[str, Any], detail: str) -> dict[str, Any]:
    doc = dict(function_doc)
    if detail in ("trimmed", "brief"):
        doc.pop("response", None)
    if detail == "brief":
        doc["description"] = doc["description"].split("Tool description: ")[-1]
    return doc


def _to_json_schema(schema: dict[str, Any]) -> dict[str, Any]:
    converted = dict(schema)
    if "type" in schema:
        converted["type"] = JSON_SCHEMA_TYPES.get(schema["type"], schema["type"])
    if "properties" in schema:
        converted["properties"] = {name: _to_json_schema(value) for name, value in schema["properties"].items()}
    if "items" in schema:
        converted["items"] = _to_json_schema(schema["items"])
    return converted


def _read_json_lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
