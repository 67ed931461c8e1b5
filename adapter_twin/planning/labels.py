"""Labels: the optimum of every workload of a sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapter_twin.planning.choice import Criterion

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
    import pandas as pd

    configuration = ["served_adapters", "adapter_slots"]
    largest = runs.served_adapters.max()
    labels = []
    for key, table in runs.groupby(WORKLOAD, sort=False, observed=True):
        means = table.groupby(configuration, as_index=False).mean(numeric_only=True)
        ranked = criterion.ranked(means.assign(feasible_start=means.feasible_start > 0))
        row = dict(zip(WORKLOAD, key, strict=True)) | {"has_optimum": not ranked.empty}
        if not ranked.empty:
            best = ranked.iloc[0]
            ties = ranked[ranked.tied & (ranked.served_adapters == best.served_adapters)]
            row |= {
                **best[[*configuration, "total_throughput", "mean_ttft_ms"]],
                "tied_slots": "-".join(str(slots) for slots in sorted(ties.adapter_slots)),
                "censored": best.served_adapters == largest,
            }
        labels.append(row)
    return pd.DataFrame(labels)
