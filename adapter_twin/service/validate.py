"""Predictions against measured runs: errors by model, campaign and regime, and the bars to pass."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from adapter_twin.errors import AdapterTwinError
from adapter_twin.service.metrics import STARVATION_THRESHOLD, half_smape, is_starved, mape
from adapter_twin.tables.datasets import replacing, write_table

Floats = NDArray[np.float64]
Bar = tuple[str, str, str, float, float, int]
"""A bar is its model, figure, measure, value reached, limit, and number of runs."""

FIGURES = {
    "total_throughput": "all",
    "mean_itl_ms": "all",
    "mean_tpot_ms": "all",
    "p99_itl_ms": "all",
    "median_ttft_ms": "not starved",
    "p99_ttft_ms": "not starved",
}
"""What is scored, and on which runs: in a starved run TTFT is the length of the window."""

LIGHT = "light"
NEAR_SATURATION = "near saturation"
STARVED = "starved"
COLLAPSED = "client collapsed"
"""Each run is in one of these four regimes."""

BORDERLINE = 0.02
"""Runs this close to the starvation threshold are starved or not by chance."""

REFUSALS = tuple(f"failed:{why}" for why in ("kv_lt_max_seq_len", "oom", "no_mem_cache_blocks"))
"""Statuses with which vLLM refuses a configuration; the others are accidents."""

BARS = (
    ("total_throughput", "mape", 1.5),
    ("mean_itl_ms", "mape", 5.0),
    ("median_ttft_ms", "median_error", 10.0),
    ("median_ttft_ms", "within_25", 85.0),
    ("p99_ttft_ms", "median_error", 25.0),
    ("p99_itl_ms", "median_error", 25.0),
)
"""Each bar is a figure, a measure and a limit, in percent, for every model."""

COLLAPSED_BAR = ("total_throughput", "mape", 6.0)
"""This one is for runs whose client collapsed."""

HELD_OUT_BARS = (
    ("total_throughput", "mape", 5.0),
    ("mean_itl_ms", "mape", 10.0),
    ("median_ttft_ms", "mape", 25.0),
)
"""These are for a campaign of one's own, on the runs that were held out from fitting."""

KV_TOKENS_BAR = 1.0
"""KV-cache tokens of a start may be off by n percent."""

HELD_OUT = ", held out"
"""It is added to the name of the campaign for these runs."""

SHARES = ("within_25", "macro_f1", "right")
"""These measures are to reach their bar; the others, errors, are not to pass it."""

RESAMPLES = 500
"""An interval is taken from n bootstrap samples."""

WORST_RUNS = 5
"""Of each model and figure, the n runs with the largest errors are told."""

RUN_KEYS = ["model", "campaign", "regime", "workload", "run_id"]
"""Errors are told and pooled by these columns of a run."""


@dataclass(frozen=True)
class Validation:
    """How far predictions are from measurements; all errors in percent.

    Attributes
    ----------
    errors : pandas.DataFrame
        ``twin`` (ours, authors), ``runs`` (all, or those of one mode of the authors' twin),
        ``model``, ``campaign``, ``regime`` (``all`` where pooled), ``figure``, ``measure`` (mape,
        median_error, within_25, half_smape), ``value``, ``low`` and ``high`` (95 % interval over
        whole workloads), ``n_runs``, ``n_workloads``.
    worst : pandas.DataFrame
        The runs with the largest errors of each model and figure.
    bars : pandas.DataFrame
        ``model``, ``figure``, ``measure``, ``value``, ``bar``, ``passed``, ``n_runs``.
    counts : dict
        Runs by what became of them.
    """

    errors: pd.DataFrame
    worst: pd.DataFrame
    bars: pd.DataFrame
    counts: dict[str, int]


