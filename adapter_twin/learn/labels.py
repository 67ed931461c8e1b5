"""Labels: the optimum of every workload of a sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapter_twin.plan.criterion import Criterion

if TYPE_CHECKING:
    import pandas as pd

WORKLOAD = [
    "workload_id",
    "model",
    "rates_per_adapter",
    "ranks",
    "mean_input_tokens",
    "mean_requested_output_tokens",
    "zipf_exponent",
    "arrival_cv",
    "max_lora_rank",
]
"""What describes a workload in the table of a sweep."""


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
