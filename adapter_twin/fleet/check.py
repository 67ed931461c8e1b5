"""Does a placement hold? Every GPU is simulated with its share of the fleet's traffic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import joblib
import numpy as np
from numpy.typing import NDArray

from adapter_twin.fleet.placement import Placement, ReplicaPlan, replica_workload
from adapter_twin.laws import Calibration
from adapter_twin.plan.candidates import HOUR_S
from adapter_twin.plan.demand import Demand
from adapter_twin.plan.grid import simulate_quietly
from adapter_twin.service.metrics import service_of, tpot_s, waits_ms
from adapter_twin.twin.records import Records
from adapter_twin.twin.simulate import draw_requests
from adapter_twin.workload.scenario import Slo, Workload
from adapter_twin.workload.trace import Trace

if TYPE_CHECKING:
    import pandas as pd

FIGURES = (
    *("offered_tokens_per_s", "total_throughput", "mean_ttft_ms", "p99_ttft_ms", "mean_itl_ms"),
    *("worst_adapter", "worst_adapter_mean_ttft_ms"),
)
"""What is kept of a GPU's service (`adapter_twin.service.metrics.service`)."""


def split_trace(trace: Trace, placement: Placement, seed: int) -> NDArray[np.int32]:
    """Return the replica that each request goes to, by the shares of its adapter.

    Requests of an adapter that is nowhere, and of the base model, go to -1.
    """
    homes: dict[int, list[tuple[int, float]]] = {}
    for index, plan in enumerate(placement.replicas):
        for adapter, share in zip(plan.adapters, plan.shares, strict=True):
            homes.setdefault(adapter, []).append((index, share))
    last = max(max(homes), int(np.max(trace.adapter, initial=0)))
    first = np.full(last + 2, -1, np.int32)  # the base model, -1, is the last entry
    for adapter, parts in homes.items():
        first[adapter] = parts[0][0]
    replica = first[trace.adapter]
    rng = np.random.default_rng([seed, 1])
    for adapter, parts in homes.items():
        if len(parts) > 1:
            own = np.flatnonzero(trace.adapter == adapter)
            where, shares = zip(*parts, strict=True)
            replica[own] = rng.choice(where, len(own), p=np.array(shares) / sum(shares))
    return replica


def check_placement(
    demand: Demand,
    placement: Placement,
    calibration: Calibration,
    *,
    seed: int = 0,
    duration_s: float = HOUR_S,
    jobs: int = -1,
) -> pd.DataFrame:
    """Simulate every GPU of a placement with the requests that are routed to it.

    The same as a cluster whose router follows the placement
    (`adapter_twin.fleet.routers.Placed`), but in the compiled loop and on all cores.

    Parameters
    ----------
    demand : Demand
    placement : Placement
    calibration : Calibration
    seed : int
        Of the traffic.
    duration_s : float
    jobs : int
        Processes; -1 is one per core.

    Returns
    -------
    pandas.DataFrame
        A row per GPU: ``adapters, adapter_slots, max_lora_rank``, `FIGURES`, and ``serves``: does
        not starve, and meets the SLO. With an SLO its ``slo_attainment`` and, at its percentile,
        the requests' ``slo_ttft_ms``, counting what still waits with its wait so far, and
        ``slo_itl_ms``.
    """
    import pandas as pd

    trace = draw_requests(demand.workload(duration_s), calibration, seed=seed)
    replica = split_trace(trace, placement, seed)
    order = np.argsort(replica, kind="stable")  # by arrival within each
    ends = np.searchsorted(replica[order], range(len(placement.replicas) + 1))
    tasks = (
        joblib.delayed(_serve)(
            plan,
            replica_workload(demand, plan, duration_s),
            _own_requests(trace, order[begin:end], plan.adapters),
            calibration,
            demand.slo,
            seed,
        )
        for plan, begin, end in zip(placement.replicas, ends[:-1], ends[1:], strict=True)
    )
    return pd.DataFrame(joblib.Parallel(jobs)(tasks))


def _own_requests(trace: Trace, own: NDArray[np.int64], adapters: Sequence[int]) -> Trace:
    """Return a replica's requests, its adapters numbered from zero."""
    number = np.full(max(adapters) + 1, -1, np.int32)
    number[list(adapters)] = np.arange(len(adapters))
    return Trace(
        trace.arrival_s[own],
        number[trace.adapter[own]],
        trace.prompt_tokens[own],
        trace.output_tokens[own],
    )


def _serve(
    plan: ReplicaPlan,
    workload: Workload,
    trace: Trace,
    calibration: Calibration,
    slo: Slo | None,
    seed: int,
) -> dict[str, Any]:
    run = simulate_quietly(workload, plan.engine, calibration, seed, trace)
    service = service_of(run, slo=slo)
    row: dict[str, Any] = {
        "adapters": len(plan.adapters),
        "adapter_slots": plan.engine.max_loras,
        "max_lora_rank": plan.engine.max_lora_rank,
        **{name: service[name] for name in FIGURES},
        "serves": not service["starved"],
    }
    if slo is not None:
        row["slo_attainment"] = service["slo_attainment"]
        row["serves"] &= service["slo_attainment"] >= slo.percentile / 100
        row |= _at_percentile(slo, run.records, run.duration_s)
    return row


def _at_percentile(slo: Slo, records: Records, duration_s: float) -> dict[str, float]:
    itl_ms = 1e3 * tpot_s(records)
    itl_ms = itl_ms[np.isfinite(itl_ms)]
    return {
        "slo_ttft_ms": float(np.percentile(waits_ms(records, duration_s), slo.percentile)),
        "slo_itl_ms": float(np.percentile(itl_ms, slo.percentile)) if len(itl_ms) else np.nan,
    }
