"""Every chapter runs, from the measured data and without it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from adapter_twin.tables import datasets

NOTEBOOKS = sorted((datasets.REPOSITORY / "notebooks").glob("*.ipynb"))
PAGES = sorted((datasets.REPOSITORY / "book").glob("*.md"))
DRAWN_FROM_RECORDS = (
    "03_overheads",
    "06_validation",
    "10_choosing",
    "13_published_twin",
    "14_limits",
    "16_eviction_chain",
)
DRAWN_AT_RANDOM = ("06_validation", "11_sensitivity")

NOT_PROSE = r"\$\$.*?\$\$|\$[^$]*\$|\{[a-z:]+\}`[^`]*`|`[^`]*`|^    .*?$|^\d\. |\[[^]]*\]\([^)]*\)"
"""Formulas, roles (glued numbers among them), code, blocks of code, list numbers, links."""

NAMES = (
    r"vLLM \d[\d.]*|Llama \d( \d+B|\.\d)?|H100( with 64 GB)?|8B model|p99|N\*|G\*|macro-F1"
    r"|(Figure|Table)s? \d((,| to| and) \d)*|License 2\.0|[Dd]epth \d|95 %( of the repeats)?"
    r"|30 s windows"
)
"""Numbers that are names, and conventions: intervals of 95 %, windows of the measured tables."""


def execute(notebook: Path, out: Path, results: Path, **environment: str) -> list[dict]:
    command = f"{sys.executable} -m papermill --kernel python3 --language python --no-progress-bar"
    done = subprocess.run(
        [*command.split(), "-p", "quick", "True", "-p", "folder", str(results), notebook, out],
        cwd=notebook.parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())["cells"]


def markdown(cells: list[dict]) -> str:
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return "".join("".join(o.get("data", {}).get("text/markdown", "")) for o in outputs)


@pytest.mark.skipif(datasets.find("runs") is None, reason="needs the measured tables")
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_chapter_runs(notebook, tmp_path):
    cells = execute(notebook, tmp_path / "out.ipynb", tmp_path / "results")
    assert "not here" not in markdown(cells)


@pytest.fixture(scope="module")
def bare_repository(tmp_path_factory):
    """A checkout whose neighbours hold no measured data."""
    root = tmp_path_factory.mktemp("bare") / "repository"
    for package in ("adapter_twin", "study"):
        shutil.copytree(datasets.REPOSITORY / package, root / package)
    shutil.copytree(datasets.REPOSITORY / "notebooks", root / "notebooks")
    for folder in ("data/calibrations", "data/campaigns", "data/expected", "examples"):
        shutil.copytree(datasets.REPOSITORY / folder, root / folder)
    return root


@pytest.mark.parametrize("name", DRAWN_FROM_RECORDS)
def test_chapter_without_data_draws_recorded_results_and_says_so(name, bare_repository, tmp_path):
    cells = execute(
        bare_repository / "notebooks" / f"{name}.ipynb",
        tmp_path / "out.ipynb",
        tmp_path / "results",
        PYTHONPATH=str(bare_repository),
        ADAPTER_TWIN_DATA=str(tmp_path),
    )
    assert "recorded results" in markdown(cells)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_without_outputs_and_starts_with_its_parameters(notebook):
    cells = json.loads(notebook.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    assert "parameters" in code[0]["metadata"]["tags"]
    assert "".join(code[0]["source"]).startswith("quick = False")


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


@pytest.mark.skipif(datasets.find("runs") is None, reason="needs the measured tables")
@pytest.mark.parametrize("name", DRAWN_AT_RANDOM)
def test_two_runs_write_the_same_tables_byte_for_byte(name, tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        execute(datasets.REPOSITORY / f"notebooks/{name}.ipynb", tmp_path / "out.ipynb", folder)
    first, second = (
        {path.name: path.read_bytes() for path in sorted(folder.rglob("*.csv"))}
        for folder in folders
    )
    assert first
    assert first == second
