"""Reasons for a recommendation, and for a refusal, in words."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from adapter_twin.errors import AdapterTwinError
from adapter_twin.laws import load_calibration
from adapter_twin.laws.roofline import CAUTION, RooflineLaw
from adapter_twin.plan.candidates import GROWTH_STEP, MOST_GROWTH
from adapter_twin.plan.criterion import MARGIN, RESERVE_LOAD, SIMILAR_TTFT, Criterion
from adapter_twin.plan.demand import Demand
from adapter_twin.plan.search import Answer, Refusal, around
from adapter_twin.service.intervals import cautious

if TYPE_CHECKING:
    import pandas as pd

BINDING = {
    "kv": "the KV cache",
    "slots": "the number of slots",
    "compute": "the GPU's computing",
    "requests": "max_num_seqs",
    "arrival": "arrival",
    "slo": "the SLO",
    "clients": "the number of clients",
}
"""The limits of a replica in words, by the analytic model's names."""

NOTABLE_WAIT_MS = 1000.0
"""A longer mean TTFT is pointed out."""

MEASURED_BY = {
    "small batches without adapters": ("bandwidth_gb_s", "knee", "layer_ms", "step_ms"),
    "many requests at once": ("sequence_ms", "arrival_ms"),
    "long contexts": ("kv_bandwidth_gb_s",),
    "long prompts": ("compute_tflops", "eager_layer_ms", "eager_lora_layer_ms"),
    "batches of one and of many adapters": (
        *("few_adapter_ms", "many_adapter_ms", "adapter_reads", "lora_layer_ms", "token_reads"),
        *("activation_reads", "shrink_block_ns", "expand_block_ns"),
    ),
    "few and many slots": ("idle_block_ns",),
}
"""These batches tell constants of the step-time law."""

MEASURED_FIRST = 3
"""This many of them are named that would make a prior surer."""


def explanation(answer: Answer) -> str:
    """Say what binds, and why neither fewer nor more slots are better."""
    return "; ".join(_reasons(answer))


def _reasons(answer: Answer) -> Iterator[str]:
    best, slo = answer.best, answer.demand.slo
    load = f"the load is {best.utilisation:.0%} of the GPU's capacity for this mix"
    growth, places = _growth(answer.growth), answer.demand.arrivals.max_concurrency
    until = f"{growth} before {BINDING[answer.binds_next]} binds"
    if places is None:
        yield f"{BINDING[best.binds]} binds: {load}, and {until}"
    else:
        told = growth if answer.binds_next == "clients" else until
        yield f"with {places} requests under way at most {load}, and their number {told}"
    for _, other in around(answer.table, best).drop(index=best.name).iterrows():
        yield from _compared(other, answer)
    if best.mean_ttft_ms > NOTABLE_WAIT_MS and (slo is None or slo.ttft_ms is None):
        yield (
            f"requests wait {best.mean_ttft_ms / 1e3:,.1f} s on average, which throughput does not "
            "show; give an slo with ttft_ms to rule that out"
        )
    yield from _doubts(answer.demand)
    if not best.holds:
        yield "so close to saturation the service may vary more than the intervals say"


def _doubts(demand: Demand) -> Iterator[str]:
    """Say how a plan on a prior allows for what the prior does not know."""
    known = load_calibration(demand.calibration, demand.model)
    law, planned = known.step_time, cautious(known).step_time
    if isinstance(law, RooflineLaw) and isinstance(planned, RooflineLaw) and law is not planned:
        shares = dict.fromkeys(MEASURED_BY, 0.0)
        for name, share in law.doubts().items():
            shares[next(batches for batches, told in MEASURED_BY.items() if name in told)] += share
        first = sorted(shares, key=shares.__getitem__, reverse=True)[:MEASURED_FIRST]
        yield (
            f"the plan is for steps {planned.typical_ms() / law.typical_ms() - 1:.0%} longer than "
            f"the prior's, longer than {CAUTION:.0%} of what it allows; what would narrow it most "
            f"is to measure {', then '.join(first)}"
        )


def _growth(growth: float) -> str:
    if growth == 1:
        return f"cannot grow by {GROWTH_STEP - 1:.0%}"
    if growth < MOST_GROWTH / GROWTH_STEP:
        return f"can grow by about {growth - 1:.0%}"
    return f"can grow at least {int(growth)}-fold"


