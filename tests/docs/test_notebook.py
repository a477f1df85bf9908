"""The notebook is the getting-started page, and its cells run."""

import importlib.util
import json

import pytest
from documentation import DOCS, blocks_of


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("notebook", DOCS / "notebook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_notebook_is_the_page(maker):
    assert maker.NOTEBOOK.read_text() == maker.notebook(), "run python docs/notebook.py"


def test_the_notebook_has_the_code_of_the_page(maker):
    cells = json.loads(maker.NOTEBOOK.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    python = [block.code.strip() for block in blocks_of(DOCS / "getting_started.md") if block.language == "python"]
    assert [cell for cell in code if not cell.startswith(("!", "#"))] == python
    assert "%pip install" in code[0]
    assert "!python -m seeupo_trl.view guess" in code


def test_its_cells_run(maker, reader):
    namespace = {"__name__": "__main__"}
    for cell in json.loads(maker.NOTEBOOK.read_text())["cells"]:
        source = "".join(cell["source"])
        # what a notebook hands to the shell
        if cell["cell_type"] == "code" and not source.startswith(("!", "#")):
            exec(compile(source, cell["id"], "exec"), namespace)
    assert set(namespace["turns"]["iteration"]) == {1}
