"""Tables of the chapter on studies: predictions beside measurements, and waits by popularity."""

from __future__ import annotations

import numpy as np
import pandas as pd

from adapter_twin.prove.comparison import methods
from adapter_twin.prove.outcome import RUN, Outcome
from adapter_twin.prove.rivals import TWIN
from adapter_twin.service.metrics import waits_ms
from adapter_twin.service.validate import error_measures

SCORED = ("total_throughput", "median_ttft_ms", "mean_itl_ms")
"""Predictions of these figures are scored on runs that do not starve."""


def pairs(runs: pd.DataFrame) -> pd.DataFrame:
    """Return measured and predicted `SCORED` of the runs that do not starve, a row each.

    Returns
    -------
    pandas.DataFrame
        `RUN`, ``figure``, ``measured``, ``predicted``, ``error`` in percent.
    """
    scored = runs[runs.starts & runs.predicted_starts & ~runs.starved]
    parts = [
        scored[RUN].assign(
            figure=figure, measured=scored[figure], predicted=scored[f"predicted_{figure}"]
        )
        for figure in SCORED
    ]
    table = pd.concat(parts, ignore_index=True)
    return table.assign(error=100 * (table.predicted / table.measured - 1))


def bars(runs: pd.DataFrame, chosen: pd.DataFrame, said: pd.DataFrame) -> pd.DataFrame:
    """Return what was asked of the recommendations, and what was reached.

    Parameters
    ----------
    runs, chosen, said : pandas.DataFrame
        What `adapter_twin.prove.outcome.service`, and `choices` and `verdicts` of
        `adapter_twin.prove.comparison` return.

    Returns
    -------
    pandas.DataFrame
        ``what``, ``asked``, ``reached`` (in percent), ``low`` and ``high``: 95 %, of a share
        Wilson's, as if runs of a workload were independent, of the others by bootstrap over
        workloads; ``of``: the number of runs or workloads.
    """
    twin = methods(chosen[chosen.method == TWIN], chosen.workload.nunique()).iloc[0]
    rows = [
        (name, 90.0, 100 * own.right.mean(), *_wilson(int(own.right.sum()), len(own)), len(own))
        for name, own in (
            ("recommendation serves (at least)", said[said.said]),
            ("every verdict right (at least)", said),
        )
        if len(own)
    ]
    rows += [
        ("throughput regret (at most)", 3.0, twin.regret, twin.low, twin.high, twin.named),
    ]
    scored = pairs(runs)
    for figure, asked in (("total_throughput", 5.0), ("median_ttft_ms", 25.0)):
        own = scored[scored.figure == figure]
        mape = next(row for row in error_measures(own) if row["measure"] == "mape")
        name = f"{figure} MAPE (at most)"
        rows.append((name, asked, mape["value"], mape["low"], mape["high"], len(own)))
    return pd.DataFrame(rows, columns=["what", "asked", "reached", "low", "high", "of"])


def _wilson(hits: int, trials: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share, in percent."""
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(hits, trials, method="wilson")
    return 100 * float(low), 100 * float(high)


def waits(outcome: Outcome) -> pd.DataFrame:
    """Return every request's time to first token, measured and predicted.

    Returns
    -------
    pandas.DataFrame
        A row per request of the runs that started, measured and predicted: `RUN`, ``adapter``,
        its ``request_rate`` and ``place`` by popularity from 1; ``ttft_ms``,
        ``predicted_ttft_ms``, as `adapter_twin.service.metrics.waits_ms` tells them.
    """
    parts = []
    for _, run in outcome.runs.iterrows():
        seen, foreseen = outcome.measured(run), outcome.predicted(run)
        if seen is None or foreseen is None:
            continue
        part = {
            **{name: run[name] for name in RUN},
            "adapter": seen.adapter,
            "ttft_ms": waits_ms(seen, float(run.duration_s)),
            "predicted_ttft_ms": waits_ms(foreseen, float(run.duration_s)),
        }
        parts.append(pd.DataFrame(part))
    table = pd.concat(parts, ignore_index=True)
    return table.join(_popularity(outcome), on=["workload", "adapter"])


def per_adapter(requests: pd.DataFrame) -> pd.DataFrame:
    """Return the 99th percentile of each adapter's waits over all repeats.

    Parameters
    ----------
    requests : pandas.DataFrame
        What `waits` returned.

    Returns
    -------
    pandas.DataFrame
        A row per workload, number of slots and adapter that was asked: ``place``, ``requests``,
        ``p99_ttft_ms`` and ``predicted_p99_ttft_ms``.
    """
    return _percentiles(requests, ["workload", "adapter_slots", "adapter", "place"])


def by_popularity(requests: pd.DataFrame) -> pd.DataFrame:
    """Return the same for groups of adapters: the most popular tenth, the rarer half, the others.

    ``group`` tells them apart.
    """
    adapters = requests.groupby("workload").place.transform("max")
    edges = pd.DataFrame({"first": 0.1 * adapters, "last": 0.5 * adapters})
    group = np.select(
        [requests.place <= edges["first"], requests.place > edges["last"]],
        ["most popular tenth", "rarer half"],
        "between",
    )
    return _percentiles(requests.assign(group=group), ["workload", "adapter_slots", "group"])


def _percentiles(requests: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    groups = requests.groupby(by)
    told = groups[["ttft_ms", "predicted_ttft_ms"]].quantile(0.99)
    names = {"ttft_ms": "p99_ttft_ms", "predicted_ttft_ms": "predicted_p99_ttft_ms"}
    return told.rename(columns=names).assign(requests=groups.size()).reset_index()


def _popularity(outcome: Outcome) -> pd.DataFrame:
    """Return rate and place of every adapter, indexed by workload and adapter."""
    rows = [
        {"workload": name, "adapter": i, "request_rate": adapter.request_rate}
        for name, demand in outcome.demands.items()
        for i, adapter in enumerate(demand.adapters)
    ]
    table = pd.DataFrame(rows)
    place = table.groupby("workload").request_rate.rank(ascending=False, method="first")
    return table.assign(place=place.astype(int)).set_index(["workload", "adapter"])
