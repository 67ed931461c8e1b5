"""Leave-one-workload-out: every run predicted by a calibration that has not seen its workload.

``python -m adapter_twin.crossvalidate`` does it for the development set and records the errors in
``data/expected/bars_left_out.csv``: a refit of all laws for each workload, a quarter of an hour on
two cores. That is too long for every `make reproduce`, so the chapter shows what is recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import pandas as pd
from joblib import Parallel, delayed

from adapter_twin import datasets
from adapter_twin.calibration.fit import TABLES, calibrate
from adapter_twin.predict import predict_run
from adapter_twin.results import EXPECTED, rounded
from adapter_twin.validate import validate_runs

if TYPE_CHECKING:
    from adapter_twin.lengths import LengthMarginals

WORKLOAD = ["rates_per_adapter", "ranks"]


def leave_one_workload_out(
    tables: dict[str, pd.DataFrame], marginals: LengthMarginals, *, jobs: int = -1
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Refit without each workload in turn, and predict its runs.

    Parameters
    ----------
    tables : dict of DataFrame
        `adapter_twin.calibration.fit.TABLES`, by name.
    marginals : LengthMarginals
        As for `calibrate`.
    jobs : int
        Processes; each refits for one workload at a time.

    Returns
    -------
    measured : DataFrame
        The completed runs whose client did not collapse.
    predictions : DataFrame
        Columns of `adapter_twin.schemas.PREDICTIONS`, one row per measured run.
    """
    runs = tables["runs"]
    clean = runs[(runs.status == "ok") & ~runs.client_collapsed]
    folds = [part for _, part in clean.groupby(["model", *WORKLOAD])]
    folds.sort(key=len, reverse=True)  # the longest first: the processes end together
    parts = Parallel(n_jobs=jobs, verbose=10)(
        delayed(_predict_left_out)(tables, marginals, fold) for fold in folds
    )
    return clean, pd.concat(parts, ignore_index=True)


def _predict_left_out(
    tables: dict[str, pd.DataFrame], marginals: LengthMarginals, fold: pd.DataFrame
) -> pd.DataFrame:
    kept = dict(_without(tables, fold))
    first = fold.iloc[0]
    calibration = calibrate(
        kept, marginals, first["model"], gpu="left-out", engine_version="0.8.5", source={}
    )
    rows = cast(list[dict[str, Any]], fold.to_dict("records"))
    return pd.DataFrame([predict_run(row, calibration, seed=0, observer=True)[0] for row in rows])


def _without(
    tables: dict[str, pd.DataFrame], fold: pd.DataFrame
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the tables without all runs of a fold's workload, whatever became of them."""
    first: Any = fold.iloc[0]
    runs = tables["runs"]
    left_out = (runs[["model", *WORKLOAD]] == first[["model", *WORKLOAD]]).all(axis=1)
    for name, table in tables.items():
        whole_runs = name in ("runs", "series", "windows")
        yield name, table[~table.run_id.isin(runs.run_id[left_out])] if whole_runs else table


if __name__ == "__main__":
    measured, predictions = leave_one_workload_out(
        {name: datasets.load(name) for name in TABLES}, datasets.sharegpt_lengths()
    )
    bars = validate_runs(measured, predictions).bars
    bars = bars[bars["figure"] != "start refused or not"]  # no law of a workload
    target = datasets.write_table(rounded(bars), EXPECTED / "bars_left_out.csv")
    print(bars.to_string(), target.relative_to(datasets.REPOSITORY), sep="\n")
