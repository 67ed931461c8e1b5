"""Every chapter runs, from the measured data and without it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from adapter_twin import datasets

NOTEBOOKS = sorted((datasets.REPOSITORY / "notebooks").glob("*.ipynb"))
DRAWN_FROM_RECORDS = ("03_overheads", "06_validation", "10_choosing")


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
    shutil.copytree(datasets.REPOSITORY / "adapter_twin", root / "adapter_twin")
    shutil.copytree(datasets.REPOSITORY / "notebooks", root / "notebooks")
    for folder in ("data/calibrations", "data/expected", "examples"):
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
