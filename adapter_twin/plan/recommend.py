"""How to serve concrete adapters on one GPU: slots, flags, and the service to expect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from adapter_twin import __version__
from adapter_twin.capacity.analytic import analyse
from adapter_twin.errors import AdapterTwinError
from adapter_twin.laws import load_calibration
from adapter_twin.plan.candidates import (
    ALIKE,
    CERTAIN_GROWTH,
    GROWTH_STEP,
    HOUR_S,
    MOST_GROWTH,
    RESERVE,
    Candidates,
)
from adapter_twin.plan.demand import Demand
from adapter_twin.plan.refusal import BINDING, why_not
from adapter_twin.plan.steady_state import expect, first_uses_s, worst_adapter
from adapter_twin.workload.scenario import EngineConfig, config_hash

if TYPE_CHECKING:
    import pandas as pd

LOADS = (0.5, 0.75, 1.25, 1.5, 2.0)
"""Factors on all rates in the what-if table."""

NEIGHBOURS = 2
"""Numbers of slots in the what-if table below the choice, and above it."""

WELL_SHORT = 0.8
"""Where the load can grow to less than that share of the capacity, something else stops it."""

NOTABLE_WAIT_MS = 1000.0
"""A longer mean TTFT is pointed out."""

WHAT_IF = (
    "adapter_slots",
    "load",
    "kv_cache_tokens",
    "total_throughput",
    "mean_ttft_ms",
    "p99_ttft_ms",
    "mean_itl_ms",
    "slo_attainment",
    "serves",
)
"""Columns of the what-if table."""


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
        capture, and ``first_uses_s``, what the first uses of all adapters take;
        ``offered_tokens_per_s``; ``expected``, see `adapter_twin.plan.steady_state.expect`;
        ``worst_served`` adapter; ``utilisation``, of the analytic capacity; ``headroom``, by how
        much all rates can grow, relatively; ``binds`` now and ``binds_next``, when they grow;
        ``reason`` in words; ``vllm_args`` and ``sglang_args``; ``what_if``, rows of `WHAT_IF` for
        other slots and loads; ``criterion`` and provenance.

    Raises
    ------
    AdapterTwinError
        No calibration, or the demand cannot be served: the message says what binds, how many of
        the adapters can be served, and what would help.

    Examples
    --------
    >>> from adapter_twin.workload.scenario import Lengths, deal_adapters
    >>> adapters = deal_adapters(16, [0.2], [16])
    >>> lengths = Lengths(mean_input_tokens=223, mean_output_tokens=198)
    >>> demand = Demand(model="llama-3.1-8b-instruct", adapters=adapters, lengths=lengths)
    >>> print(*recommend(demand)["vllm_args"][:5])
    --enable-lora --max-loras 16 --max-cpu-loras 16
    """
    replica = Candidates.of(demand)
    table = replica.table()
    choice = replica.choose(table)
    if choice is None:
        raise AdapterTwinError(why_not(demand, table))
    best = choice.row
    engine = demand.engine(int(best.adapter_slots))
    calibration = load_calibration(demand.calibration, demand.model)
    calibration.warn_outside_range(engine, demand.workload(HOUR_S))
    loads = replica.at_loads(engine.max_loras, best.utilisation, LOADS)
    growth = replica.growth(engine.max_loras, best.utilisation, loads)
    binds_next = _binds_next(replica, engine, best.utilisation, growth)
    return {
        "adapter_slots": engine.max_loras,
        "max_cpu_loras": engine.max_cpu_loras,
        "max_lora_rank": engine.max_lora_rank,
        "kv_cache_tokens": int(best.kv_cache_tokens),
        "startup_s": float(calibration.memory.startup_s(engine.max_loras)),
        "first_uses_s": first_uses_s(demand, calibration),
        "offered_tokens_per_s": demand.workload(HOUR_S).offered_tokens_per_s,
        "expected": expect(choice.windows, demand.slo),
        "worst_served": worst_adapter(demand, choice.windows),
        "utilisation": float(best.utilisation),
        "headroom": growth - 1,
        "binds": str(best.binds),
        "binds_next": binds_next,
        "reason": "; ".join(_reasons(replica, table, best, growth, binds_next)),
        "vllm_args": vllm_args(engine),
        "sglang_args": sglang_args(engine, base_model=demand.base_model_request_rate > 0),
        "what_if": _what_if(table, engine.max_loras, loads),
        "criterion": str(replica.criterion),
        "calibration": calibration.name,
        "seed": demand.seed,
        "version": __version__,
        "config_hash": config_hash(demand),
    }


