"""Which warmed-up model a run finds in the cache."""

from importlib.resources import files
from pathlib import Path

import pytest
from tiny import save_tiny_model


pytest.importorskip("bfcl_eval")

from seeupo_trl.envs.bfcl import BfclEnvironment, load_bfcl
from seeupo_trl.recipes.arguments import BfclArguments
from seeupo_trl.recipes.bfcl import warmed_up


def save_model(directory, seed=0) -> str:
    save_tiny_model(directory, seed=seed, max_position_embeddings=8192)
    template = files("trl").joinpath("chat_templates/qwen3_instruct_2507.jinja").read_text()
    (directory / "chat_template.jinja").write_text(template)
    return str(directory)


@pytest.fixture
def warm(tmp_path):
    """Warm a tiny model up for one step on tasks, by default the first six, and return the entry of the cache."""
    model = save_model(tmp_path / "model")
    tasks = load_bfcl("base", "train")

    def warm(positions=range(6), tools="brief", **arguments):
        environment = BfclEnvironment(tools=tools, tool_list="needed", max_user_turns=1)
        script_args = BfclArguments(warmup_steps_sft=1, **arguments)
        return warmed_up(model, tmp_path / "cache", tasks.select(positions), environment, script_args)

    warm.model = model
    return warm


def test_same_tasks_share_an_entry(warm):
    assert warm() == warm()


def test_whatever_is_learned_names_the_entry(warm):
    # the repr of a column shows its first five ids only
    entries = [
        warm(),
        warm(positions=[0, 1, 2, 3, 4, 6]),
        warm(positions=range(7)),
        warm(tools="full"),
        warm(warmup_learning_rate=1e-3),
        warm(trained_layers=1),
    ]
    save_model(Path(warm.model), seed=1)
    entries.append(warm())
    assert len(set(entries)) == len(entries)
