"""Code in the README and in the documentation does what it says it does: it runs, and its flags exist."""

import re
import shlex

import pytest
from documentation import PAGES, ROOT, blocks_of, name_of


PYTHON = {page: blocks for page in PAGES if (blocks := [b for b in blocks_of(page) if b.language == "python"])}
BASH = [block for page in PAGES for block in blocks_of(page) if block.language in ("bash", "sh")]


@pytest.mark.parametrize("page", PYTHON, ids=name_of)
def test_the_python_of_a_page_runs_from_top_to_bottom(page, reader):
    namespace = {"__name__": "page"}
    left_out = []
    for block in PYTHON[page]:
        if "envs.bfcl" in block.code:
            pytest.importorskip("bfcl_eval", reason="bfcl-eval comes without its dependencies, see docs/bfcl.md")
        if "envs.textarena" in block.code:
            pytest.importorskip("textarena", reason="needs the extra `textarena`")
        if block.reason is None:
            block.run(namespace)
        else:
            left_out.append(f"{name_of(page)}:{block.line} is not run: {block.reason}")
    if left_out:
        pytest.skip("; ".join(left_out))


def test_only_what_needs_appworld_is_not_run():
    not_run = [block for blocks in PYTHON.values() for block in blocks if block.reason]
    assert [name_of(block.page) for block in not_run] == ["docs/appworld.md"]


def words_of(block) -> list[list[str]]:
    """The commands of a block, each split into its words."""
    code = block.code.replace("\\\n", " ")
    lines = [line for line in code.splitlines() if line.strip()]
    commands = []
    for line in lines:
        if '"from peft' in line or line.count('"') % 2:  # a program in quotation marks
            return commands
        commands.append(shlex.split(line, comments=True))
    return [command for command in commands if command]


def test_files_that_commands_name_exist():
    for block in BASH:
        for command in words_of(block):
            for word in command:
                if re.match(r"(examples|benchmarks|tests|docs)/[\w./-]+$", word):
                    assert (ROOT / word).exists(), f"{name_of(block.page)}:{block.line}: {word}"


def test_flags_of_the_planner_parse():
    from seeupo_trl.plan.__main__ import build_parser

    seen = 0
    for block in BASH:
        for command in words_of(block):
            for start in (["python", "-m", "seeupo_trl.plan"], ["seeupo-trl", "plan"]):
                if command[: len(start)] == start and "..." not in command:
                    build_parser().parse_args(command[len(start) :])
                    seen += 1
    assert seen


def test_flags_of_the_examples_exist(tmp_path):
    """As fields of what the examples parse: arguments of the tasks, of the trainer, and of the model."""
    from trl import ModelConfig

    from seeupo_trl import SeeUPOConfig

    known = {*SeeUPOConfig.__dataclass_fields__, *ModelConfig.__dataclass_fields__, "config"}
    sources = "\n".join(
        path.read_text() for folder in ("examples", "seeupo_trl") for path in (ROOT / folder).rglob("*.py")
    )
    known |= set(re.findall(r"^    (\w+): .*= field\(", sources, re.MULTILINE))
    for block in BASH:
        for command in words_of(block):
            script = next((word for word in command if re.match(r"examples/\w+\.py$", word)), None)
            if script is None:
                continue
            own = set(re.findall(r'"--(\w+)"', (ROOT / script).read_text()))
            for word in command[command.index(script) + 1 :]:
                if word.startswith("--"):
                    name = word[2:].partition("=")[0]
                    assert name in known | own, f"{name_of(block.page)}:{block.line}: {script} has no {word}"