def vllm_args(engine: EngineConfig) -> list[str]:
    """Return the flags for ``vllm serve MODEL``."""
    return [
        "--enable-lora",
        *("--max-loras", str(engine.max_loras)),
        *("--max-cpu-loras", str(engine.max_cpu_loras)),
        *("--max-lora-rank", str(engine.max_lora_rank)),
        *("--max-num-seqs", str(engine.max_num_seqs)),
        *("--max-num-batched-tokens", str(engine.max_num_batched_tokens)),
        *("--block-size", str(engine.block_size)),
        *("--gpu-memory-utilization", str(engine.gpu_memory_utilization)),
    ]


def sglang_args(engine: EngineConfig, *, base_model: bool) -> list[str]:
    """Return the flags for ``python -m sglang.launch_server --model-path MODEL`` that correspond.

    SGLang counts the base model among the adapters of a batch. Its token budgets and memory shares
    mean something else than vLLM's, and the expected service is vLLM's.
    """
    return [
        "--enable-lora",
        *("--max-loras-per-batch", str(engine.max_loras + base_model)),
        *("--max-loaded-loras", str(engine.max_cpu_loras + base_model)),
        *("--max-lora-rank", str(engine.max_lora_rank)),
        *("--max-running-requests", str(engine.max_num_seqs)),
    ]


def _binds_next(
    replica: Candidates, engine: EngineConfig, utilisation: float, growth: float
) -> str:
    """Return what ends the growth of the load; well short of the capacity it is waiting."""
    if growth < min(WELL_SHORT / utilisation, MOST_GROWTH / GROWTH_STEP):
        return "slots" if replica.demand.slo is None else "slo"
    workload = replica.demand.workload(HOUR_S, load=CERTAIN_GROWTH / utilisation)
    return str(analyse(workload, [engine], replica.calibration).binds.iloc[0])


def _what_if(table: pd.DataFrame, slots: int, loads: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the chosen slots and their neighbours, then other loads on the chosen ones."""
    here = _place(table, slots)
    around = table.loc[max(here - NEIGHBOURS, 0) : here + NEIGHBOURS].assign(load=1.0)
    same = {"adapter_slots": slots, "kv_cache_tokens": float(table.kv_cache_tokens[here])}
    rows: list[Mapping[Any, Any]] = [*around.to_dict("records"), *(same | row for row in loads)]
    return [{name: row[name] for name in WHAT_IF if name in row} for row in rows]


def _place(table: pd.DataFrame, slots: int) -> int:
    return int((table.adapter_slots == slots).argmax())


def _reasons(
    replica: Candidates, table: pd.DataFrame, best: pd.Series[Any], growth: float, binds_next: str
) -> Iterator[str]:
    """Say what binds, and why neither fewer nor more slots are better."""
    yield (
        f"{BINDING[best.binds]} binds: the load is {best.utilisation:.0%} of the GPU's capacity "
        f"for this mix, and {_growth(growth)} before {BINDING[binds_next]} binds"
    )
    yield from _neighbour_reasons(replica, table, best)
    slo = replica.demand.slo
    if best.mean_ttft_ms > NOTABLE_WAIT_MS and (slo is None or slo.ttft_ms is None):
        yield (
            f"requests wait {best.mean_ttft_ms / 1e3:,.1f} s on average, which throughput does not "
            "show; give an slo with ttft_ms to rule that out"
        )
    if not best.holds:
        yield "so close to saturation the service may vary more than the intervals say"


def _growth(growth: float) -> str:
    if growth == 1:
        return f"cannot grow by {GROWTH_STEP - 1:.0%}"
    if growth < MOST_GROWTH / GROWTH_STEP:
        return f"can grow by about {growth - 1:.0%}"
    return f"can grow at least {int(growth)}-fold"


def _neighbour_reasons(
    replica: Candidates, table: pd.DataFrame, best: pd.Series[Any]
) -> Iterator[str]:
    here = _place(table, best.adapter_slots)
    for place, other in table.loc[here - 1 : here + 1].drop(index=here).iterrows():
        told = f"{'fewer' if place == here - 1 else 'more'} slots ({other.adapter_slots})"
        if not other.feasible_start:
            yield f"{told} leave too little KV cache to start"
        elif not other.serves:
            yield f"{told} would not serve the load well enough"
        else:
            yield f"{told} give {_in_place_of(other, best)}"
        if other.serves and other.mean_ttft_ms < best.mean_ttft_ms:
            slots = int(other.adapter_slots), int(best.adapter_slots)
            grown, own = (replica.figures(size, RESERVE) for size in slots)
            if grown["mean_ttft_ms"] > ALIKE * own["mean_ttft_ms"]:
                yield f"at {RESERVE:g} times the load they give {_in_place_of(grown, own)}"


def _in_place_of(other: Any, best: Any) -> str:
    ttft_ms, itl_ms = "mean_ttft_ms", "mean_itl_ms"
    return (
        f"a mean TTFT of {other[ttft_ms]:,.0f} ms in place of {best[ttft_ms]:,.0f} ms and an ITL "
        f"of {other[itl_ms]:,.0f} ms in place of {best[itl_ms]:,.0f} ms"
    )
