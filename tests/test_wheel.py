"""The wheel, installed away from the repository, does all that needs no checkout."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import yaml

from adapter_twin import __version__
from adapter_twin.tables import datasets

pytestmark = pytest.mark.wheel

ROOT = datasets.REPOSITORY
LOCK = ROOT / "requirements" / "dev.lock"
LLAMA = "llama-3.1-8b-instruct"

Command = Callable[..., "subprocess.CompletedProcess[str]"]


def checked(*command: str | Path, **options: object) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    return done


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    checked(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT)
    return out


@pytest.fixture(scope="module")
def environment(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel as a user would: with its dependencies, knowing no checkout."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    pip = (folder / "bin" / "python", "-m", "pip", "install", "--quiet")
    checked(*pip, "--constraint", LOCK, next(dist.glob("*.whl")), cwd=folder)
    return folder


@pytest.fixture
def installed(environment: Path, tmp_path: Path) -> Command:
    """Run the installed command in an empty folder."""
    hidden = ("PYTHONPATH", "ADAPTER_TWIN_DATA", "COVERAGE_PROCESS_CONFIG")
    variables = {key: value for key, value in os.environ.items() if key not in hidden}

    def call(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [environment / "bin" / "adapter-twin", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)

    return call


@pytest.fixture
def answer(installed: Command) -> Callable[..., dict]:
    def call(*arguments: str) -> dict:
        done = installed(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return call


def test_the_wheel_holds_the_package_and_what_it_needs_of_the_data(dist: Path) -> None:
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    for path in (ROOT / "data" / "calibrations").glob("*.json"):
        assert f"adapter_twin/_data/calibrations/{path.name}" in names
    assert {"adapter_twin/_data/checksums.json", "adapter_twin/py.typed"} <= names
    assert not [name for name in names if datasets.DATASET in name]
    assert {name.split("/")[0] for name in names} == {
        "adapter_twin",
        f"adapter_twin-{__version__}.dist-info",
    }


def test_the_source_distribution_builds_without_the_repository(dist: Path, tmp_path: Path) -> None:
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    source = tmp_path / f"adapter_twin-{__version__}"
    checked(sys.executable, "-m", "build", "--no-isolation", "--wheel", source, cwd=tmp_path)
    with (
        zipfile.ZipFile(next(source.glob("dist/*.whl"))) as again,
        zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel,
    ):
        assert again.namelist() == wheel.namelist()


def test_doctor_finds_a_working_core_and_no_data(answer: Callable[..., dict]) -> None:
    checks = {check["name"]: check for check in answer("doctor")["checks"]}
    assert LLAMA in checks["calibrations"]["detail"]
    assert checks["measured data"]["detail"].startswith("0 of ")


def test_the_version_is_that_of_the_repository(installed: Command) -> None:
    assert installed("--version").stdout == f"{__version__}\n"


def test_the_examples_run(answer: Callable[..., dict], tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    assert answer("simulate", "examples/simulate.yaml")["total_throughput"] > 0
    assert answer("recommend", "examples/recommend.yaml")["vllm_args"]
    picture, manifests = tmp_path / "packing.png", tmp_path / "k8s"
    options = ("--picture", str(picture), "--manifests", str(manifests))
    placed = answer("place", "examples/place.yaml", *options)
    assert placed["gpus"] >= placed["lower_bound"] >= 1
    assert picture.stat().st_size > 0
    assert list(manifests.glob("*.yaml"))


def test_a_new_file_is_explained_and_runs(installed: Command, tmp_path: Path) -> None:
    assert installed("init", "--kind", "simulate").returncode == 0
    assert "# GPUs that share every layer." in (tmp_path / "workload.yaml").read_text()
    assert installed("simulate", "workload.yaml").returncode == 0


def test_a_design_is_swept(answer: Callable[..., dict], tmp_path: Path) -> None:
    shutil.copy(ROOT / "experiments" / "designs" / "quick.yaml", tmp_path)
    assert answer("sweep", "quick.yaml", "--out", "sweep")["runs"] > 0


def test_models_are_trained(answer: Callable[..., dict], tmp_path: Path) -> None:
    sweep = pd.read_parquet(ROOT / "data" / "sweeps" / "paper.parquet")
    some = sorted(sweep.loc[sweep["model"] == LLAMA, "workload_id"].unique())[::20]
    sweep[sweep["workload_id"].isin(some)].to_parquet(tmp_path / "sweep.parquet")
    assert answer("train", "sweep.parquet", "--out", "models")["chosen"]


def test_a_table_of_runs_is_predicted(installed: Command, tmp_path: Path) -> None:
    workload = {"rates_per_adapter": "0.1", "ranks": "16", "max_lora_rank": 16, "max_num_seqs": 256}
    counts = {"served_adapters": 32, "adapter_slots": 16, "duration_s": 60.0}
    lengths = {"mean_input_tokens": 223.0, "mean_requested_output_tokens": 198.0}
    run = {"run_id": "run", "model": LLAMA, **workload, **counts, **lengths}
    pd.DataFrame([run]).to_csv(tmp_path / "runs.csv", index=False)
    done = installed("predict", "runs.csv", "--out", "predictions.parquet")
    assert done.returncode == 0, done.stderr
    assert pd.read_parquet(tmp_path / "predictions.parquet")["feasible_start"].all()


def test_a_campaign_is_calibrated_and_its_calibration_used(
    installed: Command, answer: Callable[..., dict], tmp_path: Path
) -> None:
    shutil.copytree(ROOT / "data" / "campaigns" / "cpu-small", tmp_path / "campaign")
    done = installed("calibrate", "campaign", "--out", "mine.json")
    assert done.returncode == 0, done.stderr
    demand = {
        "model": "small",
        "calibration": "mine.json",
        "adapters": {"count": 4, "request_rates": [0.05], "ranks": [8]},
        "lengths": {"distribution": "fixed", "mean_input_tokens": 64, "mean_output_tokens": 32},
    }
    (tmp_path / "demand.yaml").write_text(yaml.safe_dump(demand))
    assert answer("recommend", "demand.yaml")["calibration"].startswith("small@cpu")


def test_an_optimum_is_found(answer: Callable[..., dict]) -> None:
    workload = ("--model", LLAMA, "--rates", "0.1", "--ranks", "16")
    grids = ("--served-grid", "32,64", "--slots-grid", "16,32", "--slo", "none")
    found = answer("optimum", *workload, *grids)
    assert (found["served_adapters"], found["starved"]) == (64, False)


def test_measured_data_is_looked_for_where_one_is(
    answer: Callable[..., dict], tmp_path: Path
) -> None:
    """Never beside the installed package, where nobody would put it."""
    listing = answer("data")
    assert listing["roots"] == [
        str(tmp_path / "data"),
        str(tmp_path / "data" / "external"),
        str(tmp_path.parent / "shared" / "data"),
    ]
    assert {row["checksum"] for row in listing["tables"]} == {"absent"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("simulate", "examples/simulate.yaml"),
        ("sweep", "experiments/designs/quick.yaml", "--out", "sweep"),
        ("train", "data/sweeps/paper.parquet", "--out", "models"),
        ("profile", "experiments/campaigns/smoke.yaml", "--out", "smoke"),
        ("prove", "experiments/studies/smoke.yaml", "--engine", "cpu", "--out", "smoke"),
        ("calibrate", "data/agullo2025", "--out", "c.json"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_only_a_checkout_has_is_named_in_one_line(
    installed: Command, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    done = installed(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {arguments[1]}")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