def validate_runs(
    measured: pd.DataFrame,
    predictions: pd.DataFrame,
    *,
    starts: pd.DataFrame | None = None,
    authors: pd.DataFrame | None = None,
) -> Validation:
    """Score predictions of measured runs.

    Parameters
    ----------
    measured : pandas.DataFrame
        As `adapter_twin.tables.schemas.RUNS`. Figures are scored on runs with status ok, those
        that are ``client_collapsed`` apart; starts on runs that started or were refused. Where
        there is a column ``held_out``, the bars are those of one's own campaign, on these runs.
    predictions : pandas.DataFrame
        As `adapter_twin.tables.schemas.PREDICTIONS`, one row per measured run. A figure that is not
        predicted counts as zero, an error of 100 %.
    starts : pandas.DataFrame, optional
        Measured server starts (table ``memory``) with
        `adapter_twin.service.predict.predict_starts`.
    authors : pandas.DataFrame, optional
        Predictions of the reference study's twin (table ``authors_twin``).

    Raises
    ------
    AdapterTwinError
        A measured run has no prediction, or none can be scored.
    """
    missing = ~measured["run_id"].isin(predictions["run_id"])
    if missing.any():
        first = measured.loc[missing, "run_id"].iloc[0]
        raise AdapterTwinError(f"run_id: {first} has no prediction; predict the same runs")
    scored = _describe(measured[measured["status"] == "ok"])
    if scored.empty:
        raise AdapterTwinError("status: no run has status ok; give runs that completed")
    pairs = _pair(scored, predictions)
    errors = pd.DataFrame([{"twin": "ours", "runs": "all", **row} for row in _score(pairs)])
    if authors is not None:
        errors = pd.concat([errors, _beside_authors(scored, pairs, authors)], ignore_index=True)
    refused = measured["status"].isin(REFUSALS)
    counts = {
        "runs": len(measured),
        "scored": int((scored["regime"] != COLLAPSED).sum()),
        "client_collapsed": int((scored["regime"] == COLLAPSED).sum()),
        "start_refused": int(refused.sum()),
        "left_out": int(len(measured) - len(scored) - refused.sum()),
    }
    rows = [
        *_figure_bars(errors),
        _starvation_bar(scored, predictions),
        *_start_bars(measured, predictions, starts),
    ]
    bars = pd.DataFrame(rows, columns=["model", "figure", "measure", "value", "bar", "n_runs"])
    reached, kept = bars["value"] >= bars["bar"], bars["value"] <= bars["bar"]
    bars.insert(5, "passed", np.where(bars["measure"].isin(SHARES), reached, kept))
    return Validation(errors, _worst(pairs), bars, counts)


def pair_runs(measured: pd.DataFrame, predictions: pd.DataFrame) -> pd.DataFrame:
    """Return a row per completed run and figure: measured, predicted and signed error in percent.

    Arguments as for `validate_runs`; a figure is left out of runs on which it is not scored.
    """
    return _pair(_describe(measured[measured["status"] == "ok"]), predictions)


def _describe(runs: pd.DataFrame) -> pd.DataFrame:
    """Add ``ratio`` (of the offered load that is served), ``regime`` and ``workload``."""
    tokens = runs["mean_input_tokens"] + runs["mean_requested_output_tokens"]
    ratio = runs["total_throughput"] / (runs["offered_request_rate"] * tokens)
    cases = [runs["client_collapsed"], is_starved(ratio, 1.0), runs["waiting_mean"] < 1]
    regime = np.select(cases, [COLLAPSED, STARVED, LIGHT], NEAR_SATURATION)
    workload = runs["model"] + " " + runs["rates_per_adapter"] + " " + runs["ranks"]
    campaign = runs["campaign"]
    if "held_out" in runs:
        campaign = campaign.mask(runs["held_out"].astype(bool), campaign + HELD_OUT)
    return runs.assign(ratio=ratio, regime=regime, workload=workload, campaign=campaign)


def _pair(runs: pd.DataFrame, predictions: pd.DataFrame) -> pd.DataFrame:
    """Return one row per run and figure: ``measured``, ``predicted`` and ``error`` (signed, %)."""
    predictions = predictions.set_index("run_id")
    parts = []
    for figure in FIGURES:
        if figure not in predictions:
            continue
        counts = (runs[figure] > 0) & runs["run_id"].isin(predictions.index)
        if FIGURES[figure] == "not starved":
            counts &= ~is_starved(runs["ratio"], 1.0)
        part = runs.loc[counts, [*RUN_KEYS, figure]].rename(columns={figure: "measured"})
        guess = predictions.loc[part["run_id"], figure].fillna(0).to_numpy()
        parts.append(part.assign(figure=figure, predicted=guess))
    pairs = pd.concat(parts, ignore_index=True)
    return pairs.assign(error=100 * (pairs["predicted"] / pairs["measured"] - 1))


