"""Leave-one-workload-out: every run predicted by a calibration that has not seen its workload.

``python -m study.left_out`` does it for the development set and records the predictions
of the measured runs in ``data/expected/left_out.csv``, and those of the measured grids in
``left_out_grids.csv``: a refit of all laws for each workload, some 40 minutes on two cores. That is
too long for every `make reproduce`, so chapters score what is recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING, Any, cast

import pandas as pd
from joblib import Parallel, delayed

from adapter_twin.calibrate.published_fit import TABLES, calibrate, fitted_runs
from adapter_twin.service.predict import predict_run
from adapter_twin.service.validate import SHARES, validate_runs
from adapter_twin.tables import datasets
from study import measured_grids
from study.results import EXPECTED, rounded

if TYPE_CHECKING:
    from adapter_twin.workload.lengths import LengthMarginals

WORKLOAD = ["rates_per_adapter", "ranks"]

SEEDS = 4
"""Each run is predicted with these: other lengths, and another order of adapters."""


def leave_one_workload_out(
    tables: dict[str, pd.DataFrame], marginals: LengthMarginals, *, jobs: int = -1
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Refit without each workload in turn, and predict its runs.

    Parameters
    ----------
    tables : dict of DataFrame
        `adapter_twin.calibrate.published_fit.TABLES`, by name.
    marginals : LengthMarginals
        As for `calibrate`.
    jobs : int
        Processes; each refits for one workload at a time.

    Returns
    -------
    runs : DataFrame
        ``seed`` and the columns of `adapter_twin.tables.schemas.PREDICTIONS`, a row for each of the
        `adapter_twin.calibrate.published_fit.fitted_runs` and each seed.
    grids : DataFrame
        ``seed`` and `study.measured_grids.twin_runs` of the workloads with a measured
        grid.
    """
    folds = [part for _, part in fitted_runs(tables["runs"]).groupby(["model", *WORKLOAD])]
    folds.sort(key=len, reverse=True)  # the longest first: the processes end together
    parts = Parallel(n_jobs=jobs, verbose=10)(
        delayed(_predict_left_out)(tables, marginals, fold) for fold in folds
    )
    runs, grids = (pd.concat(part, ignore_index=True) for part in zip(*parts, strict=True))
    return runs, grids


def _predict_left_out(
    tables: dict[str, pd.DataFrame], marginals: LengthMarginals, fold: pd.DataFrame
) -> tuple[pd.DataFrame, pd.DataFrame]:
    kept = dict(_without(tables, fold))
    first = fold.iloc[0]
    calibration = calibrate(
        kept, marginals, first["model"], gpu="left-out", engine_version="0.8.5", source={}
    )
    rows = cast(list[dict[str, Any]], fold.to_dict("records"))
    runs = [
        {"seed": seed, **predict_run(row, calibration, seed=seed, observer=True)[0]}
        for seed, row in product(range(SEEDS), rows)
    ]
    asked = measured_grids.measured_grids(tables["runs"])
    asked = asked[_is_of(asked, fold)]
    grids = [
        measured_grids.twin_runs(asked, calibration, seed=seed, jobs=1).assign(seed=seed)
        for seed in range(SEEDS if len(asked) else 0)
    ]
    return pd.DataFrame(runs), pd.concat([pd.DataFrame(), *grids])


def _is_of(table: pd.DataFrame, fold: pd.DataFrame) -> pd.Series[bool]:
    """Return which rows are of a fold's workload."""
    keys = ["model", *WORKLOAD]
    first: Any = fold.iloc[0]
    same: pd.Series[bool] = (table[keys] == first[keys]).all(axis=1)
    return same


def _without(
    tables: dict[str, pd.DataFrame], fold: pd.DataFrame
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the tables without all runs of a fold's workload, whatever became of them."""
    runs = tables["runs"]
    left_out = _is_of(runs, fold)
    for name, table in tables.items():
        whole_runs = name in ("runs", "series", "windows")
        yield name, table[~table.run_id.isin(runs.run_id[left_out])] if whole_runs else table


def bars_left_out(runs: pd.DataFrame, predictions: pd.DataFrame) -> pd.DataFrame:
    """Score predictions of left-out workloads.

    Parameters
    ----------
    runs : DataFrame
        Table ``runs``.
    predictions : DataFrame
        As `leave_one_workload_out` returns.

    Returns
    -------
    DataFrame
        `adapter_twin.service.validate.Validation.bars` but those of starts, which no workload
        decides: ``value`` is the mean over the seeds, ``low`` and ``high`` the range, ``n_seeds``
        their
        number.
    """
    measured = fitted_runs(runs)
    bars = pd.concat(validate_runs(measured, part).bars for _, part in predictions.groupby("seed"))
    bars = bars[bars["figure"] != "start refused or not"]
    keys = ["model", "figure", "measure", "bar", "n_runs"]
    values = bars.groupby(keys, sort=False)["value"]
    table = values.agg(value="mean", low="min", high="max", n_seeds="size").reset_index()
    reached = table["measure"].isin(SHARES)
    passed = (table["value"] >= table["bar"]).where(reached, table["value"] <= table["bar"])
    return table.assign(passed=passed)


if __name__ == "__main__":
    of_runs, of_grids = leave_one_workload_out(
        {name: datasets.load(name) for name in TABLES}, datasets.sharegpt_lengths()
    )
    datasets.write_table(rounded(of_runs.drop(columns="wall_s")), EXPECTED / "left_out.csv")
    kept = ["seed", *measured_grids.WORKLOAD, *measured_grids.CONFIGURATION, "feasible_start"]
    kept += ["offered_tokens_per_s", "total_throughput", "mean_ttft_ms"]
    datasets.write_table(rounded(of_grids[kept]), EXPECTED / "left_out_grids.csv")
    print(bars_left_out(datasets.load("runs"), of_runs).to_string())
