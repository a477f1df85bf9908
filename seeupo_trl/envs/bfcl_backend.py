"""
BFCL's simulated services (files, trading, travel, ...) behind a dispatcher that is safe to hand model output to.

The services and the checks are those of the `bfcl-eval` package. Its executor is not used: it evaluates call strings
as Python and keeps instances in module globals for ever. Here a call is a name and a dict of arguments; only
documented methods are callable, by keyword, on instances that belong to one episode. Outputs equal the official
executor's.

Arguments can ask for absurd amounts of work (`power(7, 10**7)`, a million digits of precision). Those found are
refused with an error the model can read, see `_refuse_expensive`; a method that hangs on arguments not foreseen there
would hang its thread.
"""

import ast
import copy
import decimal
import importlib
import inspect
import json
import math
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any


try:
    import mpmath
    from bfcl_eval.constants.executable_backend_config import (
        CLASS_FILE_PATH_MAPPING,
        MULTI_TURN_FUNC_DOC_FILE_MAPPING,
        STATELESS_CLASSES,
    )
    from bfcl_eval.eval_checker.multi_turn_eval import multi_turn_checker
except ImportError as error:
    raise ImportError(
        "The BFCL environment needs the packages bfcl-eval and mpmath. Install bfcl-eval without its dependencies "
        "(they are about 150 packages and pin numpy 1.26, which breaks `datasets`):\n"
        "    pip install --no-deps bfcl-eval==2026.3.23\n"
        "    pip install mpmath==1.3.0"
    ) from error


DATA = Path(multi_turn_checker.__file__).parents[2] / "data"
LANGUAGE_HINT = " Note that the provided function is in Python 3 syntax."

# Limits of `_refuse_expensive`. The ground truth needs 10 digits of precision at most.
MAX_PRECISION = 1000
MAX_INTEGER_DIGITS = 4300  # Python's own limit for printing an integer

JSON_SCHEMA_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}

# MathAPI sets the process-wide precision of mpmath, and the text of a result depends on it.
_math_lock = threading.Lock()


@lru_cache
def load_entries(category: str) -> dict[str, dict[str, Any]]:
    """The test entries of a category by id, each with its `ground_truth`. Treat them as read-only."""
    file_name = f"BFCL_v4_{category}.json"
    entries = {entry["id"]: entry for entry in _read_json_lines(DATA / file_name)}
    for answer in _read_json_lines(DATA / "possible_answer" / file_name):
        entries[answer["id"]]["ground_truth"] = answer["ground_truth"]
    return entries


@lru_cache
def load_function_docs(class_name: str) -> list[dict[str, Any]]:
    """The documented functions of a service, as BFCL writes them. Treat them as read-only."""
    return _read_json_lines(DATA / "multi_turn_func_doc" / MULTI_TURN_FUNC_DOC_FILE_MAPPING[class_name])


def _read_json_lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def to_tool_schema(function_doc: dict[str, Any], detail: str) -> dict[str, Any]:
    """
    Turn a function document of BFCL into a tool schema for chat templates.

    Args:
        function_doc (`dict`):
            One of [`load_function_docs`].
        detail (`str`):
            `"full"`, `"trimmed"` or `"brief"`, see [`~seeupo_trl.envs.bfcl.BfclEnvironment`].
    """
    function = {
        "name": function_doc["name"],
        "description": function_doc["description"],
        "parameters": _to_json_schema(function_doc["parameters"]),
    }
    if detail == "full":
        function["description"] += LANGUAGE_HINT
        function["response"] = _to_json_schema(function_doc["response"])
    elif detail == "brief":
        function["description"] = function["description"].split("Tool description: ")[-1]
    return {"type": "function", "function": function}


def _to_json_schema(schema: dict[str, Any]) -> dict[str, Any]:
    converted = copy.deepcopy(schema)
    if "type" in schema:
        converted["type"] = JSON_SCHEMA_TYPES.get(schema["type"], schema["type"])
    if "properties" in schema:
        converted["properties"] = {name: _to_json_schema(value) for name, value in schema["properties"].items()}
    if "items" in schema:
        converted["items"] = _to_json_schema(schema["items"])
    return converted


