"""Picks against measured grids: what each way of choosing a configuration would have cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from adapter_twin.capacity.analytic import predict_analytic
from adapter_twin.errors import AdapterTwinError
from adapter_twin.learn.features import configuration_features
from adapter_twin.learn.surrogates import (
    TARGETS,
    feature_array,
    fit,
    fit_classifier,
    to_grid,
    verdicts,
)
from adapter_twin.plan.criterion import TIE, Criterion
from adapter_twin.plan.grid import evaluate, grid_runs, slot_rank
from adapter_twin.service.metrics import half_smape
from adapter_twin.service.predict import load_calibrations
from adapter_twin.workload.files import (
    DEFAULT_MEAN_INPUT_TOKENS,
    DEFAULT_MEAN_OUTPUT_TOKENS,
    parse_ranks,
    records,
)
from study.ch01_to_06 import offered_tokens_per_s

if TYPE_CHECKING:
    import pandas as pd

    from adapter_twin.laws import Calibration

WORKLOAD = ["model", "rates_per_adapter", "ranks"]
CONFIGURATION = ["served_adapters", "adapter_slots"]

THUMBS: Mapping[str, Any] = {
    "G = N": lambda n, grid: n,
    "G = N/4": lambda n, grid: max((g for g in grid if g <= n / 4), default=grid[0]),
    "fewest slots": lambda n, grid: grid[0],
}
"""Rules of thumb give the slots for the twin's number of adapters."""


