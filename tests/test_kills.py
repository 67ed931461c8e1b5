"""Kill -9 of a verb at any moment: what is there is whole, nothing is redone or left running."""

import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from zipfile import is_zipfile

import pandas as pd
import pytest
import yaml

from adapter_twin.tables import datasets
from tests.hostile import DESIGN, LLAMA, REPOSITORY, Hostile, write_sound_files
from tests.test_parallel import processes_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc"),
]

KILLS = int(os.environ.get("KILLS", "4"))
"""Each verb is killed so many times."""

LATEST_S = 8.0
SWEEP = "s.yaml --out so --jobs 2"
LINES = {
    "sweep": SWEEP,
    "predict": "runs.csv --out p.csv --jobs 2",
    "validate": "measured.parquet --out v --jobs 2",
    "simulate": "c.yaml --records r.parquet --trace t.json",
    "traffic": "log.csv --out o.parquet",
    "init": "new.yaml --force",
    "optimum": f"--model {LLAMA} --rates 0.1-0.05 --ranks 8-16 --served-grid 2,4 --slots-grid 2",
    "recommend": "d.yaml",
    "place": "d.yaml --manifests k8s --picture p.svg --jobs 2",
    "calibrate": "--out c.json --prior --gpu h100-64gb --engine vllm-0.8.5 "
    "--model mistralai/Mistral-7B-v0.3",
    "shrink": "adapter --rank 2 --out smaller-{run} --jobs 2",
    "watch": "m.prom w.yaml",
    "memory": "llama-3.1-8b --gpu l40s",
    "data": "",
    "doctor": "",
}
"""All verbs but `profile` and `prove`, whose servers `tests/measure` ends with them, and `train`,
which takes minutes."""

PRINTING = {"optimum", "recommend", "watch", "memory", "data", "doctor"}
"""These write no file."""


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
        elif path.suffix == ".skops":
            assert is_zipfile(path)
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


def kill_often(verb: str, folder: Path, line: str, chance: random.Random) -> None:
    """Kill a verb at moments of the time that it takes, and let it end at last."""
    begun = time.monotonic()
    assert start(verb, folder, line.format(run="first")).wait() == 0
    took_s = time.monotonic() - begun
    for run in range(KILLS):
        assert not kill(start(verb, folder, line.format(run=run)), chance.uniform(0, took_s))
        readable(folder)
    assert start(verb, folder, line.format(run="last")).wait() == 0


@pytest.mark.parametrize("verb", sorted(LINES.keys() - {"sweep"}))
def test_a_killed_verb_leaves_whole_files_and_nothing_running(verb: str, tmp_path: Path) -> None:
    chance = random.Random(verb)
    write_sound_files(Hostile(chance, tmp_path))
    runs = datasets.load("runs").query("status == 'ok'").sample(6, random_state=0)
    runs.to_parquet(tmp_path / "measured.parquet")
    before = readable(tmp_path)
    kill_often(verb, tmp_path, LINES[verb], chance)
    assert (readable(tmp_path) > before) == (verb not in PRINTING)


def test_a_killed_training_leaves_whole_files(tmp_path: Path) -> None:
    chance, line = random.Random(0), f"{REPOSITORY}/data/sweeps/paper.parquet --out m --jobs 2"
    for _ in range(KILLS):
        assert not kill(start("train", tmp_path, line), chance.uniform(1, 4 * LATEST_S))
        readable(tmp_path)