def _score(pairs: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Yield the error measures of every group of runs, pooled and split."""
    for split in ([], ["model"], ["model", "campaign"], ["model", "regime"]):
        chosen = pairs if "regime" in split else pairs[pairs["regime"] != COLLAPSED]
        for group, part in chosen.groupby([*split, "figure"], observed=True):
            names = dict.fromkeys(("model", "campaign", "regime"), "all")
            names |= dict(zip([*split, "figure"], map(str, group), strict=True))
            sizes = {"n_runs": len(part), "n_workloads": part["workload"].nunique()}
            for measure in error_measures(part):
                yield names | measure | sizes


def error_measures(pairs: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Yield each measure of the errors of some runs, with its interval over whole workloads.

    Parameters
    ----------
    pairs : pandas.DataFrame
        Rows of one figure of `pair_runs`.
    """
    measured, predicted = (pairs[name].to_numpy(float) for name in ("measured", "predicted"))
    error = pairs["error"].abs().to_numpy()
    half = 100 * np.abs(predicted - measured) / (predicted + measured)
    cluster = pairs["workload"].factorize()[0]
    k = int(cluster.max()) + 1
    # Runs of one workload share their errors: the workloads are what can be drawn again.
    weights = np.random.default_rng(0).multinomial(k, np.full(k, 1 / k), RESAMPLES)[:, cluster]
    near = 100.0 * (error <= 25)
    values = {
        "mape": (mape(measured, predicted), _weighted_mean(error, weights)),
        "median_error": (float(np.median(error)), _weighted_median(error, weights)),
        "within_25": (float(100 * np.mean(error <= 25)), _weighted_mean(near, weights)),
        "half_smape": (half_smape(measured, predicted), _weighted_mean(half, weights)),
    }
    for measure, (value, resampled) in values.items():
        low, high = np.percentile(resampled, [2.5, 97.5]) if k > 1 else (np.nan, np.nan)
        yield {"measure": measure, "value": value, "low": float(low), "high": float(high)}


def _weighted_mean(values: NDArray[Any], weights: NDArray[np.int64]) -> Floats:
    return np.asarray(weights @ values / weights.sum(axis=1))


def _weighted_median(values: NDArray[Any], weights: NDArray[np.int64]) -> Floats:
    order = np.argsort(values)
    reached = np.cumsum(weights[:, order], axis=1)
    return np.asarray(values[order[(reached >= reached[:, -1:] / 2).argmax(axis=1)]])


def _beside_authors(runs: pd.DataFrame, pairs: pd.DataFrame, authors: pd.DataFrame) -> pd.DataFrame:
    """Score both twins on the runs that the authors' twin predicts, one of its modes at a time."""
    rows: list[dict[str, Any]] = []
    for mode, predictions in authors.groupby("mode"):
        shared = runs[runs["run_id"].isin(predictions["run_id"])]
        if shared.empty:
            continue
        theirs = _pair(shared, predictions)
        same = pairs["figure"].isin(theirs["figure"]) & pairs["run_id"].isin(theirs["run_id"])
        for twin, scored in (("authors", theirs), ("ours", pairs[same])):
            rows += [{"twin": twin, "runs": mode, **row} for row in _score(scored)]
    return pd.DataFrame(rows)


def _worst(pairs: pd.DataFrame) -> pd.DataFrame:
    pairs = pairs[pairs["regime"] != COLLAPSED]
    ranked = pairs.reindex(pairs["error"].abs().sort_values(ascending=False).index)
    worst = ranked.groupby(["model", "figure"], sort=False).head(WORST_RUNS)
    return worst.sort_values(["model", "figure"], kind="stable")[
        ["model", "figure", "run_id", "campaign", "regime", "measured", "predicted", "error"]
    ].reset_index(drop=True)


def _figure_bars(errors: pd.DataFrame) -> Iterator[Bar]:
    ours = errors[(errors["twin"] == "ours") & (errors["runs"] == "all")]
    held_out = ours["campaign"].str.endswith(HELD_OUT)
    if held_out.any():
        headline, bars = held_out, [(bar, "all") for bar in HELD_OUT_BARS]
    else:
        headline = (ours["model"] != "all") & (ours["campaign"] == "all")
        bars = [(bar, "all") for bar in BARS] + [(COLLAPSED_BAR, COLLAPSED)]
    for model, part in ours[headline].groupby("model"):
        for (figure, measure, bar), regime in bars:
            key = (part[["figure", "measure", "regime"]] == [figure, measure, regime]).all(axis=1)
            for value, n_runs in part.loc[key, ["value", "n_runs"]].to_numpy():
                name = figure if regime == "all" else f"{figure} ({regime})"
                yield str(model), name, measure, float(value), bar, int(n_runs)


def _starvation_bar(runs: pd.DataFrame, predictions: pd.DataFrame) -> Bar:
    from sklearn.metrics import f1_score

    clear = (runs["ratio"] - STARVATION_THRESHOLD).abs() > BORDERLINE
    decided = runs[clear & (runs["regime"] != COLLAPSED)]
    predicted = predictions.set_index("run_id").loc[decided["run_id"], "starved"].to_numpy(bool)
    starved = is_starved(decided["ratio"], 1.0).to_numpy()
    score = float(f1_score(starved, predicted, average="macro")) if len(decided) else float("nan")
    return "all", "starved", "macro_f1", score, 0.99, len(decided)


def _start_bars(
    runs: pd.DataFrame, predictions: pd.DataFrame, starts: pd.DataFrame | None
) -> Iterator[Bar]:
    """Yield the bars on starts (of runs and of measured starts) and on KV-cache tokens."""
    refused = runs["status"].isin(REFUSALS)
    known = runs[refused | ~runs["status"].str.startswith("failed:")]
    feasible = predictions.set_index("run_id").loc[known["run_id"], "feasible_start"].to_numpy(bool)
    outcomes = pd.DataFrame({"model": known["model"], "right": feasible == ~refused[known.index]})
    if starts is not None:
        right = starts["predicted_start"] == starts["server_failure"].isna()
        outcomes = pd.concat([outcomes, pd.DataFrame({"model": starts["model"], "right": right})])
    for model, part in outcomes.groupby("model"):
        share = float(100 * part["right"].mean())
        yield str(model), "start refused or not", "right", share, 100.0, len(part)
    if starts is not None:
        for model, part in starts.dropna(subset=["kv_cache_tokens"]).groupby("model"):
            ratio = part["predicted_kv_cache_tokens"] / part["kv_cache_tokens"]
            largest = float(100 * (ratio - 1).abs().max())
            yield str(model), "kv_cache_tokens", "max_error", largest, KV_TOKENS_BAR, len(part)


def write_validation(
    validation: Validation, predictions: pd.DataFrame, folder: Path
) -> dict[str, Any]:
    """Write ``predictions.parquet``, ``errors.csv``, ``worst.csv``, ``summary.json``.

    Parameters
    ----------
    validation : Validation
    predictions : pandas.DataFrame
    folder : pathlib.Path
        Created where its parent exists.

    Returns
    -------
    dict
        The `summary`.
    """
    if not folder.parent.is_dir():
        raise AdapterTwinError(f"{folder}: {folder.parent} does not exist; create it first")
    folder.mkdir(exist_ok=True)
    write_table(predictions, folder / "predictions.parquet")
    write_table(validation.errors, folder / "errors.csv")
    write_table(validation.worst, folder / "worst.csv")
    content = summary(validation, predictions)
    with replacing(folder / "summary.json") as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
    return content


def summary(validation: Validation, predictions: pd.DataFrame) -> dict[str, Any]:
    """Return provenance, counts and bars as plain values."""
    bars = json.loads(validation.bars.to_json(orient="records", double_precision=6))
    return {"provenance": dict(predictions.attrs), "counts": validation.counts, "bars": bars}
