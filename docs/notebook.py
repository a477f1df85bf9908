"""Makes `tutorial.ipynb` from `getting_started.md`: `python docs/notebook.py`."""

import json
import re
from pathlib import Path


PAGE = Path(__file__).with_name("getting_started.md")
NOTEBOOK = Path(__file__).with_name("tutorial.ipynb")
INSTALL = """\
# Until the first release is on PyPI: build a wheel in a clone (`python -m build`), upload it, and install that file.
%pip install -q seeupo-trl"""


def cells(page: str) -> list[dict]:
    """The page as cells: prose, Python as it stands, commands behind an exclamation mark, a cell that installs."""
    result = []
    for number, part in enumerate(re.split(r"^```(\w+)\n(.*?)^```\n", page, flags=re.MULTILINE | re.DOTALL)):
        kind = number % 3
        if kind == 0:
            result.append(("markdown", part.strip()))
        elif kind == 1:
            language = part
        elif language == "python":
            result.append(("code", part.strip()))
        elif "pip install" in part:
            result.append(("code", INSTALL))
        else:
            result.append(("code", "\n".join(f"!{line}" for line in part.replace(" --open", "").splitlines())))
    # links of the site lead nowhere in a notebook
    return [
        {
            "cell_type": kind,
            "id": f"cell-{number}",
            "metadata": {},
            **({"execution_count": None, "outputs": []} if kind == "code" else {}),
            "source": (re.sub(r"\[([^]]*)\]\([\w./#-]+\)", r"\1", text) if kind == "markdown" else text).splitlines(
                keepends=True
            ),
        }
        for number, (kind, text) in enumerate(result)
        if text
    ]


def notebook() -> str:
    """The notebook as the text of its file."""
    content = {
        "cells": cells(PAGE.read_text()),
        "metadata": {
            "accelerator": "GPU",
            "colab": {"provenance": []},
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1) + "\n"


if __name__ == "__main__":
    NOTEBOOK.write_text(notebook())
