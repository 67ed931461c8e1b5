"""The worked example of CONTRIBUTING.md: it runs as it is written there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SECTION = (ROOT / "CONTRIBUTING.md").read_text().partition("## Your first contribution\n")[2]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", SECTION.partition("\n## ")[0], re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write every block whose first line names a file."""
    folder = tmp_path_factory.mktemp("contribution")
    for _, block in BLOCKS:
        if named := re.match(r"# (\S+\.\w+)\n", block):
            (folder / named[1]).write_text(block)
    return folder


def call(folder: Path, *arguments: str, **environment: str) -> str:
    paths = os.pathsep.join((str(folder), str(ROOT)))
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_test_of_the_example_passes(folder: Path) -> None:
    call(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_shortest_prompt_first.py")


def test_the_commands_of_the_example_run(folder: Path) -> None:
    commands = next(block for language, block in BLOCKS if language == "sh").splitlines()
    first, vllm = (call(folder, *line.split()[2:], "--json") for line in commands)
    assert '"policy": "ShortestPromptFirst(class_tokens=32)"' in first
    assert "policy" not in vllm


SERVE = """
from dataclasses import replace
from adapter_twin.service.predict import predict_scenario
from adapter_twin.workload.files import load_scenario
from adapter_twin.twin import clock
scenario = load_scenario("crowded.yaml")
scenario = replace(scenario, workload=replace(scenario.workload, duration_s=20.0))
run, _ = predict_scenario(scenario)
loop = clock.run_to_end
print(sum(loop.stats.cache_misses.values()) if hasattr(loop, "stats") else "plain")
print(run.records)
"""


def serve(folder: Path, **environment: str) -> tuple[str, str]:
    """Return what was compiled (not found on disk), and the records of a short run."""
    compiled, _, records = call(folder, "-c", SERVE, **environment).partition("\n")
    return compiled, records


@pytest.mark.slow
def test_a_policy_of_ones_own_is_compiled_once_and_anew_when_its_file_changes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(folder / "cache"))
    compiled, records = serve(folder)
    assert compiled == "1"
    assert serve(folder) == ("0", records)
    assert serve(folder, NUMBA_DISABLE_JIT="1") == ("plain", records)

    own = folder / "shortest_prompt_first.py"
    source = own.read_text()
    own.write_text(source.replace("return float(", "return -float("))  # the longest goes first
    compiled, changed = serve(folder)
    own.write_text(source)
    assert compiled == "1"
    assert changed != records