def _compared(other: pd.Series[Any], answer: Answer) -> Iterator[str]:
    """Compare a neighbour with the choice, at the demand's load and at a higher one."""
    slots, chosen = int(other.adapter_slots), int(answer.best.adapter_slots)
    told = f"{'fewer' if slots < chosen else 'more'} slots ({slots})"
    if not other.feasible_start:
        yield f"{told} leave too little KV cache to start"
    elif not other.serves:
        yield f"{told} would not serve the load well enough"
    else:
        yield f"{told} give {_in_place_of(other, answer.best)}"
    if slots in answer.reserve:
        grown, own = answer.reserve[slots], answer.reserve[chosen]
        if grown["mean_ttft_ms"] > SIMILAR_TTFT * own["mean_ttft_ms"]:
            yield f"at {RESERVE_LOAD:g} times the load they give {_in_place_of(grown, own)}"


def _in_place_of(other: Any, best: Any) -> str:
    ttft_ms, itl_ms = "mean_ttft_ms", "mean_itl_ms"
    return (
        f"a mean TTFT of {other[ttft_ms]:,.0f} ms in place of {best[ttft_ms]:,.0f} ms and an ITL "
        f"of {other[itl_ms]:,.0f} ms in place of {best[itl_ms]:,.0f} ms"
    )


def why_not(refusal: Refusal) -> str:
    """Say what binds, how many of the adapters can be served, and what would help."""
    demand, table, served = refusal.demand, refusal.table, refusal.served
    if not table.feasible_start.any():
        fewest = int(table.adapter_slots.min())
        if demand.slots is not None:
            return (
                f"slots: the GPU does not start with {fewest} slots of rank "
                f"{demand.max_lora_rank} or more; allow fewer"
            )
        try:
            laws = load_calibration(demand.calibration, demand.model)
            laws.require_start(demand.engine_with(fewest))
        except AdapterTwinError as error:
            return str(error)
    places = demand.arrivals.max_concurrency
    how_many = (
        f"about {served} of the {places} requests may be under way at once"
        if served and places
        else f"about {served} of the {len(demand.adapters)} adapters, evenly chosen, can be served"
        if served
        else "not one of its adapters can be served"
    )
    unstarved = table[Criterion(margin=MARGIN).feasible(table)]
    missed = demand.slo is not None and len(unstarved) > 0
    obstacle = _missed_slo(refusal, unstarved) if missed else _overload(table)
    return f"{obstacle}; {how_many}; {', or '.join(_remedies(refusal, missed))}"


def _missed_slo(refusal: Refusal, unstarved: pd.DataFrame) -> str:
    ranked = unstarved.sort_values(["slo_attainment", "mean_ttft_ms"], ascending=[False, True])
    best, slo = ranked.iloc[0], refusal.demand.slo
    assert slo is not None
    return (
        f"slo: no number of slots meets it; the best, {best.adapter_slots}, does for "
        f"{best.slo_attainment:.1%} of the requests, {slo.percentile:g} % are asked "
        f"(p99 TTFT {best.p99_ttft_ms:,.0f} ms, mean ITL {best.mean_itl_ms:,.0f} ms)"
    )


def _overload(table: pd.DataFrame) -> str:
    share = (table.total_throughput / table.offered_tokens_per_s).fillna(
        table.analytic_total_throughput / table.analytic_offered_tokens_per_s
    )
    best = table.assign(share=share).sort_values("share", na_position="first").iloc[-1]
    return (
        f"adapters: one GPU cannot serve them; the best number of slots, {best.adapter_slots}, "
        f"serves {best.share:.0%} of the load, where {BINDING[best.binds]} binds"
    )


def _remedies(refusal: Refusal, missed: bool) -> Iterator[str]:
    demand, narrow = refusal.demand, refusal.narrow
    count = len(demand.adapters)
    if refusal.served:
        asked = demand.arrivals.max_concurrency or count
        yield f"use about {math.ceil(asked / refusal.served)} GPUs"
    elif not missed:
        yield "lower the rates or spread an adapter over several GPUs"
    if narrow is not None:
        yield (
            f"serve the {count - len(narrow.adapters)} adapters above rank {narrow.max_lora_rank} "
            f"elsewhere: with max_lora_rank {narrow.max_lora_rank} in place of "
            f"{demand.max_lora_rank} the others can be served"
        )
    if missed:
        yield "relax the SLO: without it all can be served"