class Services:
    """
    Fresh instances of the services an entry involves, in the entry's initial state.

    Args:
        entry (`dict`):
            A test entry of [`load_entries`].
    """

    def __init__(self, entry: dict[str, Any]):
        self.instances: dict[str, Any] = {}
        self._methods: dict[str, Any] = {}
        for class_name in entry["involved_classes"]:
            instance = getattr(importlib.import_module(CLASS_FILE_PATH_MAPPING[class_name]), class_name)()
            if class_name not in STATELESS_CLASSES:
                config = copy.deepcopy(entry["initial_config"].get(class_name, {}))
                instance._load_scenario(config, long_context="long_context" in entry["id"])
                # Long-context scenarios put dicts of the module itself into the instance.
                instance = copy.deepcopy(instance)
            self.instances[class_name] = instance
            for function_doc in load_function_docs(class_name):
                self._methods[function_doc["name"]] = getattr(instance, function_doc["name"])

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """
        Call a documented function and return its result as text; mistakes come back as the text of the error.

        Args:
            name (`str`):
                Name of the function.
            arguments (`dict`):
                Its keyword arguments.
        """
        try:
            if name not in self._methods:
                raise NameError(f"name '{name}' is not defined")
            _refuse_expensive(name, arguments)
            method = self._methods[name]
            arguments = copy.deepcopy(arguments)  # services keep lists and dicts they are given
            if method.__self__ is not self.instances.get("MathAPI"):
                return _as_text(method(**arguments))
            with _math_lock, decimal.localcontext(), mpmath.workdps(mpmath.mp.dps):
                return _as_text(method(**arguments))
        except Exception as error:
            return f"Error during execution: {error}"

    def parse_call(self, call: str) -> tuple[str, dict[str, Any]]:
        """
        Read a call of the ground truth, such as `"sort('report.txt')"`: a function name and literals, never evaluated.

        Args:
            call (`str`):
                The call as Python source. Positional arguments get the names of the method's parameters.
        """
        node = ast.parse(call, mode="eval").body
        name = node.func.id
        parameters = inspect.signature(self._methods[name]).parameters
        arguments = dict(zip(parameters, map(ast.literal_eval, node.args), strict=False))
        arguments.update({keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords})
        return name, arguments


def _as_text(result: Any) -> str:
    if isinstance(result, dict):
        try:
            return json.dumps(result)
        except (TypeError, ValueError):
            return str(result)
    return str(result)


def _refuse_expensive(name: str, arguments: dict[str, Any]) -> None:
    argument = {"logarithm": "precision", "square_root": "precision", "round_number": "decimal_places"}.get(name)
    value = arguments.get(argument)
    if isinstance(value, (int, float)) and abs(value) > MAX_PRECISION:
        raise ValueError(f"{argument} must be at most {MAX_PRECISION}")
    base, exponent = arguments.get("base"), arguments.get("exponent")
    if name == "power" and isinstance(base, int) and isinstance(exponent, int) and abs(base) > 1 and exponent > 0:
        if exponent * math.log10(abs(base)) > MAX_INTEGER_DIGITS:
            raise ValueError(f"Exceeds the limit ({MAX_INTEGER_DIGITS} digits) for integer string conversion")


def check_user_turn(
    model: Services, truth: Services, model_results: list[str], truth_results: list[str], calls_made: int, turn: int
) -> str | None:
    """
    The official checks at the end of a user turn.

    Args:
        model (`Services`):
            The services the model worked on.
        truth (`Services`):
            The services the ground truth was played on.
        model_results (`list[str]`):
            Results of all the model's calls so far, of this and all earlier user turns.
        truth_results (`list[str]`):
            Results of the ground truth's calls of this user turn.
        calls_made (`int`):
            Number of calls the model made in this user turn.
        turn (`int`):
            Index of the user turn.

    Returns:
        `str` or `None`: the reason of the failure, or `None` if the turn passes.
    """
    if not truth_results:
        return None
    if not calls_made:
        return f"Model response list is empty for turn {turn}"
    try:
        verdict = multi_turn_checker.state_checker(model.instances, truth.instances)
    except RecursionError:
        return f"State of turn {turn} is cyclic (a directory was copied into itself)"
    if verdict["valid"]:
        verdict = multi_turn_checker.response_checker(model_results, truth_results, turn)
    return None if verdict["valid"] else verdict["error_message"]
