"""What the README and the pages refer to exists, and what they say about options is so."""

import re
from ast import literal_eval
from dataclasses import fields

import pytest
import yaml
from documentation import DOCS, PAGES, ROOT, name_of, prose_of


LINK = re.compile(r"!?\[(?:[^][]|\[[^]]*\]\([^)]*\))*\]\(([^)\s]+)\)")


def anchors_of(page) -> set[str]:
    """Identifiers of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [page for page in PAGES if page != DOCS / "benchmarks.md"], ids=name_of)
def test_links_lead_somewhere(page):
    for link in LINK.findall(prose_of(page)):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)} links {link}"
        # the anchors of the API pages are made by the build, which checks them itself
        if anchor and "api" not in target.parts:
            assert anchor in anchors_of(target), f"{name_of(page)} links {link}"


def test_the_readme_fits_one_sitting():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 220


def test_the_site_and_the_readme_list_every_page():
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    nav = re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text())
    assert set(nav) == pages
    assert len(nav) == len(set(nav))
    readme = (ROOT / "README.md").read_text()
    # the API needs the build, and the index and the benchmarks stand in the README themselves
    for page in pages - {"index.md", "benchmarks.md"}:
        assert page.startswith("api/") or f"](docs/{page}" in readme, page


def test_the_table_of_options_is_the_configuration():
    from trl import GRPOConfig

    from seeupo_trl import SeeUPOConfig

    table = re.findall(r"^\| `(\w+)` \| `(.*?)` \|", (DOCS / "configuration.md").read_text(), re.MULTILINE)
    inherited = {field.name for field in fields(GRPOConfig)}
    added = {field.name: field.default for field in fields(SeeUPOConfig) if field.name not in inherited}
    assert {name: literal_eval(default) for name, default in table} == added


def test_the_site_loads_nothing_from_elsewhere():
    theme = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["theme"]
    assert theme["font"] is False
