"""Why a demand cannot be served by one GPU, how much of it can, and what would help."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from adapter_twin.plan.candidates import Candidates
from adapter_twin.plan.criterion import MARGIN, Criterion
from adapter_twin.plan.demand import Demand
from adapter_twin.workload.scenario import LORA_RANKS

if TYPE_CHECKING:
    import pandas as pd

BINDING = {
    "kv": "the KV cache",
    "slots": "the number of slots",
    "compute": "the GPU's computing",
    "requests": "max_num_seqs",
    "arrival": "arrival",
    "slo": "the SLO",
}
"""What limits a replica, in words, by the analytic model's names."""

RESOLUTION = 16
"""The number of adapters that can be served is told to that part of all."""

FEW = 0.2
"""At most that share of the adapters is called few."""


def why_not(demand: Demand, table: pd.DataFrame) -> str:
    """Return one line: what binds, how many of the adapters can be served, what would help.

    Parameters
    ----------
    demand : Demand
    table : pandas.DataFrame
        `adapter_twin.plan.candidates.Candidates.table`, of which no candidate serves the demand.
    """
    if not table.feasible_start.any():
        return (
            f"slots: the GPU does not start with {table.adapter_slots.min()} slots of rank "
            f"{demand.max_lora_rank} or more; allow fewer slots, or leave out adapters of that rank"
        )
    served = largest_subset(demand)
    count = len(demand.adapters)
    how_many = (
        f"about {served} of the {count} adapters, evenly chosen, can be served"
        if served
        else "not one of its adapters can be served"
    )
    return (
        f"{_obstacle(demand, table)}; {how_many}; {', or '.join(_remedies(demand, table, served))}"
    )


def largest_subset(demand: Demand) -> int:
    """Return the largest number of adapters, spread evenly over the mix, that can be served."""
    low, high = 0, len(demand.adapters)
    while high - low > max(1, len(demand.adapters) // RESOLUTION):
        middle = (low + high) // 2
        if Candidates.of(demand.subset(middle)).can_serve():
            low = middle
        else:
            high = middle
    return low


def _unstarved(table: pd.DataFrame) -> pd.Series[bool]:
    """Return which candidates would serve the demand if it had no SLO."""
    return Criterion(margin=MARGIN).feasible(table)


def _obstacle(demand: Demand, table: pd.DataFrame) -> str:
    """Say what stands in the way of the best candidate."""
    unstarved = table[_unstarved(table)]
    if demand.slo is not None and len(unstarved):
        ranked = unstarved.sort_values(["slo_attainment", "mean_ttft_ms"], ascending=[False, True])
        best = ranked.iloc[0]
        return (
            f"slo: no number of slots meets it; the best, {best.adapter_slots}, does for "
            f"{best.slo_attainment:.1%} of the requests, {demand.slo.percentile:g} % are asked "
            f"(p99 TTFT {best.p99_ttft_ms:,.0f} ms, mean ITL {best.mean_itl_ms:,.0f} ms)"
        )
    share = (table.total_throughput / table.offered_tokens_per_s).fillna(
        table.analytic_total_throughput / table.analytic_offered_tokens_per_s
    )
    ranked = table.assign(share=share).sort_values("share", na_position="first")
    best = ranked.iloc[-1]
    return (
        f"adapters: one GPU cannot serve them; the best number of slots, {best.adapter_slots}, "
        f"serves {best.share:.0%} of the load, where {BINDING[best.binds]} binds"
    )


def _remedies(demand: Demand, table: pd.DataFrame, served: int) -> Iterator[str]:
    count = len(demand.adapters)
    if served:
        yield f"use about {math.ceil(count / served)} GPUs"
    elif demand.slo is None:
        yield "lower the rates or spread an adapter over several GPUs"
    smaller = _without_wide_adapters(demand)
    if smaller is not None:
        left_out = count - len(smaller.adapters)
        yield (
            f"serve the {left_out} adapters above rank {smaller.max_lora_rank} elsewhere: with "
            f"max_lora_rank {smaller.max_lora_rank} in place of {demand.max_lora_rank} the others "
            "can be served"
        )
    if demand.slo is not None and _unstarved(table).any():
        yield "relax the SLO: without it all can be served"


def _without_wide_adapters(demand: Demand) -> Demand | None:
    """Return the demand without the few adapters that force the rank, if that can be served."""
    for rank in reversed([rank for rank in LORA_RANKS if rank < demand.max_lora_rank]):
        kept = tuple(adapter for adapter in demand.adapters if adapter.rank <= rank)
        if len(kept) < (1 - FEW) * len(demand.adapters):
            return None
        smaller = replace(demand, adapters=kept)
        if Candidates.of(smaller).can_serve():
            return smaller
    return None
