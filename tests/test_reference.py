"""The book's reference pages name every public module of the package, once."""

import re
from collections import Counter
from pathlib import Path

import pytest

import adapter_twin
from adapter_twin.tables import datasets

PACKAGE = Path(adapter_twin.__file__).parent
PAGES = datasets.REPOSITORY / "book" / "api"
COMMAND_LINE = "adapter_twin.cli"
"""Described by ``adapter-twin VERB --help``."""


def public_modules() -> set[str]:
    files = [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "study").rglob("*.py")]
    paths = (path.relative_to(PACKAGE.parent) for path in files)
    names = {".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths}
    names.remove("adapter_twin.__main__")
    return {name for name in names if not f"{name}.".startswith(f"{COMMAND_LINE}.")}


def test_every_module_is_on_one_page() -> None:
    text = "".join(path.read_text() for path in PAGES.glob("*.rst"))
    listed = Counter(re.findall(r"^\.\. automodule:: (\S+)$", text, re.MULTILINE))
    assert set(listed) == public_modules()
    assert set(listed.values()) == {1}


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.rst")), ids=lambda path: path.stem)
def test_the_heading_over_a_module_is_its_name(page: Path) -> None:
    pattern = r"^``(\S+)``\n-+\n\n\.\. automodule:: (?:adapter_twin\.)?(\S+)$"
    for heading, module in re.findall(pattern, page.read_text(), re.MULTILINE):
        assert heading == module


def test_every_page_is_in_the_table_of_contents() -> None:
    contents = (datasets.REPOSITORY / "book" / "_toc.yml").read_text()
    listed = re.findall(r"- file: book/api/(\S+)", contents)
    assert sorted(listed) == sorted(path.stem for path in PAGES.glob("*.rst"))
