"""
Random trajectories of BFCL tasks, and what the official implementation says of them.

Run as a script it compares any number of them:

    python tests/bfcl_trajectories.py --tasks 200 --each 20
"""

import argparse
import copy
import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from seeupo_trl.envs.bfcl import BfclEnvironment
from seeupo_trl.envs.bfcl.checks import check_trajectory
from seeupo_trl.envs.bfcl.data import CATEGORIES, load_entries, load_function_docs
from seeupo_trl.envs.bfcl.services import ground_truth


ANSWER = {"role": "assistant", "content": "Done."}

# Scores trajectories with the official evaluation: `[id, turns of steps of call strings]` a line in, its verdict out.
# It keeps instances in globals and writes to dicts of its modules, so that each trajectory gets a process of its own;
# "shared" runs all in one process instead, each under another name of a model.
OFFICIAL = """
import json, os, sys
from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker import multi_turn_checker
from seeupo_trl.envs.bfcl.data import load_entry

def verdict(number, task_id, turns):
    entry = load_entry(task_id)
    if len(turns) != len(entry["ground_truth"]):  # as in eval_runner.py
        return False
    try:
        return multi_turn_checker(turns, entry["ground_truth"], entry, "", f"model_{number}")["valid"]
    except Exception as error:
        return type(error).__name__

lines = sys.stdin.read().splitlines()
for number, line in enumerate(lines):
    if sys.argv[1] == "shared":
        print(json.dumps(verdict(number, *json.loads(line))))
        continue
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, json.dumps(verdict(number, *json.loads(line))).encode())
        os._exit(0)
    os.close(writer)
    print(os.read(reader, 1000).decode() or '"died"')
    os.close(reader)
    os.waitpid(child, 0)
"""


def as_source(name, arguments):
    """A call as the official handlers write it."""
    return f"{name}({','.join(f'{key}={value!r}' for key, value in arguments.items())})"


def official_verdicts(trajectories, mode="apart"):
    """What the official evaluation says: `True`, `False`, or the name of an exception. In a process of its own."""
    lines = [
        json.dumps([task_id, [[[as_source(*call) for call in step] for step in steps] for steps in turns]])
        for task_id, turns in trajectories
    ]
    command = [sys.executable, "-c", OFFICIAL, mode]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def play(task_id, turns, environment=None):
    """Play a trajectory through an environment; returns the last step result."""
    environment = environment or BfclEnvironment()
    environment.reset(id=task_id)
    result = None
    for steps in turns:
        for calls in steps:
            tool_calls = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls]
            result = environment.step({"role": "assistant", "content": "", "tool_calls": tool_calls})
        result = environment.step(ANSWER)
    return result


