"""A recommendation for concrete adapters on one GPU: slots, flags, and the service to expect."""

from __future__ import annotations

from typing import Any

from adapter_twin import __version__
from adapter_twin.errors import AdapterTwinError, require
from adapter_twin.laws import load_calibration
from adapter_twin.plan.candidates import HOUR_S
from adapter_twin.plan.cold_start import cold_start_states
from adapter_twin.plan.commands import sglang_args, vllm_args
from adapter_twin.plan.demand import Demand
from adapter_twin.plan.explanation import explanation, why_not
from adapter_twin.plan.logged import described
from adapter_twin.plan.search import Answer, Refusal, around, search
from adapter_twin.plan.steady_state import (
    expect,
    first_uses_s,
    offered_tokens_per_s,
    slo_met_probability,
    worst_adapter,
)
from adapter_twin.workload.gpu_fleet import GpuFleet
from adapter_twin.workload.scenario import config_hash

NEIGHBOURS = 2
"""The what-if table shows this many numbers of slots below the choice, and above it."""

WHAT_IF = (
    *("adapter_slots", "load", "kv_cache_tokens", "total_throughput"),
    *("mean_ttft_ms", "p99_ttft_ms", "mean_itl_ms", "slo_attainment", "serves"),
)
"""The what-if table has these columns."""


def recommend(demand: Demand) -> dict[str, Any]:
    """Choose the adapter slots for a demand and predict the service.

    Every promising number of slots is simulated on the same requests. The best one by
    `adapter_twin.plan.criterion.Criterion` is simulated again on other ones; should it not hold
    there, the next best one is taken.

    Parameters
    ----------
    demand : Demand

    Returns
    -------
    dict
        ``adapter_slots, max_cpu_loras, max_lora_rank, kv_cache_tokens``; ``startup_s``, the graph
        capture, and ``first_uses_s``, what the first uses of all adapters take; ``traffic`` in
        words, and its ``offered_tokens_per_s``, of a closed loop what is sent; ``expected``, see
        `adapter_twin.plan.steady_state.expect`; ``slo_met_probability``;
        ``cold_start_states``, see `adapter_twin.plan.cold_start.cold_start_states`;
        ``worst_served`` adapter; ``utilisation``, of the analytic capacity; ``headroom``, by how
        much all rates can grow, relatively; ``binds`` now and ``binds_next``, when they grow;
        ``reason`` in words; ``vllm_args`` and ``sglang_args``; ``what_if``, rows of `WHAT_IF` for
        other slots and loads; ``criterion`` and provenance, ``prior`` among it: where the
        calibration is one. Then ``expected`` is of all that it allows, and all else of laws that
        are slower than most of that, see `adapter_twin.plan.steady_state.planned_on`.

    Raises
    ------
    AdapterTwinError
        No calibration, or the demand cannot be served: the message says what binds, how many of
        the adapters can be served, and what would help.

    Examples
    --------
    >>> from adapter_twin import Lengths, deal_adapters
    >>> adapters = deal_adapters(16, [0.2], [16])
    >>> lengths = Lengths(mean_input_tokens=223, mean_output_tokens=198)
    >>> demand = Demand(model="llama-3.1-8b-instruct", adapters=adapters, lengths=lengths)
    >>> print(*recommend(demand)["vllm_args"][:5])
    --enable-lora --max-loras 16 --max-cpu-loras 16
    """
    one_gpu = demand.fleet == GpuFleet()
    require(one_gpu, "fleet: recommend plans one GPU; use place, or leave it out")
    calibration = load_calibration(demand.calibration, demand.model)
    calibration.warn_if_prior()
    found = search(demand)
    if isinstance(found, Refusal):
        raise AdapterTwinError(why_not(found))
    best, engine = found.best, found.engine
    calibration.warn_outside_range(engine, demand.workload(HOUR_S))
    return {
        "adapter_slots": engine.max_loras,
        "max_cpu_loras": engine.max_cpu_loras,
        "max_lora_rank": engine.max_lora_rank,
        "kv_cache_tokens": int(best.kv_cache_tokens),
        "startup_s": calibration.startup_s(engine, demand.adapters),
        "first_uses_s": first_uses_s(demand, calibration),
        "traffic": described(demand.trace, demand.arrivals),
        "offered_tokens_per_s": offered_tokens_per_s(found.windows, demand),
        "expected": expect(found.windows, demand),
        "slo_met_probability": slo_met_probability(found.windows, demand),
        "cold_start_states": cold_start_states(demand, engine, calibration),
        "worst_served": worst_adapter(demand, found.windows),
        "utilisation": float(best.utilisation),
        "headroom": found.growth - 1,
        "binds": str(best.binds),
        "binds_next": found.binds_next,
        "reason": explanation(found),
        "vllm_args": vllm_args(engine, calibration, demand.adapters),
        "sglang_args": sglang_args(engine, base_model=demand.base_model_request_rate > 0),
        "what_if": _what_if(found),
        "criterion": str(found.criterion),
        "calibration": calibration.name,
        "prior": calibration.origin or None,
        "seed": demand.seed,
        "version": __version__,
        "config_hash": config_hash(demand),
    }


def _what_if(answer: Answer) -> list[dict[str, Any]]:
    """Return the chosen slots and their neighbours, then other loads on the chosen ones."""
    best = answer.best
    near = around(answer.table, best, NEIGHBOURS).assign(load=1.0)
    same = {
        "adapter_slots": int(best.adapter_slots),
        "kv_cache_tokens": float(best.kv_cache_tokens),
    }
    rows = [*near.to_dict("records"), *(same | row for row in answer.loads)]
    return [{name: row[name] for name in WHAT_IF if name in row} for row in rows]
