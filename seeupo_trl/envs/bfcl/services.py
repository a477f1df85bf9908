"""
BFCL's simulated services (files, trading, travel, ...) behind a dispatcher that is safe to hand model output to.

The services are those of the `bfcl-eval` package. Its executor is not used: it evaluates call strings as Python and
keeps instances in module globals for ever. Here a call is a name and a dict of arguments; only documented methods are
callable, by keyword, on instances that belong to one episode. Outputs equal the official executor's. What a call may
cost is limited, see `limits.py`.

Some services keep state outside their instances: default arguments that are lists and get appended to, dicts of the
package's modules that long-context scenarios put into the instance. Here they belong to the episode, too.
"""

import ast
import copy
import decimal
import importlib
import inspect
import json
import threading
from functools import cache, lru_cache
from typing import Any

from .data import category_of, load_entry, load_function_docs
from .limits import plain_copy, refuse_circle, refuse_expensive
from .package import CLASS_FILE_PATH_MAPPING, STATELESS_CLASSES, mpmath


Call = tuple[str, dict[str, Any]]

# MathAPI sets the process-wide precision of mpmath, and the weather of long contexts is written to a dict of the
# module: the text of a result depends on both until it is made.
_module_lock = threading.Lock()
WRITES_TO_MODULE = "get_outside_temperature_from_google"


class Services:
    """
    Fresh instances of the services an entry involves, in the entry's initial state.

    Args:
        entry (`dict`):
            A test entry of [`~seeupo_trl.envs.bfcl.data.load_entry`].
        beside ([`Services`], *optional*):
            Services of the same entry to share with what two sets of services share in the official executor: default
            arguments and dicts of the package's modules. `None` shares nothing.
        circles (`bool`, *optional*, defaults to `False`):
            Let a directory be copied into itself, as the official executor does, instead of refusing it.
    """

    def __init__(self, entry: dict[str, Any], beside: "Services | None" = None, circles: bool = False):
        self._circles = circles
        self.instances: dict[str, Any] = {}
        self._methods: dict[str, Any] = {}
        self._defaults: dict[str, dict[str, Any]] = {}
        self._copies: dict[int, Any] = {} if beside is None else beside._copies
        for class_name in entry["involved_classes"]:
            instance = service_class(class_name)()
            if class_name not in STATELESS_CLASSES:
                config = copy.deepcopy(entry["initial_config"].get(class_name, {}))
                instance._load_scenario(config, long_context="long_context" in category_of(entry))
                instance = copy.deepcopy(instance, self._copies)
            self.instances[class_name] = instance
            self._defaults.update(copy.deepcopy(_mutable_defaults(class_name), self._copies))
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
            if not isinstance(name, str) or name not in self._methods:
                raise NameError(f"name '{name}' is not defined")
            method = self._methods[name]
            arguments = plain_copy(arguments)
            refuse_expensive(method.__self__, name, arguments)
            if not self._circles:
                refuse_circle(method.__self__, name, arguments)
            arguments = {**self._defaults.get(name, {}), **arguments}
            if name != WRITES_TO_MODULE and method.__self__ is not self.instances.get("MathAPI"):
                return _as_text(method(**arguments))
            with _module_lock, decimal.localcontext(), mpmath.workdps(mpmath.mp.dps):
                return _as_text(method(**arguments))
        except Exception as error:
            return f"Error during execution: {error}"

    def parse_call(self, call: str) -> Call:
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


@cache
def ground_truth(task_id: str) -> list[list[Call]]:
    """The calls of the ground truth of a task, one list for each user turn. Treat them as read-only."""
    entry = load_entry(task_id)
    services = Services(entry)
    return [[services.parse_call(call) for call in calls] for calls in entry["ground_truth"]]


def service_class(class_name: str) -> type:
    """The class of a service in the `bfcl-eval` package."""
    return getattr(importlib.import_module(CLASS_FILE_PATH_MAPPING[class_name]), class_name)


@lru_cache
def _mutable_defaults(class_name: str) -> dict[str, dict[str, Any]]:
    """Default arguments that a service could change, by function and parameter: the package's own objects."""
    defaults = {}
    for function_doc in load_function_docs(class_name):
        parameters = inspect.signature(getattr(service_class(class_name), function_doc["name"])).parameters
        mutable = {p.name: p.default for p in parameters.values() if isinstance(p.default, (list, dict, set))}
        if mutable:
            defaults[function_doc["name"]] = mutable
    return defaults


def _as_text(result: Any) -> str:
    if isinstance(result, dict):
        try:
            return json.dumps(result)
        except Exception:  # as the official executor, whatever the error
            return str(result)
    return str(result)
