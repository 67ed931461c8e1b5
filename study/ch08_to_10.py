"""Tables of the chapters on planning: the data set, the models, the picks."""

from __future__ import annotations

from collections.abc import Sequence

import joblib
import pandas as pd

from adapter_twin.learn.surrogates import (
    CLASSIFIERS,
    MODELS,
    TARGETS,
    chosen,
    compare,
    compare_classifiers,
    split,
    verdicts,
)
from adapter_twin.learn.sweep import label
from adapter_twin.learn.training import train_chosen
from adapter_twin.plan.candidates import HOUR_S
from adapter_twin.plan.criterion import Criterion
from adapter_twin.plan.grid import GRID, grid_runs
from adapter_twin.workload.scenario import Slo
from study import measured_grids
from study.ch01_to_06 import MEAN_INPUT_TOKENS, MEAN_OUTPUT_TOKENS
from study.ch09_explain import diagnostics, regress

LLAMA = "llama-3.1-8b-instruct"

SIZES = ["mean_input_tokens", "mean_requested_output_tokens"]

MIX = {
    "model": LLAMA,
    "rates_per_adapter": "0.1-0.05-0.025",
    "ranks": "8-16-16",
    "mean_input_tokens": MEAN_INPUT_TOKENS,
    "mean_requested_output_tokens": MEAN_OUTPUT_TOKENS,
}
"""The chapters show this workload in full."""

SLO = Slo(ttft_ms=2000, itl_ms=100, percentile=99)
"""The chapters ask this objective of it, and the designs of theirs."""

LEFT_OUT = "twin, workload left out"
"""The laws of this method have not seen the workload; its figures are means over seeds."""

QUICK_MODELS = ("linear", "small tree, depth 2", "small tree, depth 6", "decision tree")
QUICK_CLASSIFIERS = ("logistic regression", "small tree, depth 6", "decision tree")


def in_words(slo: Slo) -> str:
    """Return an SLO as a clause."""
    limits = []
    if slo.ttft_ms is not None:
        limits.append(f"{slo.ttft_ms / 1e3:g} s to the first token")
    if slo.itl_ms is not None:
        limits.append(f"{slo.itl_ms:g} ms between tokens")
    return f"{slo.percentile:g} % of the requests within {' and '.join(limits)}"


def thin(sweep: pd.DataFrame, every: int) -> pd.DataFrame:
    """Return every n-th mix of rates of a sweep, with all that belongs to it."""
    rates = list(dict.fromkeys(sweep.rates_per_adapter))[::every]
    return sweep[sweep.rates_per_adapter.isin(rates)].reset_index(drop=True)


def anatomy(sweep: pd.DataFrame, criterion: Criterion) -> pd.DataFrame:
    """Count the runs of a sweep by what became of them, and its labels, by language model."""
    labels = label(sweep, criterion)
    rows = []
    for model, runs in sweep.groupby("model", observed=True):
        own = labels[labels["model"] == model]
        with_optimum = own[own.has_optimum]
        rows.append(
            {
                "model": model,
                "workloads": len(own),
                "runs": len(runs),
                "start refused": int((~runs.feasible_start).sum()),
                "hopeless": int((runs.feasible_start & ~runs.simulated).sum()),
                "simulated": int(runs.simulated.sum()),
                "without an optimum": len(own) - len(with_optimum),
                "at the grid's edge": int(with_optimum.censored.sum()),
                "several slots tie": int(with_optimum.tied_slots.str.contains("-").sum()),
            }
        )
    return pd.DataFrame(rows)


