"""Sweeps: written as they come, resumed after a kill, on many cores or machines; their optima."""

from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd

from adapter_twin import __version__
from adapter_twin.errors import require
from adapter_twin.laws import Calibration, load_calibration
from adapter_twin.learn.design import Design, load_design
from adapter_twin.parallel import check_jobs, share_out, track, workers
from adapter_twin.plan.criterion import Criterion
from adapter_twin.plan.grid import FIGURES, evaluate, grid_runs
from adapter_twin.tables.datasets import read_frame, read_table, write_table, write_text
from adapter_twin.tables.schemas import SWEEP, validate
from adapter_twin.workload.files import records, run_to_workload
from adapter_twin.workload.scenario import config_hash

DESIGN = "design.yaml"
PARTS = "parts"

WORKLOAD = [
    *("workload_id", "model", "rates_per_adapter", "ranks", "mean_input_tokens"),
    *("mean_requested_output_tokens", "zipf_exponent", "arrival_cv", "max_lora_rank"),
]
"""These columns of a sweep describe a workload."""


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
    check_jobs(jobs)
    design = load_design(file)
    calibrations = {model: load_calibration(calibration, model) for model in design.models}
    for one in calibrations.values():
        one.warn_if_prior()
    with workers(scheduler):
        workloads = design.workloads()
        for row in records(workloads):  # what is wrong is told before a folder is made
            run_to_workload(records(_grid(row, design))[0])
        _open(out, file, design, calibrations)
        todo = [row for row in records(workloads) if not _part(out, row).is_file()]
        done, total = len(workloads) - len(todo), len(workloads)
        tasks = (joblib.delayed(_predict)(row, design, calibrations[row["model"]]) for row in todo)
        results = share_out(tasks, jobs, "generator_unordered")
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
    if path.suffix == ".parquet":
        return read_table(path, SWEEP)
    parts = sorted((path / PARTS).glob("*/*.parquet"))
    require(bool(parts), f"{path}: holds no part of a sweep; run adapter-twin sweep first")
    return validate(pd.concat(map(read_frame, parts), ignore_index=True), SWEEP, path)


def label(runs: pd.DataFrame, criterion: Criterion) -> pd.DataFrame:
    """Return each workload's best configuration.

    A workload of which no configuration is feasible gets no label. The reference study kept its
    curve's first point instead, and so trained on configurations that starve.

    Parameters
    ----------
    runs : pandas.DataFrame
        A sweep; replications are averaged first.
    criterion : Criterion

    Returns
    -------
    pandas.DataFrame
        One row per workload: `WORKLOAD`; ``has_optimum``; ``served_adapters``, ``adapter_slots``,
        ``total_throughput`` (tokens/s) and ``mean_ttft_ms`` of the optimum; ``tied_slots``, those
        that serve as many adapters within the tie, joined by ``-``; ``censored``: the optimum is at
        the grid's largest number of adapters, so the true one may lie beyond.
    """
    configuration = ["served_adapters", "adapter_slots"]
    workloads = runs.drop_duplicates("workload_id")[WORKLOAD]
    if runs.seed.nunique() > 1:
        numbers = runs.groupby(["workload_id", *configuration], observed=True, as_index=False)
        means = numbers.mean(numeric_only=True)
        runs = means.assign(feasible_start=means.feasible_start > 0)
    ranked = criterion.ranked(runs, within=["workload_id"])
    best = ranked.drop_duplicates("workload_id").set_index("workload_id")
    shown = best[[*configuration, "total_throughput", "mean_ttft_ms"]]
    labels = workloads.join(shown, on="workload_id")
    chosen = ranked.workload_id.map(best.served_adapters).astype(float)
    ties = ranked[ranked.tied & (ranked.served_adapters == chosen)]
    by_workload = ties.sort_values("adapter_slots").groupby("workload_id", observed=True)
    tied_slots = by_workload.adapter_slots.agg(lambda slots: "-".join(map(str, slots)))
    return labels.assign(
        has_optimum=labels.served_adapters.notna(),
        tied_slots=labels.workload_id.map(tied_slots),
        censored=labels.served_adapters == runs.served_adapters.max(),
    ).reset_index(drop=True)


def compact(runs: pd.DataFrame) -> pd.DataFrame:
    """Return a sweep that packs small: figures to four digits, text as categories."""

    def rounded(figure: "pd.Series[float]") -> Any:
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
    runs = _grid(row, design)
    tables = [
        evaluate(runs, calibration, seed=seed, slo=design.slo).assign(seed=seed)
        for seed in range(design.seed, design.seed + design.replications)
    ]
    return row["workload_id"], row["model"], pd.concat(tables, ignore_index=True)


def _grid(row: dict[str, Any], design: Design) -> pd.DataFrame:
    return grid_runs(row, design.served_adapters, design.adapter_slots, design.duration_s)


def _part(out: Path, row: dict[str, Any]) -> Path:
    return Path(out, PARTS, row["model"], f"{row['workload_id']}.parquet")


def _open(out: Path, file: Path, design: Design, calibrations: dict[str, Calibration]) -> None:
    """Make the folder ready, or refuse to mix two sweeps in it."""
    copy = out / DESIGN
    names = ", ".join(fitted.name for fitted in calibrations.values())
    stamp = f"# {config_hash(design)}, {names}, adapter-twin {__version__}"
    if copy.is_file():
        before = copy.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
        require(before == stamp, f"{out}: holds another sweep ({before}); give another --out")
    for model in design.models:
        (out / PARTS / model).mkdir(parents=True, exist_ok=True)
    write_text(copy, f"{stamp}\n" + file.read_text(encoding="utf-8"))