def measured_grids(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the measured runs of the grids with what `Criterion` reads.

    Parameters
    ----------
    runs : pandas.DataFrame
        Table ``runs``.
    """
    means = {
        "mean_input_tokens": DEFAULT_MEAN_INPUT_TOKENS,
        "mean_requested_output_tokens": DEFAULT_MEAN_OUTPUT_TOKENS,
    }
    grids = runs[runs.campaign == "optimum_grid"].fillna(means)
    return grids.assign(
        feasible_start=grids.status == "ok",
        offered_tokens_per_s=offered_tokens_per_s(grids).to_numpy(),
    )


def mixes(grids: pd.DataFrame) -> pd.DataFrame:
    """Return the workloads of measured grids with their mean lengths, as `grid_runs` takes them."""
    lengths = ["mean_input_tokens", "mean_requested_output_tokens"]
    table = grids.groupby(WORKLOAD, as_index=False, observed=True)[lengths].mean()
    return table.assign(zipf_exponent=0.0, arrival_cv=1.0, workload_id=table.index)


def measured_optima(grids: pd.DataFrame) -> pd.DataFrame:
    """Return the best measured configuration of each workload, by the paper's rule."""
    return _best(grids, Criterion())


def twin_runs(
    grids: pd.DataFrame, calibration: str | Calibration = "auto", *, seed: int = 0, jobs: int = -1
) -> pd.DataFrame:
    """Return what the twin predicts for the grids' configurations, from configuration alone."""
    import pandas as pd

    calibrations = load_calibrations(calibration, grids["model"])
    tables = [
        evaluate(runs, calibrations[runs.model.iloc[0]], seed=seed, jobs=jobs)
        for runs in _grids_of(grids)
    ]
    return pd.concat(tables, ignore_index=True)


def analytic_runs(grids: pd.DataFrame) -> pd.DataFrame:
    """Return what the analytic model predicts for the grids' configurations."""
    import pandas as pd

    runs = pd.concat(_grids_of(grids), ignore_index=True)
    return runs.join(predict_analytic(runs))


def search_picks(runs: pd.DataFrame, margin: float) -> pd.DataFrame:
    """Return the best of each workload's predicted configurations."""
    return _best(runs, Criterion(margin=margin))


def model_picks(
    grids: pd.DataFrame, labels: pd.DataFrame, features: str, model: str
) -> pd.DataFrame:
    """Return what a model picks for each workload, fitted to labels of other rates.

    Parameters
    ----------
    grids : pandas.DataFrame
        See `measured_grids`.
    labels : pandas.DataFrame
        See `adapter_twin.learn.sweep.label`.
    features, model : str
        See `adapter_twin.learn.surrogates`.
    """
    import pandas as pd

    unseen = labels[labels.has_optimum & ~labels.rates_per_adapter.isin(grids.rates_per_adapter)]
    tables = []
    for language, own in mixes(grids).groupby("model"):
        asked = own.assign(max_lora_rank=[slot_rank(parse_ranks(ranks)) for ranks in own.ranks])
        train = unseen[unseen["model"] == language]
        served, slots, throughput = (
            fit(train, features, target, model).predict(feature_array(features, asked))
            for target in TARGETS
        )
        served = to_grid(served, grids.served_adapters.unique())
        slots = np.minimum(to_grid(slots, grids.adapter_slots.unique()), served)
        picked = {"served_adapters": served, "adapter_slots": slots, "total_throughput": throughput}
        tables.append(asked[WORKLOAD].assign(**picked))
    return pd.concat(tables, ignore_index=True)


def classifier_picks(
    grids: pd.DataFrame, sweep: pd.DataFrame, criterion: Criterion, name: str
) -> pd.DataFrame:
    """Return the configurations that a classifier of runs is for, fitted to other rates' runs.

    Parameters
    ----------
    grids : pandas.DataFrame
        See `measured_grids`.
    sweep : pandas.DataFrame
        See `adapter_twin.learn.sweep.read_sweep`.
    criterion : Criterion
        What makes a run of the sweep a served one.
    name : str
        Of `adapter_twin.learn.surrogates.CLASSIFIERS`.
    """
    import pandas as pd

    runs = analytic_runs(grids)
    unseen = sweep[~sweep.rates_per_adapter.isin(grids.rates_per_adapter)]
    tables = []
    for language, own in runs[runs.feasible_start].groupby("model"):
        judged = verdicts(unseen[unseen["model"] == language], criterion)
        tables.append(pick(own, fit_classifier(judged, name), WORKLOAD))
    picks = pd.concat(tables, ignore_index=True)
    return picks[[*WORKLOAD, *CONFIGURATION, "total_throughput"]]


def pick(runs: pd.DataFrame, classifier: Any, within: list[str]) -> pd.DataFrame:
    """Return the configuration of each workload that a classifier would choose.

    What is served has the throughput that is offered, so the most offered load that is served wins;
    among ties, the configuration that is surest to be served.

    Parameters
    ----------
    runs : pandas.DataFrame
        Configurations that start; as for
        `adapter_twin.learn.features.configuration_features`, and ``offered_tokens_per_s``.
    classifier : estimator
        See `adapter_twin.learn.surrogates.fit_classifier`.
    within : list of str
        Columns that tell the workloads apart.

    Returns
    -------
    pandas.DataFrame
        Rows of `runs`, one per workload of which anything is served, with ``total_throughput``.
    """
    served = classifier.predict_proba(configuration_features(runs).to_numpy())[:, 1]
    good = runs.assign(sure=served, total_throughput=runs.offered_tokens_per_s).query("sure > 0.5")
    most = good.groupby(within, observed=True).total_throughput.transform("max")
    tied = good[good.total_throughput >= (1 - TIE) * most]
    return tied.sort_values("sure", ascending=False).drop_duplicates(within).drop(columns="sure")


def authors_picks(sweep: pd.DataFrame) -> pd.DataFrame:
    """Return the labels that the reference study trained on, from its own twin's sweep.

    Its rule keeps the first point of a curve over N where none is feasible, and takes the highest
    throughput over the curves.

    Parameters
    ----------
    sweep : pandas.DataFrame
        Table ``authors_twin_sweep``.
    """
    offered = sweep.offered_rate_req_s * (sweep.pool_in + sweep.pool_out)
    table = sweep.assign(feasible=sweep.total_throughput >= 0.9 * offered)
    curves = table.groupby([*WORKLOAD, "adapter_slots"], observed=True)
    first = table.served_adapters == curves.served_adapters.transform("min")
    kept = table[table.feasible | (first & ~curves.feasible.transform("any"))]
    best = kept.groupby(WORKLOAD, observed=True).total_throughput.idxmax()
    return table.loc[best, [*WORKLOAD, *CONFIGURATION, "total_throughput"]].reset_index(drop=True)


def thumb_picks(twin: pd.DataFrame, grids: pd.DataFrame, rule: str) -> pd.DataFrame:
    """Return the twin's numbers of adapters with slots by a rule of `THUMBS`."""
    slots = sorted(grids.adapter_slots.unique())
    return twin.assign(adapter_slots=[THUMBS[rule](n, slots) for n in twin.served_adapters])


def _grids_of(grids: pd.DataFrame) -> list[pd.DataFrame]:
    """Return the configurations that were asked of each workload, without what was measured."""
    return [
        grid_runs(
            mix,
            sorted(grids.served_adapters.unique()),
            sorted(grids.adapter_slots.unique()),
            3600.0,
        )
        for mix in records(mixes(grids))
    ]


def _best(table: pd.DataFrame, criterion: Criterion) -> pd.DataFrame:
    """Return the first of each workload's ranked configurations."""
    best = criterion.ranked(table, within=WORKLOAD).drop_duplicates(WORKLOAD)
    served = set(best[WORKLOAD].itertuples(index=False, name=None))
    for workload in table[WORKLOAD].drop_duplicates().itertuples(index=False, name=None):
        if workload not in served:
            raise AdapterTwinError(f"{' '.join(workload)}: every configuration starves")
    columns = [*WORKLOAD, *CONFIGURATION, "total_throughput", "mean_ttft_ms"]
    return best[columns].reset_index(drop=True)


def cost(picks: pd.DataFrame, grids: pd.DataFrame) -> pd.DataFrame:
    """Return what was measured where a method picked, against the best measured point.

    Returns
    -------
    pandas.DataFrame
        One row per workload: the pick, ``best_served``, ``best_slots``, ``best_throughput``; the
        pick's ``predicted``, ``measured`` throughput in tokens/s; ``regret`` in percent (all of it
        where the start was refused or the run starved); ``ttft_ratio`` of the pick's mean TTFT to
        the best point's; ``starves``.
    """
    names = {
        "served_adapters": "best_served",
        "adapter_slots": "best_slots",
        "total_throughput": "best_throughput",
        "mean_ttft_ms": "best_ttft_ms",
    }
    best = measured_optima(grids).rename(columns=names)
    measured = grids.assign(
        served=Criterion().feasible(grids),
        measured=grids.total_throughput,
        measured_ttft_ms=grids.mean_ttft_ms,
    )[[*WORKLOAD, *CONFIGURATION, "served", "measured", "measured_ttft_ms"]]
    table = (
        picks.rename(columns={"total_throughput": "predicted"})
        .drop(columns="mean_ttft_ms", errors="ignore")
        .merge(best, on=WORKLOAD)
        .merge(measured, on=[*WORKLOAD, *CONFIGURATION], how="left")
    )
    served = table.served.fillna(False).astype(bool)
    kept = (table.measured / table.best_throughput).where(served, 0.0)
    return table.assign(
        regret=100 * (1 - kept),
        ttft_ratio=(table.measured_ttft_ms / table.best_ttft_ms).where(served),
        starves=~served,
    ).drop(columns=["served", "measured_ttft_ms", "best_ttft_ms"])


def paper_style(costs: pd.DataFrame) -> dict[str, float]:
    """Return the paper's halved SMAPE of N*, G* and throughput*, and regret, over workloads."""
    return {
        "half_smape_served": half_smape(costs.best_served, costs.served_adapters),
        "half_smape_slots": half_smape(costs.best_slots, costs.adapter_slots),
        "half_smape_throughput": half_smape(costs.best_throughput, costs.predicted),
        "regret": float(costs.regret.mean()),
        "largest_regret": float(costs.regret.max()),
        "median_ttft_ratio": float(costs.ttft_ratio.median()),
        "starving_picks": int(costs.starves.sum()),
    }