class Mutator:
    """Writes random trajectories of a task: its ground truth, with none, one or several things changed."""

    def __init__(self, task_id, rng):
        self.rng = rng
        self.entry = load_entries(task_id.rpartition("_")[0])[task_id]
        self.docs = [doc for name in self.entry["involved_classes"] for doc in load_function_docs(name)]
        self.truth = ground_truth(task_id)
        self.values = [value for calls in self.truth for _, arguments in calls for value in arguments.values()]
        self.words = list(_words(self.entry["initial_config"])) or ["word"]

    def trajectory(self):
        turns = copy.deepcopy([list(calls) for calls in self.truth])
        changes = [
            self.drop, self.repeat, self.swap, self.move, self.corrupt, self.corrupt, self.rename, self.read, self.add,
            self.add, self.empty, self.stop, self.drop_argument, self.add_argument, self.undo,
        ]  # fmt: skip
        for change in self.rng.sample(changes, self.rng.choice([0, 1, 1, 1, 2, 3])):
            change(turns)
        turns = [self.split(calls) for calls in turns]
        if self.rng.random() < 0.05:
            turns = turns[: self.rng.randrange(len(turns))]
        return turns

    def split(self, calls):
        """Spread the calls of a user turn over at most 20 messages."""
        if not calls:
            return []
        kind = self.rng.choice(["one", "each", "random"])
        size = {"one": len(calls), "each": 1 + len(calls) // 21, "random": self.rng.randint(1 + len(calls) // 21, 6)}
        return [calls[i : i + size[kind]] for i in range(0, len(calls), size[kind])]

    def pick(self, turns):
        """A turn that has calls, and the index of one of them."""
        filled = [calls for calls in turns if calls]
        calls = self.rng.choice(filled) if filled else None
        return calls, calls and self.rng.randrange(len(calls))

    def drop(self, turns):
        calls, i = self.pick(turns)
        if calls:
            del calls[i]

    def repeat(self, turns):
        calls, i = self.pick(turns)
        if calls:
            self.rng.choice([calls, self.rng.choice(turns)]).append(copy.deepcopy(calls[i]))

    def swap(self, turns):
        calls, _ = self.pick(turns)
        if calls:
            self.rng.shuffle(calls)

    def move(self, turns):
        calls, i = self.pick(turns)
        if calls:
            target = self.rng.choice(turns)
            target.insert(self.rng.randint(0, len(target)), calls.pop(i))

    def corrupt(self, turns):
        calls, i = self.pick(turns)
        if calls and calls[i][1]:
            arguments = calls[i][1]
            name = self.rng.choice(list(arguments))
            arguments[name] = self.other(arguments[name])

    def drop_argument(self, turns):
        calls, i = self.pick(turns)
        if calls and calls[i][1]:
            del calls[i][1][self.rng.choice(list(calls[i][1]))]

    def add_argument(self, turns):
        calls, i = self.pick(turns)
        if calls:
            name = calls[i][0]
            doc = next(doc for doc in self.docs if doc["name"] == name)
            names = [*doc["parameters"]["properties"], "unknown", "self"]
            calls[i][1].setdefault(self.rng.choice(names), self.rng.choice([*self.values, *self.words, 1, True]))

    def rename(self, turns):
        calls, i = self.pick(turns)
        if calls:
            name = self.rng.choice([doc["name"] for doc in self.docs] + ["unknown_function", calls[i][0].upper()])
            calls[i] = (name, calls[i][1]) if name[0].islower() and self.rng.random() < 0.3 else self.call(name)

    def read(self, turns):
        """An extra call that changes nothing, most of the time."""
        readers = [
            d["name"] for d in self.docs if d["name"].split("_")[0] in ("get", "ls", "pwd", "view", "list", "find")
        ]
        self.insert(turns, self.call(self.rng.choice(readers or ["pwd"])))

    def add(self, turns):
        """An extra call that may change anything."""
        for _ in range(self.rng.randint(1, 3)):
            self.insert(turns, self.call(self.rng.choice(self.docs)["name"]))

    def undo(self, turns):
        """Two calls in a row that may undo each other: login and logout, make and remove, ..."""
        names = [doc["name"] for doc in self.docs]
        target = self.rng.choice(turns)
        for name in self.rng.sample(names, 2):
            target.append(self.call(name))

    def empty(self, turns):
        self.rng.choice(turns).clear()

    def stop(self, turns):
        for calls in turns[self.rng.randrange(len(turns)) :]:
            calls.clear()

    def insert(self, turns, call):
        calls = self.rng.choice(turns)
        calls.insert(self.rng.randint(0, len(calls)), call)

    def call(self, name):
        """A call with arguments that may well be valid."""
        doc = next((doc for doc in self.docs if doc["name"] == name), None)
        if doc is None:
            return name, {}
        required = doc["parameters"].get("required", [])
        return name, {
            key: self.argument(key, schema)
            for key, schema in doc["parameters"]["properties"].items()
            if key in required or self.rng.random() < 0.4
        }

    def argument(self, name, schema):
        known = [a[name] for calls in self.truth for _, a in calls if name in a]
        if known and self.rng.random() < 0.7:
            return copy.deepcopy(self.rng.choice(known))
        if "enum" in schema and self.rng.random() < 0.9:
            return self.rng.choice(schema["enum"])
        kind = schema["type"]
        if kind in ("array", "tuple"):
            return [self.argument("", schema.get("items", {"type": "string"})) for _ in range(self.rng.randint(0, 3))]
        if kind == "dict":
            keys = self.rng.sample(["title", "description", "status", "priority", "x"], self.rng.randint(0, 2))
            return {key: self.rng.choice(self.words) for key in keys}
        numbers = [word for word in self.words if isinstance(word, (int, float))]
        return {
            "integer": lambda: self.rng.choice([0, 1, 2, 5, 10, -1, 12345, 12446, *numbers]),
            "float": lambda: self.rng.choice([0.0, 0.5, 1, 32.5, 100, -3, 1e6, *numbers]),
            "boolean": lambda: self.rng.choice([True, False]),
        }.get(kind, lambda: self.rng.choice([*self.words, "a", "", ".", "/", "..", "docs"]))()

    def other(self, value):
        """Another value: near, of another type, or from elsewhere in the task."""
        choices = [lambda: self.rng.choice(self.values), lambda: self.rng.choice(self.words), lambda: None]
        if isinstance(value, bool):
            choices += [lambda: not value] * 3
        elif isinstance(value, (int, float)):
            choices += [
                lambda: value + 1, lambda: float(value), lambda: str(value), lambda: -value, lambda: int(value),
                lambda: float("inf"), lambda: float("nan"), lambda: value * 10**30, lambda: value + 1e-9,
            ]  # fmt: skip
        elif isinstance(value, str):
            choices += [
                lambda: value + " ", lambda: value[:-1], lambda: value.upper(), lambda: [value],
                lambda: value + "'\"\\\n", lambda: "", lambda: value * 2, lambda: value + "/",
                lambda: value + "\u00e9\u4e16",
            ]  # fmt: skip
        elif isinstance(value, list):
            choices += [
                lambda: value[::-1],
                lambda: value[:-1],
                lambda: value + value,
                lambda: value[0] if value else 0,
            ]
        return copy.deepcopy(self.rng.choice(choices)())


def _words(value):
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _words(item)
    elif isinstance(value, list):
        for item in value:
            yield from _words(item)
    elif value is not None:
        yield value


def random_trajectories(category, tasks, each, seed=0):
    """
    Random trajectories of a category, each `(task id, turns of steps of calls)`.

    Args:
        category (`str`): the official name.
        tasks (`int`): number of tasks, chosen at random.
        each (`int`): trajectories of a task.
        seed (`int`): of everything.
    """
    rng = random.Random(f"{category} {seed}")
    chosen = rng.sample(list(load_entries(category)), tasks)
    return [(task_id, Mutator(task_id, rng).trajectory()) for task_id in chosen for _ in range(each)]


def compare(trajectories, threads=32, mode="apart"):
    """
    Score trajectories both ways.

    Returns:
        `tuple`: the number scored valid by the official evaluation, and the trajectories scored differently, each with
        the official verdict, the environment's and that of `check_trajectory`.
    """
    with ThreadPoolExecutor(threads) as pool:
        # an environment plays the trajectories it can: all user turns, each to its end
        played = pool.map(lambda t: len(t[1]) > 0 and play(*t).info["success"], trajectories)
        checked = pool.map(lambda t: check_trajectory(*t) is None, trajectories)
        ours = list(zip(played, checked, strict=True))
    official = official_verdicts(trajectories, mode)
    different = [
        (trajectory, verdict, *both)
        for trajectory, verdict, both in zip(trajectories, official, ours, strict=True)
        if {verdict is True} != set(both)
    ]
    return official.count(True), different


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--each", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mode", default="apart", choices=["apart", "shared"])
    options = parser.parse_args()
    for name in CATEGORIES:
        sample = random_trajectories(name, options.tasks, options.each, options.seed)
        valid, differing = compare(sample, mode=options.mode)
        print(f"{name}: {len(sample)} trajectories, {valid} valid, {len(differing)} scored differently", flush=True)
        for item in differing[:5]:
            print("   ", item)
