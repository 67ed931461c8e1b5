"""What the interpretable models see of a traffic mix, and of a configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from adapter_twin.calibration.memory import slots_gib
from adapter_twin.scenario import parse_ranks, parse_rates, records

if TYPE_CHECKING:
    import pandas as pd

PAPER = [
    *(f"{statistic}_rate" for statistic in ("max", "min", "mean", "std")),
    *(f"{statistic}_rank" for statistic in ("max", "min", "mean", "std")),
]
"""The reference study's features: of rates in requests/s and of ranks, over the adapters."""

TRAFFIC = [
    "adapter_load",
    "top_share",
    "rank_load",
    "slot_mib",
    "max_rank",
    "output_share",
    "request_tokens",
    "zipf_exponent",
    "arrival_cv",
]
"""Ours: what decides capacity (see `traffic_features`)."""

CONFIGURATION = ["served_adapters", "adapter_slots", "slots_per_adapter", "offered", "slots_gib"]
"""Besides `TRAFFIC`, of a configuration (see `configuration_features`)."""

MIB_PER_GIB = 1024


def paper_features(workloads: pd.DataFrame) -> pd.DataFrame:
    """Return `PAPER` for workloads whose rates and ranks are dealt, one row each."""
    import pandas as pd

    columns: dict[str, list[float]] = {name: [] for name in PAPER}
    for rates, ranks in zip(workloads.rates_per_adapter, workloads.ranks, strict=True):
        for kind, values in (("rate", parse_rates(rates)), ("rank", parse_ranks(ranks))):
            for statistic in ("max", "min", "mean", "std"):
                columns[f"{statistic}_{kind}"].append(float(getattr(np, statistic)(values)))
    return pd.DataFrame(columns, index=workloads.index)


def traffic_features(workloads: pd.DataFrame) -> pd.DataFrame:
    """Return `TRAFFIC` for workloads, one row each.

    Returns
    -------
    pandas.DataFrame
        ``adapter_load``: offered tokens/s of the mean adapter; ``top_share``: part of the load that
        comes at the highest rate; ``rank_load``: mean rank, weighted by load; ``slot_mib``: what a
        slot takes; ``max_rank``; ``output_share``: part of the tokens that are output;
        ``request_tokens``: mean tokens of a request; ``zipf_exponent``; ``arrival_cv``.
    """
    import pandas as pd

    rows = []
    for row in records(workloads):
        rates = np.array(parse_rates(row["rates_per_adapter"]))
        ranks = np.array(parse_ranks(row["ranks"]), dtype=float)
        tokens = row["mean_input_tokens"] + row["mean_requested_output_tokens"]
        dealt = np.resize(ranks, np.lcm(len(rates), len(ranks)))
        load = np.resize(rates, len(dealt))
        rows.append(
            {
                "adapter_load": rates.mean() * tokens,
                "top_share": rates.max() / rates.sum(),
                "rank_load": float(dealt @ load / load.sum()),
                "slot_mib": MIB_PER_GIB * slots_gib(row["model"], 64, row["max_lora_rank"]) / 64,
                "max_rank": float(row["max_lora_rank"]),
                "output_share": row["mean_requested_output_tokens"] / tokens,
                "request_tokens": tokens,
                "zipf_exponent": float(row["zipf_exponent"]),
                "arrival_cv": float(row["arrival_cv"]),
            }
        )
    return pd.DataFrame(rows, columns=TRAFFIC, index=workloads.index)


def configuration_features(runs: pd.DataFrame) -> pd.DataFrame:
    """Return `TRAFFIC` and `CONFIGURATION` for runs, one row each.

    ``offered``: load in tokens/s; ``slots_gib``: memory that the slots take.
    """
    mixes = runs.drop_duplicates("workload_id")
    traffic = traffic_features(mixes).assign(workload_id=mixes.workload_id)
    joined = runs[["workload_id"]].merge(traffic, on="workload_id", how="left")
    joined.index = runs.index
    slots = runs.adapter_slots
    return joined[TRAFFIC].assign(
        served_adapters=runs.served_adapters,
        adapter_slots=slots,
        slots_per_adapter=slots / runs.served_adapters,
        offered=joined.adapter_load * runs.served_adapters,
        slots_gib=joined.slot_mib * slots / MIB_PER_GIB,
    )[TRAFFIC + CONFIGURATION]
