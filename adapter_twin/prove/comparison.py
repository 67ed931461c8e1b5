"""Verdicts on a study: the regret of every method's choices, and the promises that were kept."""

import math

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from adapter_twin.prove.outcome import RUN
from adapter_twin.prove.rivals import TWIN
from adapter_twin.service.metrics import mean_interval


def choices(runs: pd.DataFrame, picks: pd.DataFrame) -> pd.DataFrame:
    """Return how every method's choice did, beside the best configuration that was run.

    Parameters
    ----------
    runs : pandas.DataFrame
        What `service` returned.
    picks : pandas.DataFrame
        Of `Outcome`.

    Returns
    -------
    pandas.DataFrame
        A row per workload and method: ``adapter_slots``; ``starts``; ``serves``, in most of the
        repeats; ``total_throughput``, ``mean_ttft_ms``, ``slo_attainment``; ``regret``:
        throughput lost against the configuration with the highest mean throughput, in percent,
        with ``low`` and ``high`` (95 %); ``ttft_ratio``: mean TTFT by the lowest one of a
        configuration that serves. Choices that do not start lose everything; a method that names
        no configuration has no row.
    """
    tables = [_arms(own).assign(workload=name) for name, own in runs.groupby("workload")]
    arms = pd.concat(tables, ignore_index=True)
    named = picks.dropna(subset=["adapter_slots"]).astype({"adapter_slots": int})
    return named.merge(arms, on=["workload", "adapter_slots"], how="inner")


def _arms(runs: pd.DataFrame) -> pd.DataFrame:
    """Return one row per configuration of a workload, means over its repeats."""
    groups = runs.groupby("adapter_slots")
    measured = ["total_throughput", "mean_ttft_ms", "slo_attainment"]
    arms = groups[measured].mean().assign(starts=groups.starts.all())
    # Runs of a repeat serve the same requests: compared in pairs, chance in the traffic cancels.
    served = runs.assign(total_throughput=runs.total_throughput.where(runs.starts, 0.0))
    table = served.pivot(index="repeat", columns="adapter_slots", values="total_throughput")
    best = table.mean().idxmax()
    regret = 100 * (1 - table.div(table[best], axis="index"))
    arms["regret"] = regret.mean()
    others = arms.starts & (arms.index != best)
    half = others * _half_width(regret.loc[:, others])
    arms["low"], arms["high"] = arms.regret - half, arms.regret + half
    arms["serves"] = groups.serves.mean() > 0.5
    lowest = arms.mean_ttft_ms.where(arms.serves).min()
    arms["ttft_ratio"] = arms.mean_ttft_ms / lowest
    return arms.reset_index()


def _half_width(regret: pd.DataFrame) -> float:
    """Return half the 95 % interval of a mean over repeats (rows), NaN for a single one.

    The spread over repeats is pooled over the configurations (columns).
    """
    repeats = len(regret)
    freedom = (repeats - 1) * regret.shape[1]
    if freedom == 0:
        return math.nan
    spread = math.sqrt(float(regret.var(ddof=1).mean()))
    return float(stdtrit(freedom, 0.975)) * spread / math.sqrt(repeats)


def methods(chosen: pd.DataFrame, workloads: int, seed: int = 0) -> pd.DataFrame:
    """Return how the methods did over all workloads.

    Parameters
    ----------
    chosen : pandas.DataFrame
        What `choices` returned.
    workloads : int
        Of the study.
    seed : int
        Of the bootstrap.

    Returns
    -------
    pandas.DataFrame
        A row per method: ``named``, ``start`` and ``serve``: workloads of which it names a
        configuration, and those of which that starts, and serves; ``regret`` of those named, mean
        in percent, with ``low`` and ``high`` (95 %, bootstrap over workloads); ``worst_regret``;
        ``ttft_ratio``, the geometric mean over those that start.
    """
    rows = []
    for method, own in chosen.groupby("method", sort=False):
        regret = own.regret.to_numpy()
        low, high = mean_interval(regret, seed)
        ratios = own.ttft_ratio[own.starts & own.ttft_ratio.notna()]
        rows.append(
            {
                "method": method,
                "of": workloads,
                "named": len(own),
                "start": int(own.starts.sum()),
                "serve": int(own.serves.sum()),
                "regret": float(regret.mean()),
                "low": low,
                "high": high,
                "worst_regret": float(regret.max()),
                "ttft_ratio": float(np.exp(np.log(ratios).mean())),
            }
        )
    return pd.DataFrame(rows)


def verdicts(runs: pd.DataFrame, picks: pd.DataFrame) -> pd.DataFrame:
    """Return what was said of each workload and whether each run bore it out.

    Returns
    -------
    pandas.DataFrame
        A row per run of a recommended configuration, and per run of any configuration where none
        was recommended: `RUN`; ``said``: that it serves; ``serves``; ``right``.
    """
    twin = picks[picks.method == TWIN].set_index("workload").adapter_slots
    chosen = runs.workload.map(twin).fillna(0).astype(int)
    said = chosen > 0
    own = runs.assign(said=said)[~said | (runs.adapter_slots == chosen)]
    return own.assign(right=own.said == own.serves)[[*RUN, "said", "serves", "right"]]
