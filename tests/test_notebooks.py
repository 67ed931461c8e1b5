"""Every chapter runs."""

import ast
import contextlib
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from adapter_twin.tables import datasets

NOTEBOOKS = sorted((datasets.REPOSITORY / "notebooks").glob("*.ipynb"))
PAGES = sorted((datasets.REPOSITORY / "book").glob("*.md"))
DRAWN_AT_RANDOM = ("06_validation", "11_sensitivity")

NOT_PROSE = r"\$\$.*?\$\$|\$[^$]*\$|\{[a-z:]+\}`[^`]*`|`[^`]*`|^    .*?$|^\d\. |\[[^]]*\]\([^)]*\)"
"""Formulas, roles (glued numbers among them), code, blocks of code, list numbers, links."""

NAMES = (
    r"vLLM \d[\d.]*|Llama \d( \d+B|\.\d)?|H100( with 64 GB)?|8B model|p99|N\*|G\*|macro-F1"
    r"|(Figure|Table)s? \d((,| to| and) \d)*|License 2\.0|[Dd]epth \d|95 %( of the repeats)?"
    r"|30 s windows"
)
"""Numbers that are names, and conventions: intervals of 95 %, windows of the measured tables."""


def execute(notebook: Path, out: Path, results: Path) -> None:
    command = f"{sys.executable} -m papermill --kernel python3 --language python --no-progress-bar"
    done = subprocess.run(
        [*command.split(), "-p", "quick", "True", "-p", "folder", str(results), notebook, out],
        cwd=notebook.parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def tables(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*.csv")}


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_chapter_runs_and_draws_the_same_at_random(notebook, tmp_path):
    execute(notebook, tmp_path / "out.ipynb", tmp_path / "results")
    if notebook.stem in DRAWN_AT_RANDOM:
        execute(notebook, tmp_path / "out.ipynb", tmp_path / "again")
        assert tables(tmp_path / "again") == tables(tmp_path / "results") != {}


def code(notebook: Path) -> ast.Module:
    cells = json.loads(notebook.read_text())["cells"]
    return ast.parse("\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_chapter_opens_with_its_questions_and_ends_with_its_findings(notebook):
    cells = json.loads(notebook.read_text())["cells"]
    texts = ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]
    asked = texts[0].partition("**What you will learn**\n\n")[2].splitlines()
    assert len(asked) >= 3
    assert all(line.startswith("- ") and line.endswith("?") for line in asked)
    found = texts[-1].partition("## What we found\n\n")[2]
    assert len(re.findall(r"^- ", found, re.MULTILINE)) >= 2
    assert "results.card(" in "".join(cells[-1]["source"])


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_a_number_of_another_page_is_there_and_says_its_form(page):
    for path, key, form in re.findall(
        r"glue:text}`([\w/]+\.ipynb)::([\w-]+)(:?)", page.read_text()
    ):
        assert form, key  # without one, MyST takes the key for a path
        chapter = datasets.REPOSITORY / "notebooks" / Path(path).name
        assert chapter in NOTEBOOKS, path


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_a_chapter_takes_from_the_package_is_there(notebook):
    """Running it is slow; this finds a name that has changed at once."""
    modules = {}
    for node in ast.walk(code(notebook)):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in (
            "adapter_twin",
            "study",
        ):
            for one in node.names:
                with contextlib.suppress(ModuleNotFoundError):
                    importlib.import_module(f"{node.module}.{one.name}")
                taken = getattr(importlib.import_module(node.module), one.name)
                if inspect.ismodule(taken):
                    modules[one.asname or one.name] = taken
    used = [
        (modules[node.value.id], node.attr)
        for node in ast.walk(code(notebook))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in modules
    ]
    assert [(module.__name__, name) for module, name in used if not hasattr(module, name)] == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_without_outputs_and_starts_with_its_parameters(notebook):
    cells = json.loads(notebook.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    assert "parameters" in code[0]["metadata"]["tags"]
    assert "".join(code[0]["source"]).startswith("quick = False")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_chapter_says_at_its_top_if_it_is_the_small_version(notebook):
    _, first, *rest = (
        "".join(cell["source"])
        for cell in json.loads(notebook.read_text())["cells"]
        if cell["cell_type"] == "code"
    )
    assert first.splitlines()[-1] == "results.notice()"
    long = any("results.long_table(" in text for text in rest)
    assert ("Results(folder, quick, full)" in first) == long


def test_chapters_of_the_book_are_the_notebooks():
    contents = (datasets.REPOSITORY / "book" / "_toc.yml").read_text()
    listed = [line.split("/")[-1] for line in contents.splitlines() if "_executed/" in line]
    assert listed == [path.stem for path in NOTEBOOKS]


def prose(cells: list[dict]) -> str:
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    figures = [cell["metadata"].get("mystnb", {}).get("figure", {}) for cell in cells]
    return "\n".join([*texts, *(figure.get("caption", "") for figure in figures)])


def written(page: Path) -> str:
    text = page.read_text()
    return text if page.suffix == ".md" else prose(json.loads(text)["cells"])


@pytest.mark.parametrize("page", [*NOTEBOOKS, *PAGES], ids=lambda path: path.stem)
def test_no_number_in_the_text_is_typed_by_hand(page):
    text = written(page)
    text = re.sub(NOT_PROSE, "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(NAMES, "", text.replace("\n", " "))
    assert not re.findall(r".{0,40}\d.{0,20}", text)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_figure_has_a_name_a_caption_and_words_instead(notebook):
    drawn = re.compile(r"plots\.\w+\(|paper_figures\.draw_|results\.picture\(")
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] == "code" and drawn.search("".join(cell["source"])):
            words = cell["metadata"]["mystnb"]
            assert words["figure"]["name"].startswith("fig-")
            assert words["figure"]["caption"].endswith(".")
            assert len(words["image"]["alt"]) > 40


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_chapter_ends_with_its_reproduction_card(notebook):
    last = json.loads(notebook.read_text())["cells"][-1]
    assert "".join(last["source"]).startswith("results.card(")
