"""The rooms of `seeupo_trl` and their floors: imports go downwards only, and tests import helpers only."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[1] / "seeupo_trl"
MOST_MODULES_AT_THE_TOP = 10

# From the highest floor to the lowest. A room is a folder or a module at the top of the package; it imports from rooms
# on lower floors only. Imports for type checkers count like all others.
FLOORS = [
    {"__main__": "`python -m seeupo_trl`"},
    {"command_line": "the command `seeupo-trl`"},
    {"recipes": "what scripts for training and evaluation share"},
    {"__init__": "public names, loaded on first use"},
    {"seeupo_trainer": "SeeUPOTrainer: the hooks of TRL's trainer"},
    {
        "trainer_inputs": "what the trainer is given: rollout, rewards, dataset",
        "grpo_compatibility": "which methods and attributes of GRPOTrainer a script may override or change",
    },
    {"view": "a page that shows saved trajectories", "plan": "what a run will need of memory and time"},
    {
        "trajectory_log": "trajectories as parquet files",
        "episode_batch": "one generation batch, from its episodes to their advantages",
    },
    {"evaluation": "outcomes of episodes, and how sure their summary is"},
    {"update": "the turn-by-turn update of the policy, Algorithm 1 of the paper"},
    {"seeupo_config": "SeeUPOConfig: every option of a run"},
    {"rollout": "episodes of the policy in environments"},
    {"scoring": "log-probabilities of turns, their tokens laid out in rows or trees"},
    {"trajectory": "Turn and Trajectory: what was sampled"},
    {
        "envs": "environments and what they have to provide",
        "distributed": "several processes in lock step, DeepSpeed, FSDP2, checkpoints",
    },
]
FLOOR_OF = {room: -number for number, floor in enumerate(FLOORS) for room in floor}


def name_of(path: Path) -> str:
    """Dotted name below the package: `scoring.rows`, `scoring.__init__`, `trajectory`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {name_of(path): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def room_of(module: str) -> str:
    return module.partition(".")[0]


def module_named(dotted: str) -> str | None:
    """The module of the package that has this dotted name, with the package's own name in front."""
    package, _, name = dotted.partition(".")
    if package != PACKAGE.name:
        return None
    return next((found for found in (name, f"{name}.__init__".lstrip(".")) if found in MODULES), None)


def imported_names(module: str, tree: ast.Module) -> Iterator[list[str]]:
    """What a module imports anywhere in it: for `from a import b`, either `a.b` or `a` is the name of a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ([alias.name] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = f"{PACKAGE.name}.{module}".split(".")[: -node.level] if node.level else []
            base = ".".join([*base, node.module] if node.module else base)
            yield from ([f"{base}.{alias.name}", base] for alias in node.names)


def imports_of(module: str, tree: ast.Module) -> set[str]:
    """Modules of the package that a module imports."""
    found = {next(filter(None, map(module_named, names)), None) for names in imported_names(module, tree)}
    return found - {None}


IMPORTS = {module: imports_of(module, tree) for module, tree in MODULES.items()}


def test_every_room_has_a_floor():
    assert {room_of(module) for module in MODULES} <= FLOOR_OF.keys(), "describe the new room in FLOORS"


def test_few_modules_lie_at_the_top():
    assert sum("." not in module for module in MODULES) <= MOST_MODULES_AT_THE_TOP


@pytest.mark.parametrize("room", FLOOR_OF)
def test_a_room_imports_from_lower_floors_only(room):
    wrong = {
        f"{module} imports {imported}"
        for module, imports in IMPORTS.items()
        for imported in imports
        if room_of(module) == room != room_of(imported) and FLOOR_OF[room_of(imported)] >= FLOOR_OF[room]
    }
    assert not wrong


def test_there_is_no_circle_of_imports():
    tuple(TopologicalSorter(IMPORTS).static_order())


def test_tests_share_helpers_and_do_not_import_one_another():
    sources = {path: ast.parse(path.read_text()) for path in Path(__file__).parent.rglob("*.py")}
    wrong = {
        f"{path.name} imports {name}"
        for path, tree in sources.items()
        for names in imported_names(path.stem, tree)
        for name in names
        if name.startswith("test_")
    }
    assert not wrong, "what tests share lies in tests/helpers"
