"""What the repository's pages point at is there: files, headings, places, targets of make."""

import re
from pathlib import Path

import pytest

from adapter_twin.tables import datasets

ROOT = datasets.REPOSITORY
PAGES = sorted(
    page for pattern in ("*.md", "data/*.md", "data/*/*.md") for page in ROOT.glob(pattern)
)


def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as code hosts make them."""
    lines = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if "://" not in link and not (
            target.exists() and (not anchor or anchor in headings(target))
        ):
            lost.append(link)
    assert lost == []


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_places_in_tables_are_there(name):
    rows = re.findall(r"^\| (`[^|]*`) \|", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
    places = [place for row in rows for place in re.findall(r"`([\w./]+)`", row) if "/" in place]
    assert places
    assert [place for place in places if not (ROOT / place).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_make_targets_exist(page):
    targets = re.findall(
        r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
    )
    named = re.findall(r"(?:`|^ {4})make ([a-z-]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(named) <= set(targets)
