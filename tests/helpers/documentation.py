"""
The README and the pages of the documentation, as tests read them: their blocks of code, their links.

Names on the Hub stand for a tiny model there. [`fill_hub_cache`] lays it into a directory as the Hub's own cache
would, so `from_pretrained` finds it without the network and no code of a page is changed.
"""

import re
import shutil
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path


ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *sorted(DOCS.rglob("*.md"))]
HUB_MODELS = ("Qwen/Qwen3-0.6B", "HuggingFaceTB/SmolLM2-135M-Instruct")

_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>.+?) -->\n)?^(?P<fence>```+)(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)


@dataclass
class Block:
    """
    A fenced block of code.

    Args:
        page (`Path`), line (`int`):
            Where it stands: the line of its first line of code.
        language (`str`):
            `"python"`, `"bash"`, ...
        code (`str`):
            What stands between the fences.
        reason (`str`, *optional*):
            Why it is not run, from the comment in front of it.
    """

    page: Path
    line: int
    language: str
    code: str
    reason: str | None

    def run(self, namespace: dict) -> None:
        """Execute it, with tracebacks that point into the page."""
        padded = "\n" * (self.line - 1) + self.code
        exec(compile(padded, str(self.page), "exec"), namespace)


def blocks_of(page: Path) -> list[Block]:
    """All blocks of code of a page, from top to bottom."""
    text = page.read_text()
    return [
        Block(page, text.count("\n", 0, match.start("code")) + 1, match["language"], match["code"], match["reason"])
        for match in _BLOCK.finditer(text)
    ]


def prose_of(page: Path) -> str:
    """A page without its blocks and its code."""
    return re.sub(r"`+[^`\n]*`+", "", _BLOCK.sub("", page.read_text()))


def name_of(page: Path) -> str:
    """A page's path, for the names of tests."""
    return str(page.relative_to(ROOT))


def fill_hub_cache(cache: Path, model: str | Path) -> None:
    """Make every name of [`HUB_MODELS`] mean the model in the directory `model`, for one who looks into `cache`."""
    template = files("trl").joinpath("chat_templates/qwen3.jinja").read_text()
    for name in HUB_MODELS:
        directory = cache / f"models--{name.replace('/', '--')}"
        shutil.copytree(model, directory / "snapshots" / "tiny")
        # one that TRL knows how to read tool calls from
        (directory / "snapshots" / "tiny" / "chat_template.jinja").write_text(template)
        (directory / "refs").mkdir()
        (directory / "refs" / "main").write_text("tiny")
