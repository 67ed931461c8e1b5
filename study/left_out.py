"""Left-out runs: predicted by laws that have not seen their workload, their ranks or their slots.

``python -m study.left_out`` does it for the development set and records the predictions in
``data/expected``: ``left_out.csv`` of the measured runs and ``left_out_grids.csv`` of the measured
grids, with all laws fitted anew for each workload; ``left_out_regions.csv`` of runs whose mix of
ranks, or whose `MANY_SLOTS`, the step-time law has not seen, or whose model nothing has. It takes
half an hour on two cores, too long for every `make reproduce`, so chapters score what is recorded.

What the twin's figures would do if a constant changed (`Response`) is simulated once, around the
constants that all runs give; what it was measured to do is taken of the kept runs only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
from joblib import Parallel, delayed

from adapter_twin.calibrate.published_fit import TABLES, calibrate, fitted_runs, without_copies
from adapter_twin.calibrate.step_observations import workload_names
from adapter_twin.calibrate.through_twin import Response
from adapter_twin.laws import load_calibration
from adapter_twin.laws.prior import known_constants, prior_calibration
from adapter_twin.laws.roofline import Prior
from adapter_twin.service.intervals import LEAST_SPREAD, cautious, multiples, regime_of, spread_of
from adapter_twin.service.predict import predict_run, replicate
from adapter_twin.service.validate import SHARES, validate_runs
from adapter_twin.tables import datasets
from adapter_twin.workload.calibration_files import FOLDER
from adapter_twin.workload.files import records
from study import measured_grids
from study.engine_constants import GPU, VERSION, fit_steps
from study.results import EXPECTED, rounded

if TYPE_CHECKING:
    from adapter_twin.laws import Calibration
    from adapter_twin.workload.lengths import LengthMarginals

Tables = Mapping[str, pd.DataFrame]

WORKLOAD = ["rates_per_adapter", "ranks"]

MANY_SLOTS = 96
"""From this number of slots on they are many."""

CHUNKS = 16
"""A model's runs are predicted in so many parts, by as many processes as there are."""

SEEDS = 4
"""Each run is predicted with these: other lengths, and another order of adapters."""


def responses(tables: Tables, *, jobs: int = -1) -> dict[str, Response]:
    """Return how the twin's figures move with the constants of the shipped laws, by model."""
    runs = fitted_runs(tables["runs"])
    return {
        str(model): Response.of(load_calibration("auto", str(model)), own, jobs)
        for model, own in runs.groupby("model")
    }


def leave_one_workload_out(
    tables: Tables, marginals: LengthMarginals, moves: Mapping[str, Response], *, jobs: int = -1
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Refit without each workload in turn, and predict its runs.

    Parameters
    ----------
    tables : mapping of DataFrame
        `adapter_twin.calibrate.published_fit.TABLES`, by name.
    marginals : LengthMarginals
        As for `calibrate`.
    moves : mapping
        See `responses`.
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
        delayed(_predict_left_out)(tables, marginals, moves, fold) for fold in folds
    )
    runs, grids = (pd.concat(part, ignore_index=True) for part in zip(*parts, strict=True))
    return runs, grids


def _predict_left_out(
    tables: Tables, marginals: LengthMarginals, moves: Mapping[str, Response], fold: pd.DataFrame
) -> tuple[pd.DataFrame, pd.DataFrame]:
    model, first = fold["model"].iloc[0], fold.iloc[0]
    everywhere = (tables["runs"][WORKLOAD] == first[WORKLOAD]).all(axis=1)
    prior = prior_of(_without(tables, everywhere), moves)
    kept = _without(tables, everywhere & (tables["runs"]["model"] == model))
    calibration = calibrate(
        kept,
        marginals,
        model,
        gpu=GPU,
        engine_version=VERSION,
        source={},
        prior=prior,
        response=moves[model],
    )
    runs = _predict(calibration, fold, range(SEEDS), spreads=True)
    asked = measured_grids.measured_grids(tables["runs"])
    asked = asked[_is_of(asked, fold)]
    grids = [
        measured_grids.twin_runs(asked, calibration, seed=seed, jobs=1).assign(seed=seed)
        for seed in range(SEEDS if len(asked) else 0)
    ]
    return runs, pd.concat([pd.DataFrame(), *grids])


