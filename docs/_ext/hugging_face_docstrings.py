"""
Docstrings in the grammar of Hugging Face's libraries, for mkdocstrings.

    Args:
        name (`type`, *optional*, defaults to `x`):
            Text.

becomes a row of a table. `> A line like this` between parameters gives the rows below it a table of their own. A
reference like [`SeeUPOTrainer`] or [`~trl.GRPOTrainer`] becomes a link where there is a page to link to, and code
where there is none. One that names nothing ends the build.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from griffe import (
    Alias,
    Class,
    Docstring,
    DocstringAttribute,
    DocstringParameter,
    DocstringRaise,
    DocstringReturn,
    DocstringSection,
    DocstringSectionAttributes,
    DocstringSectionParameters,
    DocstringSectionRaises,
    DocstringSectionReturns,
    DocstringSectionText,
    Extension,
    Module,
    Object,
)


PACKAGE = "seeupo_trl"

# Pages of other projects. A name without a page here is shown as code.
EXTERNAL_PAGES = {
    "trl.GRPOTrainer": "https://huggingface.co/docs/trl/grpo_trainer#trl.GRPOTrainer",
    "trl.GRPOConfig": "https://huggingface.co/docs/trl/grpo_trainer#trl.GRPOConfig",
    "transformers.Trainer": "https://huggingface.co/docs/transformers/main_classes/trainer#transformers.Trainer",
    "transformers.Trainer.train": "https://huggingface.co/docs/transformers/main_classes/trainer#transformers.Trainer.train",
    "transformers.TrainingArguments": "https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments",
    "transformers.HfArgumentParser": "https://huggingface.co/docs/transformers/internal/trainer_utils#transformers.HfArgumentParser",
    "transformers.PreTrainedModel": "https://huggingface.co/docs/transformers/main_classes/model#transformers.PreTrainedModel",
    "accelerate.Accelerator": "https://huggingface.co/docs/accelerate/package_reference/accelerator",
    "peft.LoraConfig": "https://huggingface.co/docs/peft/package_reference/lora#peft.LoraConfig",
}
EXTERNAL_PROJECTS = ("trl", "transformers", "accelerate", "peft", "datasets", "torch", "numpy", "pyarrow", "packaging")

REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?![(\[])")
HEADING = re.compile(r"(Args|Parameters|Attributes|Returns|Raises|Example|Examples):")
ITEM = re.compile(r"(?P<names>[\w*][\w*, ]*?)(?: \((?P<rest>.*)\))?:")
SEVERAL_ITEMS = re.compile(r"(\w+) \(([^()]*)\)(?:, |$)")
DEFAULT = re.compile(r", defaults to (.*)$")


class UnknownReferenceError(ValueError):
    """A docstring refers to a name that there is not."""


class HuggingFaceDocstrings(Extension):
    """
    Reads the docstrings of the package, and resolves what they refer to.

    Args:
        pages (`str`):
            Directory of the Markdown pages with the `:::` lines, relative to the directory of the build's
            configuration.
    """

    def __init__(self, pages: str):
        self._pages = Path(__file__).parents[2] / pages
        self._documented: dict[str, str] = {}

    def on_package(self, *, pkg: Module, **kwargs) -> None:
        if pkg.path != PACKAGE:
            return
        text = "\n".join(page.read_text() for page in self._pages.glob("*.md"))
        names = re.findall(r"^::: (\S+)", text, re.MULTILINE)
        self._documented = {pkg[name.removeprefix(f"{PACKAGE}.")].canonical_path: name for name in names}
        for obj in _objects(pkg):
            if obj.docstring is not None:
                # griffe keeps what it parsed under this name
                obj.docstring.__dict__["parsed"] = self.sections(obj.docstring)

    def sections(self, docstring: Docstring) -> list[DocstringSection]:
        """The sections of a docstring, in its order."""
        sections: list[DocstringSection] = []
        for heading, lines in _split(docstring.value):
            if heading in (None, "Example", "Examples"):
                text = "\n".join(lines) if heading is None else "**Example**\n\n" + "\n".join(lines)
                if text.strip():
                    sections.append(DocstringSectionText(self.linked(text, docstring.parent)))
            elif heading in ("Args", "Parameters", "Attributes"):
                sections += self._tables(heading, lines, docstring)
            else:
                sections.append(self._outcomes(heading, lines, docstring))
        return sections

    def _tables(self, heading: str, lines: list[str], docstring: Docstring) -> Iterator[DocstringSection]:
        is_attributes = heading == "Attributes"
        title, rows = None, []
        for head, text in _items(lines):
            if head.startswith(">"):
                if rows:
                    yield _table(rows, title, is_attributes)
                title, rows = head.removeprefix("> "), []
                continue
            for name, kind, is_optional, default in _parse_item(head):
                kind = REFERENCE.sub(lambda match: match[2].rpartition(".")[2], kind).replace("`", "")
                if not kind:
                    default = _default_in_signature(name, docstring.parent)
                elif is_optional and default is None:
                    default = "None"
                description = self.linked(text, docstring.parent)
                if is_attributes:
                    rows.append(DocstringAttribute(name, annotation=kind, description=description))
                else:
                    rows.append(DocstringParameter(name, annotation=kind, description=description, value=default))
        yield _table(rows, title, is_attributes)

    def _outcomes(self, heading: str, lines: list[str], docstring: Docstring) -> DocstringSection:
        rows = []
        for head, text in _items(lines):
            # "[`Observation`]: text" stands in one line
            kind, _, rest = head.partition(": ")
            kind = REFERENCE.sub(lambda match: match[2].rpartition(".")[2], kind.removesuffix(":")).replace("`", "")
            rows.append((kind, self.linked("\n".join(filter(None, (rest, text))), docstring.parent)))
        if heading == "Returns":
            return DocstringSectionReturns(
                [DocstringReturn("", annotation=kind, description=text) for kind, text in rows]
            )
        return DocstringSectionRaises([DocstringRaise(annotation=kind, description=text) for kind, text in rows])

    def linked(self, text: str, scope: Object) -> str:
        """The text with its cross-references resolved; blocks of code stay as they are."""
        parts = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
        return "".join(
            part if part.startswith("```") else REFERENCE.sub(lambda match: self._link(match, scope), part)
            for part in parts
        )

    def _link(self, match: re.Match, scope: Object) -> str:
        is_short, name = match[1], match[2]
        shown = f"`{name.rpartition('.')[2] if is_short else name}`"
        if name in EXTERNAL_PAGES:
            return f"[{shown}]({EXTERNAL_PAGES[name]})"
        if name.partition(".")[0] in EXTERNAL_PROJECTS:
            return shown
        identifier = self._identifier(_resolve(name, scope))
        return shown if identifier is None else f"[{shown}][{identifier}]"

    def _identifier(self, obj: Object) -> str | None:
        """Under which name an object stands on a page, if it does."""
        path = obj.canonical_path
        if obj.is_module or obj.docstring is None:
            return self._documented.get(path)
        above = path
        while above:
            if above in self._documented:
                return self._documented[above] + path.removeprefix(above)
            above = above.rpartition(".")[0]
        return None


def _objects(obj: Object) -> Iterator[Object]:
    yield obj
    for member in obj.members.values():
        if not isinstance(member, Alias):
            yield from _objects(member)


def _resolve(name: str, scope: Object) -> Object:
    """The object that a docstring in `scope` means by a name."""
    package = scope.package
    candidates = [name.removeprefix(f"{PACKAGE}.")] if name.startswith(PACKAGE) else []
    places: list[Object] = [package]
    if not candidates:
        candidates = [name]
        place = scope
        inner = []
        while place is not None and place is not package:
            inner.append(place)
            place = place.parent
        places = [*inner, package]
    for place in places:
        for candidate in candidates:
            try:
                found = place[candidate]
            except (KeyError, ValueError):
                continue
            return found.final_target if isinstance(found, Alias) else found
    first, _, rest = name.partition(".")
    for found in _objects(package):
        if isinstance(found, Class) and found.name == first:
            return found[rest] if rest else found
    raise UnknownReferenceError(f"The docstring of {scope.path} refers to {name!r}, which there is not.")


def _split(text: str) -> Iterator[tuple[str | None, list[str]]]:
    """Sections as (heading, lines): an indented block below a heading, or text between such blocks."""
    heading, lines = None, []
    for line in text.splitlines():
        match = HEADING.fullmatch(line)
        ends = heading not in (None, "Example", "Examples") and line and not line.startswith(" ")
        if match or ends:
            yield heading, lines
            heading, lines = (match[1] if match else None), ([] if match else [line])
        else:
            lines.append(line)
    yield heading, lines


def _items(lines: list[str]) -> Iterator[tuple[str, str]]:
    """Items of a section as (head, text): a head is indented once, its text twice."""
    head, text = None, []
    for line in lines:
        if line.strip() and not line.startswith(" " * 8):
            if head is not None:
                yield head, "\n".join(text).strip()
            head, text = line.strip(), []
        else:
            text.append(line[8:])
    if head is not None:
        yield head, "\n".join(text).strip()


def _parse_item(head: str) -> Iterator[tuple[str, str, bool, str | None]]:
    """
    What stands before the text of a parameter, as (name, type, whether it is optional, default). `a, b (`int`):` and
    `a (`int`), b (`str`):` are two parameters with one text.
    """
    several = SEVERAL_ITEMS.findall(head.removesuffix(":"))
    if len(several) > 1:
        parts = several
    else:
        match = ITEM.fullmatch(head)
        if match is None:
            raise ValueError(f"{head!r} does not describe a parameter; write name (`type`, *optional*):")
        parts = [(name, match["rest"] or "") for name in match["names"].split(", ")]
    for name, kind in parts:
        default = DEFAULT.search(kind)
        kind = DEFAULT.sub("", kind)
        is_optional = ", *optional*" in kind
        yield name, kind.replace(", *optional*", ""), is_optional, default and default[1].strip("`")


def _default_in_signature(name: str, scope: Object) -> str | None:
    """Default of a parameter of which the docstring says only what it is; the signature above has the type."""
    parameters = getattr(scope, "parameters", ())
    default = parameters[name].default if name in parameters else None
    return None if default is None else str(default)


def _table(rows: list, title: str | None, is_attributes: bool) -> DocstringSection:
    return DocstringSectionAttributes(rows, title) if is_attributes else DocstringSectionParameters(rows, title)
