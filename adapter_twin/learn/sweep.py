"""Run a sweep: written as it comes, resumed after a kill, on many cores or many machines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import joblib

from adapter_twin import __version__
from adapter_twin.laws import Calibration, load_calibration
from adapter_twin.learn.design import Design, load_design
from adapter_twin.parallel import track, workers
from adapter_twin.plan.grid import FIGURES, evaluate, grid_runs
from adapter_twin.tables.datasets import read_table, replacing, write_table
from adapter_twin.workload.files import records
from adapter_twin.workload.scenario import config_hash
from adapter_twin.workload.strict import require

if TYPE_CHECKING:
    import pandas as pd

DESIGN = "design.yaml"
PARTS = "parts"


def run_sweep(
    file: Path,
    out: Path,
    *,
    calibration: str = "auto",
    jobs: int = -1,
    scheduler: str | None = None,
) -> int:
    """Predict what a design asks and is not in `out` yet.

    Parameters
    ----------
    file : pathlib.Path
        See `adapter_twin.learn.design.Design`.
    out : pathlib.Path
        Gets ``parts/<model>/<workload_id>.parquet``, each whole or not there, and ``design.yaml``;
        `read_sweep` joins them.
    calibration : str
    jobs : int
        Processes on this machine; -1 is one per core.
    scheduler : str, optional
        Address of a Dask scheduler, ``tcp://host:port``, whose workers do the work instead.

    Returns
    -------
    int
        Workloads predicted in this call.

    Raises
    ------
    AdapterTwinError
        The design is wrong, `out` holds another sweep, or the scheduler cannot be reached.
    """
    require(jobs == -1 or jobs >= 1, f"jobs: must be -1 (all cores) or at least 1, got {jobs}")
    design = load_design(file)
    calibrations = {model: load_calibration(calibration, model) for model in design.models}
    with workers(scheduler):
        _open(out, file, design, calibrations)
        workloads = design.workloads()
        todo = [row for row in records(workloads) if not _part(out, row).is_file()]
        done, total = len(workloads) - len(todo), len(workloads)
        tasks = (joblib.delayed(_predict)(row, design, calibrations[row["model"]]) for row in todo)
        results = joblib.Parallel(jobs, return_as="generator_unordered")(tasks)
        for workload_id, model, table in track(results, f"sweep {design.name}", total, done):
            write_table(table, _part(out, {"model": model, "workload_id": workload_id}))
    return len(todo)


def read_sweep(path: Path) -> pd.DataFrame:
    """Return the runs of a sweep, one row each: of its folder so far, or of a `compact` table.

    Raises
    ------
    AdapterTwinError
        There are none, or the table is not of a sweep.
    """
    import pandas as pd

    from adapter_twin.tables.schemas import SWEEP, validate

    if path.suffix == ".parquet":
        return read_table(path, SWEEP)
    parts = sorted((path / PARTS).glob("*/*.parquet"))
    require(bool(parts), f"{path}: holds no part of a sweep; run adapter-twin sweep first")
    return validate(pd.concat(map(pd.read_parquet, parts), ignore_index=True), SWEEP, path)


def compact(runs: pd.DataFrame) -> pd.DataFrame:
    """Return a sweep that packs small: figures to four digits, text as categories."""
    import numpy as np

    def rounded(figure: pd.Series[float]) -> Any:
        digits = 3 - np.floor(np.log10(figure.where(figure > 0, 1)))
        return (np.rint(figure * 10**digits) / 10**digits).astype("float32")

    figures = [*FIGURES, "offered_tokens_per_s", "slo_attainment"]
    names = ["workload_id", "model", "rates_per_adapter", "ranks"]
    grid = ["served_adapters", "adapter_slots", "max_lora_rank", "max_num_seqs"]
    return runs.drop(columns="run_id").assign(
        **{name: rounded(runs[name]) for name in figures},
        **{name: runs[name].astype("category") for name in names},
        **{name: runs[name].astype("int16") for name in grid},
    )


def _predict(
    row: dict[str, Any], design: Design, calibration: Calibration
) -> tuple[str, str, pd.DataFrame]:
    """Return the runs of one workload over the grid, a row per configuration and replication."""
    import pandas as pd

    runs = grid_runs(row, design.served_adapters, design.adapter_slots, design.duration_s)
    tables = [
        evaluate(runs, calibration, seed=seed, slo=design.slo).assign(seed=seed)
        for seed in range(design.seed, design.seed + design.replications)
    ]
    return row["workload_id"], row["model"], pd.concat(tables, ignore_index=True)


def _part(out: Path, row: dict[str, Any]) -> Path:
    return Path(out, PARTS, row["model"], f"{row['workload_id']}.parquet")


def _open(out: Path, file: Path, design: Design, calibrations: dict[str, Calibration]) -> None:
    """Make the folder ready, or refuse to mix two sweeps in it."""
    copy = out / DESIGN
    names = ", ".join(fitted.name for fitted in calibrations.values())
    stamp = f"# {config_hash(design)}, {names}, adapter-twin {__version__}"
    if copy.is_file():
        before = copy.read_text(encoding="utf-8").splitlines()[0]
        require(before == stamp, f"{out}: holds another sweep ({before}); give another --out")
    for model in design.models:
        (out / PARTS / model).mkdir(parents=True, exist_ok=True)
    with replacing(copy) as temporary:
        temporary.write_text(f"{stamp}\n" + file.read_text(encoding="utf-8"), encoding="utf-8")