def prior_of(kept: Tables, moves: Mapping[str, Response]) -> Prior:
    """Return the constants that kept runs of all models give, spread as the shipped ones."""
    known = [load_calibration("auto", model) for model in moves]
    seen = fitted_runs(kept["runs"])["run_id"]
    values = fit_steps(known, kept, [moves[one.model].of_runs(seen) for one in known])
    spreads = known_constants(GPU, VERSION)
    return {name: (value, spreads[name][1]) for name, value in values.items()}


def leave_regions_out(
    tables: Tables, moves: Mapping[str, Response], *, jobs: int = -1
) -> pd.DataFrame:
    """Refit the step-time law without each mix of ranks, and without many slots; predict those.

    Parameters
    ----------
    tables, moves, jobs
        As for `leave_one_workload_out`.

    Returns
    -------
    DataFrame
        ``left_out`` (``ranks`` or ``slots``) and the columns of
        `adapter_twin.tables.schemas.PREDICTIONS`.
    """
    runs = tables["runs"]
    regions = [("ranks", runs["ranks"] == ranks) for ranks in fitted_runs(runs)["ranks"].unique()]
    regions.append(("slots", runs["adapter_slots"] >= MANY_SLOTS))
    parts = Parallel(n_jobs=jobs, verbose=10)(
        delayed(_predict_region)(tables, moves, left_out) for _, left_out in regions
    )
    named = zip(regions, parts, strict=True)
    table: pd.DataFrame = pd.concat(part.assign(left_out=name) for (name, _), part in named)
    return table


def _predict_region(
    tables: Tables, moves: Mapping[str, Response], left_out: pd.Series[bool]
) -> pd.DataFrame:
    kept = _without(tables, left_out)
    prior, seen = prior_of(kept, moves), fitted_runs(kept["runs"])
    parts = []
    for model, fold in fitted_runs(tables["runs"][left_out]).groupby("model"):
        own = seen[seen["model"] == model]
        known = load_calibration("auto", str(model))
        response = moves[str(model)].of_runs(own["run_id"])
        refitted = without_copies(known, kept, own, 1, prior, response)
        parts.append(_predict(refitted, fold, [0]))
    return pd.concat(parts, ignore_index=True)