def around_the_knee(sweep: pd.DataFrame, criterion: Criterion, rates: str) -> pd.DataFrame:
    """Return runs of one workload: far below its optimum, there, and past it, on as many slots."""
    own = sweep[(sweep["model"] == LLAMA) & (sweep.rates_per_adapter == rates)]
    workload = own[own.ranks == own.ranks.iloc[0]]
    best = criterion.ranked(workload).iloc[0]
    past = min(n for n in GRID if n > 1.2 * best.served_adapters)
    mix = workload.iloc[0][[*SIZES, *measured_grids.WORKLOAD]].to_dict()
    served = {"light": best.served_adapters // 4, "at the optimum": best.served_adapters}
    tables = [
        grid_runs(mix, [n], [min(n, best.adapter_slots)], HOUR_S).assign(run_id=f"{name}, N = {n}")
        for name, n in (served | {"starved": past}).items()
    ]
    return pd.concat(tables, ignore_index=True)


def price_of_slo(sweep: pd.DataFrame, rule: Criterion, with_slo: Criterion) -> pd.DataFrame:
    """Return what an SLO changes of the optima, by language model.

    Returns
    -------
    pandas.DataFrame
        ``model``; of its workloads, in percent: ``none`` have no optimum with the SLO, ``fewer``
        serve fewer adapters; ``throughput`` that is left on average, in percent of the rule's.
    """
    by = ["model", "workload_id"]
    both = label(sweep, rule).merge(label(sweep, with_slo), on=by, suffixes=("", "_slo"))
    both = both[both.has_optimum]
    kept = (both.total_throughput_slo / both.total_throughput).fillna(0.0)
    table = both.assign(
        none=100.0 * ~both.has_optimum_slo,
        fewer=100.0 * (both.served_adapters_slo < both.served_adapters),
        throughput=100 * kept,
    )
    columns = ["none", "fewer", "throughput"]
    return table.groupby("model", observed=True)[columns].mean().reset_index()


def judged_by_twin(picks: pd.DataFrame, sweep: pd.DataFrame) -> dict[str, float]:
    """Return what the twin says of picks: percent that starve, and percent of throughput lost.

    Parameters
    ----------
    picks : pandas.DataFrame
        ``model, rates_per_adapter, ranks, served_adapters, adapter_slots``, on the sweep's grid.
    sweep : pandas.DataFrame
        See `adapter_twin.learn.sweep.read_sweep`.
    """
    by = [*measured_grids.WORKLOAD, *measured_grids.CONFIGURATION]
    plain = sweep.astype(dict.fromkeys(measured_grids.WORKLOAD, str))
    serves = plain.assign(serves=Criterion().feasible(plain))
    best = (
        serves[serves.serves].groupby(measured_grids.WORKLOAD).total_throughput.max().rename("best")
    )
    found = picks[by].merge(serves, on=by).merge(best.reset_index(), on=measured_grids.WORKLOAD)
    reached = found.total_throughput.where(found.serves, 0.0)
    return {
        "starving": 100 * float((~found.serves).mean()),
        "regret": 100 * float((1 - reached / found.best).mean()),
    }


def labelled_by_model(
    sweep: pd.DataFrame, criterion: Criterion, models: Sequence[str] = ()
) -> dict[str, pd.DataFrame]:
    """Return the workloads that have an optimum, by language model."""
    labels = label(sweep, criterion)
    labels = labels[labels.has_optimum]
    names = models or sorted(labels["model"].unique())
    return {name: labels[labels["model"] == name].reset_index(drop=True) for name in names}


def compare_models(labelled: dict[str, pd.DataFrame], models: Sequence[str]) -> pd.DataFrame:
    """Return `adapter_twin.learn.surrogates.compare` of every language model."""
    tables = [
        compare(split(own), models).assign(language_model=name) for name, own in labelled.items()
    ]
    return pd.concat(tables, ignore_index=True)


def compare_verdicts(
    sweep: pd.DataFrame, criteria: dict[str, Criterion], names: Sequence[str]
) -> pd.DataFrame:
    """Return `adapter_twin.learn.surrogates.compare_classifiers` by language model and verdict."""
    tables = []
    for model, runs in sweep.groupby("model", observed=True):
        for verdict, criterion in criteria.items():
            parts = split(verdicts(runs, criterion))
            table = compare_classifiers(parts, tuple(names))
            tables.append(table.assign(language_model=model, verdict=verdict))
    return pd.concat(tables, ignore_index=True)


def intervals(labelled: dict[str, pd.DataFrame], comparison: pd.DataFrame) -> pd.DataFrame:
    """Return the chosen models' 90 % intervals and what they cover of unseen workloads."""
    best = chosen(comparison)
    tasks = (
        joblib.delayed(train_chosen)(row, labelled[row.language_model])
        for _, row in best.iterrows()
    )
    about = [trained.about for trained in joblib.Parallel(-1)(tasks)]
    return best[["language_model", "target", "model", "features"]].assign(
        test_half_smape=best.test_half_smape,
        factor=[facts.interval_factor for facts in about],
        coverage=[100 * facts.coverage for facts in about],
    )


def inference(labelled: pd.DataFrame) -> pd.DataFrame:
    """Return the linear models' diagnostics, a row per target and set of features."""
    rows = [
        {"target": target, "features": features, **diagnostics(regress(labelled, features, target))}
        for target in TARGETS
        for features in ("paper", "traffic")
    ]
    return pd.DataFrame(rows)


def methods(
    grids: pd.DataFrame,
    sweep: pd.DataFrame,
    twin: pd.DataFrame,
    left_out: pd.DataFrame,
    authors_sweep: pd.DataFrame,
    margin: float,
    models: Sequence[str] = tuple(MODELS),
    classifiers: Sequence[str] = tuple(CLASSIFIERS),
) -> pd.DataFrame:
    """Return what each way of choosing a configuration costs on the measured grids.

    Parameters
    ----------
    grids : pandas.DataFrame
        See `study.measured_grids.measured_grids`.
    sweep : pandas.DataFrame
        The models learn from its workloads of other rates.
    twin : pandas.DataFrame
        See `study.measured_grids.twin_runs`.
    left_out : pandas.DataFrame
        The same by laws that have not seen the workload, for several seeds, see
        `study.left_out.leave_one_workload_out`.
    authors_sweep : pandas.DataFrame
        Table ``authors_twin_sweep``.
    margin : float
        Of `Criterion`.
    models, classifiers : sequence of str

    Returns
    -------
    pandas.DataFrame
        A row per ``method``, its ``kind``, and the figures of
        `study.measured_grids.paper_style`.
    """
    criterion = Criterion(margin=margin)
    labels = label(sweep, criterion)
    searched = measured_grids.search_picks(twin, margin)
    picks = {
        ("search", "twin, fitted"): searched,
        ("search", "analytic model"): measured_grids.search_picks(
            measured_grids.analytic_runs(grids), margin
        ),
    }
    asked = [(name, features) for name in models for features in ("paper", "traffic")]
    of_models = joblib.Parallel(-1)(
        joblib.delayed(measured_grids.model_picks)(grids, labels, features, name)
        for name, features in asked
    )
    for (name, features), found in zip(asked, of_models, strict=True):
        picks["model of the optimum", f"{name} ({features} features)"] = found
    of_classifiers = joblib.Parallel(-1)(
        joblib.delayed(measured_grids.classifier_picks)(grids, sweep, criterion, name)
        for name in classifiers
    )
    for name, found in zip(classifiers, of_classifiers, strict=True):
        picks["classifier of configurations", name] = found
    for rule in measured_grids.THUMBS:
        picks["rule of thumb", f"{rule}, N of the twin"] = measured_grids.thumb_picks(
            searched, grids, rule
        )
    picks["published", "the authors' labels"] = measured_grids.authors_picks(authors_sweep)
    rows = [
        {
            "kind": kind,
            "method": name,
            **measured_grids.paper_style(measured_grids.cost(found, grids)),
        }
        for (kind, name), found in picks.items()
    ]
    unseen = {"kind": "search", "method": LEFT_OUT, **over_seeds(grids, left_out, margin).mean()}
    return pd.DataFrame([unseen, *rows])


def over_seeds(grids: pd.DataFrame, left_out: pd.DataFrame, margin: float) -> pd.DataFrame:
    """Return what the twin's picks cost by laws that have not seen the workload, a row per seed."""
    rows = [
        measured_grids.paper_style(
            measured_grids.cost(measured_grids.search_picks(runs, margin), grids)
        )
        for _, runs in left_out.groupby("seed")
    ]
    return pd.DataFrame(rows)


def margins(grids: pd.DataFrame, twin: pd.DataFrame, values: Sequence[float]) -> pd.DataFrame:
    """Return what a safety margin costs, and what it saves, on the measured grids."""
    rows = []
    for margin in values:
        costs = measured_grids.cost(measured_grids.search_picks(twin, margin), grids)
        rows.append({"margin": 100 * margin, **measured_grids.paper_style(costs)})
    return pd.DataFrame(rows)
