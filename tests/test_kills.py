"""Kill -9 of a verb at any moment: what is there is whole, nothing is redone or left running."""

import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from tests.hostile import DESIGN, Hostile, write_sound_files
from tests.test_parallel import processes_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc"),
]

KILLS = 4
LATEST_S = 8.0
SWEEP = "s.yaml --out so --jobs 2"
LINES = {
    "sweep": SWEEP,
    "predict": "runs.csv --out p.csv --jobs 2",
    "simulate": "c.yaml --records r.parquet --trace t.json",
    "place": "d.yaml --manifests k8s --picture p.svg --jobs 2",
    "calibrate": "--out c.json --prior --gpu h100-64gb --engine vllm-0.8.5 "
    "--model mistralai/Mistral-7B-v0.3",
}


def start(verb: str, folder: Path, line: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "adapter_twin", verb, *shlex.split(line)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=folder, start_new_session=True, **quiet)


def kill(child: subprocess.Popen[bytes], after_s: float) -> list[int]:
    """Kill a verb and return which processes it leaves running for longer than 10 s."""
    try:
        child.wait(after_s)
    except subprocess.TimeoutExpired:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    limit_s = time.monotonic() + 10
    while (left := processes_of(child.pid)) and time.monotonic() < limit_s:
        time.sleep(0.1)
    return left


def readable(folder: Path) -> int:
    """Read all that a verb may have written, and return how many files there are."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".tmp"]
    for path in found:
        if path.suffix == ".parquet":
            assert len(pd.read_parquet(path).columns)
        elif path.suffix == ".csv":
            assert len(pd.read_csv(path).columns)
        elif path.suffix in (".yaml", ".json"):
            assert list(yaml.safe_load_all(path.read_text()))
        elif path.suffix == ".svg":
            assert path.read_text().rstrip().endswith("</svg>")
    return len(found)


def test_a_killed_sweep_goes_on_and_does_nothing_twice(tmp_path: Path) -> None:
    chance, parts = random.Random(0), {}
    design = {**DESIGN, "space_filling": {**DESIGN["space_filling"], "workloads": 40}}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(design))
    for _ in range(KILLS):
        assert not kill(start("sweep", tmp_path, SWEEP), chance.uniform(1, LATEST_S))
        found = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("parts/*/*.parquet")}
        assert parts.items() <= found.items()
        parts = found
        readable(tmp_path)
    assert start("sweep", tmp_path, SWEEP).wait() == 0
    found = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("parts/*/*.parquet")}
    assert parts.items() <= found.items()
    undisturbed = SWEEP.replace("so", "other")
    assert start("sweep", tmp_path, undisturbed).wait() == 0
    for path in found:
        other = tmp_path / "other" / path.relative_to(tmp_path / "so")
        pd.testing.assert_frame_equal(pd.read_parquet(path), pd.read_parquet(other))
    assert len(found) == len(list(tmp_path.rglob("other/parts/*/*.parquet"))) > 40


@pytest.mark.parametrize("verb", sorted(LINES.keys() - {"sweep"}))
def test_a_killed_verb_leaves_whole_files_and_nothing_running(verb: str, tmp_path: Path) -> None:
    chance = random.Random(verb)
    write_sound_files(Hostile(chance, tmp_path))
    before = readable(tmp_path)
    for _ in range(KILLS):
        assert not kill(start(verb, tmp_path, LINES[verb]), chance.uniform(0.5, LATEST_S))
        readable(tmp_path)
    assert start(verb, tmp_path, LINES[verb]).wait() == 0
    assert readable(tmp_path) > before