def leave_models_out(
    tables: Tables, moves: Mapping[str, Response], *, jobs: int = -1
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Predict each model's runs by a prior whose constants are those of the other models.

    Parameters
    ----------
    tables, moves, jobs
        As for `leave_one_workload_out`.

    Returns
    -------
    runs : DataFrame
        As `leave_regions_out`, with the spreads of figures; ``left_out`` is ``model``.
    grids : DataFrame
        `study.measured_grids.twin_runs` by the prior and, ``cautious``, as plans are made on it.
    """
    runs, asked = tables["runs"], measured_grids.measured_grids(tables["runs"])
    parts, grids = [], []
    for model, fold in fitted_runs(runs).groupby("model"):
        others = {name: response for name, response in moves.items() if name != model}
        constants = prior_of(_without(tables, runs["model"] == model), others)
        prior = prior_calibration(str(model), GPU, VERSION, constants)
        chunks = Parallel(n_jobs=jobs, verbose=10)(
            delayed(_predict)(prior, fold[i::CHUNKS], [0], spreads=True) for i in range(CHUNKS)
        )
        parts.append(pd.concat(chunks).assign(left_out="model"))
        own = asked[asked["model"] == model]
        for laws in (prior, cautious(prior)):
            told = measured_grids.twin_runs(own, laws, jobs=jobs)
            grids.append(told.assign(cautious=laws is not prior))
    return pd.concat(parts), pd.concat(grids)


def _predict(
    calibration: Calibration, runs: pd.DataFrame, seeds: Iterable[int], *, spreads: bool = False
) -> pd.DataFrame:
    rows = cast(list[dict[str, Any]], runs.to_dict("records"))
    predictions = []
    for seed, row in product(seeds, rows):
        made = predict_run(row, calibration, seed=seed, observer=True)[0]
        if spreads and seed == 0:
            spread = spread_of(made, replicate(row, calibration, seed, observer=True))
            made |= {f"{figure}_spread": value for figure, value in spread.items()}
        predictions.append({"seed": seed, **made})
    return pd.DataFrame(predictions)


def region_errors(runs: pd.DataFrame, predictions: pd.DataFrame) -> pd.DataFrame:
    """Score predictions of left-out regions.

    Arguments as for `bars_left_out`, of `leave_regions_out`; returns ``left_out``, ``model``,
    ``figure``, ``measure``, ``value`` and ``n_runs``.
    """
    measured = fitted_runs(runs).set_index("run_id", drop=False)
    columns = ["left_out", "model", "figure", "measure", "value", "n_runs"]
    parts = [
        validate_runs(measured.loc[part["run_id"]], part).bars.assign(left_out=region)
        for region, part in predictions.groupby("left_out")
    ]
    errors = pd.concat(parts)
    chosen: pd.DataFrame = errors.loc[errors["model"] != "all", columns]
    return chosen


def scores(runs: pd.DataFrame, predictions: pd.DataFrame) -> pd.DataFrame:
    """Return how many spreads predictions of left-out workloads are off, a row per run.

    Parameters
    ----------
    runs : DataFrame
        Table ``runs``.
    predictions : DataFrame
        As `leave_one_workload_out` returns.

    Returns
    -------
    DataFrame
        ``model``, ``workload``, the predicted ``regime``, and a column per figure.
    """
    told = predictions[predictions["seed"] == 0].set_index("run_id")
    measured = fitted_runs(runs).set_index("run_id").loc[told.index]
    table = pd.DataFrame(
        {
            "model": measured["model"],
            "workload": measured["model"] + " " + workload_names(measured),
            "regime": [regime_of(row) for row in records(told)],
        }
    )
    for figure in LEAST_SPREAD:
        off = np.abs(np.log(told[figure] / measured[figure]))
        table[figure] = off / told[f"{figure}_spread"]
    return table


def coverage(scored: pd.DataFrame) -> pd.DataFrame:
    """Return what intervals cover whose multiples have not seen the workload.

    Returns
    -------
    DataFrame
        ``regime``, ``figure``, ``covered_percent``, ``n_runs`` and ``n_workloads``.
    """
    long = scored.melt(["model", "workload", "regime"], var_name="figure", value_name="off")
    known = {
        name: multiples(scored[scored["workload"].str.partition(" ")[2] != name.partition(" ")[2]])
        for name in scored["workload"].unique()
    }
    keys = zip(long["workload"], long["regime"], long["figure"], strict=True)
    inside = long["off"] <= [known[name][regime][figure] for name, regime, figure in keys]
    groups = long.assign(inside=100.0 * inside).groupby(["figure", "regime"])
    return groups.agg(
        covered_percent=("inside", "mean"),
        n_runs=("inside", "size"),
        n_workloads=("workload", "nunique"),
    ).reset_index()


def _is_of(table: pd.DataFrame, fold: pd.DataFrame) -> pd.Series[bool]:
    """Return which rows are of a fold's workload."""
    keys = ["model", *WORKLOAD]
    first: Any = fold.iloc[0]
    same: pd.Series[bool] = (table[keys] == first[keys]).all(axis=1)
    return same


def _without(tables: Tables, left_out: pd.Series[bool]) -> dict[str, pd.DataFrame]:
    """Return the tables without runs, whatever became of them."""
    gone = tables["runs"].run_id[left_out]
    whole_runs = ("runs", "series", "windows")
    return {
        name: table[~table.run_id.isin(gone)] if name in whole_runs else table
        for name, table in tables.items()
    }


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


def record(table: pd.DataFrame, name: str) -> None:
    """Write predictions to ``data/expected``, without the time that they took."""
    table = table.drop(columns="wall_s", errors="ignore")
    datasets.write_table(rounded(table), EXPECTED / f"{name}.csv")


if __name__ == "__main__":
    measured = {name: datasets.load(name) for name in TABLES}
    moved = responses(measured)
    of_runs, of_grids = leave_one_workload_out(measured, datasets.sharegpt_lengths(), moved)
    kept = [*measured_grids.WORKLOAD, *measured_grids.CONFIGURATION, "feasible_start"]
    kept += ["offered_tokens_per_s", "total_throughput", "mean_ttft_ms"]
    record(of_runs, "left_out")
    record(of_grids[["seed", *kept]], "left_out_grids")
    record(leave_regions_out(measured, moved), "left_out_regions")
    of_models, grids_of_models = leave_models_out(measured, moved)
    record(of_models, "left_out_models")
    record(grids_of_models[["cautious", *kept]], "left_out_models_grids")
    scored = scores(measured["runs"], of_runs)
    record(coverage(scored), "coverage_of_intervals")
    for model in moved:
        calibration = replace(load_calibration("auto", model), off_by=multiples(scored))
        (FOLDER / f"{calibration.name}.json").write_text(calibration.to_json())
    print(bars_left_out(measured["runs"], of_runs).to_string())
    print(coverage(scored).to_string())
