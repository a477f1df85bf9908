"""The site: it builds strictly, its links lead somewhere, and the API says what the docstrings say."""

import inspect
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module

import pytest
from documentation import ROOT


pytest.importorskip("zensical", reason="needs the extra `docs`")
import griffe


def build(directory):
    """Build the site from a copy, so that two tests may do so at once."""
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=300)


@pytest.fixture
def source(tmp_path):
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("docs", "seeupo_trl"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    (tmp_path / "benchmarks" / "learning" / "results").mkdir(parents=True)
    for name in ("mkdocs.yml", "benchmarks/README.md", "benchmarks/learning/results/tables.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


class Page(HTMLParser):
    """What a page refers to, what it loads, and where it can be entered."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.anchors = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors |= {attributes.get("id"), attributes.get("name")}
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])
        elif tag in ("img", "script") and attributes.get("src"):
            self.loads.append(attributes["src"])
        elif tag == "link" and attributes.get("rel") in ("stylesheet", "preload", "preconnect"):
            self.loads.append(attributes["href"])


def test_it_builds_and_hangs_together(source):
    run = build(source)
    assert run.returncode == 0, run.stdout + run.stderr
    site = source / "site"
    pages = {path: Page(path.read_text()) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(pages) > 25
    for path, page in pages.items():
        for load in page.loads:
            assert not re.match(r"(https?:)?//", load), f"{path.name} loads {load}"
            assert (path.parent / load.partition("?")[0]).exists(), f"{path.name} loads {load}"
        for link in page.links:
            if re.match(r"https?:", link):
                continue
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            assert target.exists(), f"{path.name} links {link}"
            if anchor and target in pages:
                assert anchor in pages[target].anchors, f"{path.name} links {link}"
    trainer = pages[site / "api" / "trainer.html"]
    assert "rollout.html#seeupo_trl.MultiTurnRollout" in trainer.links
    assert "[`" not in (site / "api" / "trainer.html").read_text()  # every reference became a link or code


def test_it_does_not_build_with_a_broken_link_anchor_or_reference(source):
    with (source / "docs" / "index.md").open("a") as page:
        page.write("[link](nowhere.md) [anchor](grpo.md#nowhere) [reference][seeupo_trl.nowhere]")
    run = build(source)
    assert run.returncode != 0
    for issue in ("page does not exist", "anchor does not exist", "unresolved autoref"):
        assert issue in run.stderr + run.stdout


def test_it_does_not_build_with_a_broken_reference_in_a_docstring(source):
    with (source / "seeupo_trl" / "envs" / "base.py").open("a") as module:
        module.write('\n\ndef added() -> None:\n    """See [`Nowhere`]."""\n')
    run = build(source)
    assert run.returncode != 0
    assert "'Nowhere', which there is not" in run.stderr + run.stdout


# ---- Docstrings ----


@pytest.fixture(scope="module")
def package():
    sys.path.insert(0, str(ROOT / "docs" / "_ext"))
    try:
        extension = import_module("hugging_face_docstrings").HuggingFaceDocstrings(pages="docs/api")
    finally:
        sys.path.pop(0)
    return griffe.load("seeupo_trl", search_paths=[ROOT], extensions=griffe.load_extensions(extension))


def parameters_of(obj) -> dict:
    sections = [s for s in obj.docstring.parsed if s.kind is griffe.DocstringSectionKind.parameters]
    return {parameter.name: parameter for section in sections for parameter in section.value}


def test_parameters_become_rows_with_name_type_and_default(package):
    config = package["seeupo_config.SeeUPOConfig"]
    order = parameters_of(config)["update_order"]
    assert (order.annotation, order.default) == ("str", '"reverse"')
    assert order.description.startswith("Order in which the turns are updated.")
    assert parameters_of(config)["advantage_clip"].default == "None"
    titles = [s.title for s in config.docstring.parsed if s.kind is griffe.DocstringSectionKind.parameters]
    assert titles[0] == "Parameters that control the turn-by-turn update"


def test_several_parameters_in_a_line_are_several_rows(package):
    rows = parameters_of(package["update.objective.clipped_surrogate"])
    assert rows["epsilon_low"].annotation == rows["epsilon_high"].annotation == "float"
    trainer = parameters_of(package["seeupo_trainer.SeeUPOTrainer"])
    assert trainer["model"].default is None
    assert trainer["reward_funcs"].default == "None"


def test_references_become_links_or_code(package):
    sections = package["rollout.multi_turn.MultiTurnRollout"].docstring.parsed
    text = "\n".join(s.value for s in sections if s.kind is griffe.DocstringSectionKind.text)
    assert "[`SeeUPOTrainer`][seeupo_trl.SeeUPOTrainer]" in text
    assert "[`GRPOTrainer`](https://huggingface.co/docs/trl/grpo_trainer#trl.GRPOTrainer)" in text
    assert "[`StopReason`][seeupo_trl.StopReason]" in text
    assert "[`Trajectory`][seeupo_trl.Trajectory]" in text


def test_returns_and_raises_have_type_and_text(package):
    sections = {s.kind.value: s.value for s in package["update.objective.center_by_group"].docstring.parsed}
    assert sections["returns"][0].annotation == "torch.Tensor of shape (N,)"
    assert sections["returns"][0].description.startswith("Advantages in float64")


@pytest.mark.parametrize(
    "name",
    [
        "seeupo_config.SeeUPOConfig",
        "rollout.multi_turn.MultiTurnRollout",
        "envs.base.Observation",
        "envs.base.StepResult",
        "envs.isolated.IsolatedEnvironment",
        "envs.tools.ToolEnvironment",
        "trajectory.Trajectory",
        "trajectory.Turn",
        "update.objective.sequence_log_ratios",
        "update.objective.clipped_surrogate",
    ],
)
def test_documented_parameters_are_the_real_ones(name, package):
    module, _, attribute = name.rpartition(".")
    real = inspect.signature(getattr(import_module(f"seeupo_trl.{module}"), attribute)).parameters
    documented = parameters_of(package[name])
    assert set(documented) <= set(real)
    for row in documented.values():
        has_default = real[row.name].default is not inspect.Parameter.empty
        assert has_default == (row.default is not None), f"{name}: default of {row.name}"
